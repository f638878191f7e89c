# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Which distances may be stated: the rule for metrics, evaluations, tables and cards."""

DISTANCES = ("frechet_distance", "kernel_distance", "kernel_distance_std")
# Stands in a table instead of a kernel distance that is not above its own noise.
NOISE = "within its noise"


def why_no_frechet_distance(num_real: int, num_generated: int, num_features: int) -> str | None:
    """
    Say why a Frechet distance may not be stated; `None` if it may. The covariance of fewer images than features lacks
    full rank, and the distance then depends on the number of images.
    """
    fewest = min(num_real, num_generated)
    if fewest >= num_features:
        return None
    return f"{fewest} images of one kind are fewer than the {num_features} features."


def is_above_noise(kernel_distance: float | None, std: float | None) -> bool:
    """
    Return whether a kernel distance lies above its standard deviation over subsets. It is an unbiased estimate,
    negative by chance where two sets are alike. Below its noise it says that the sets can't be told apart, and can't
    be compared.
    """
    return kernel_distance is not None and std is not None and kernel_distance > std
