# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Rules on which distances may be reported, for metrics, evaluations, tables and cards."""

DISTANCES = ("frechet_distance", "kernel_distance", "kernel_distance_std")
# Printed in a table instead of a kernel distance that is not above its own noise.
NOISE = "within its noise"


def why_no_frechet_distance(num_real: int, num_generated: int, num_features: int) -> str | None:
    """
    Return why a Frechet distance may not be reported, or `None` if it may. With fewer images than features, the
    covariance is rank-deficient, and the distance depends on the number of images.
    """
    fewest = min(num_real, num_generated)
    if fewest >= num_features:
        return None
    return f"There are fewer images ({fewest}) than features ({num_features})."


def is_above_noise(kernel_distance: float | None, std: float | None) -> bool:
    """
    Return whether a kernel distance is above its standard deviation over subsets. It is an unbiased estimate, which
    can be negative if two sets are alike. Below its noise, it only says that the two sets can't be told apart, and must
    not be compared.
    """
    return kernel_distance is not None and std is not None and kernel_distance > std
