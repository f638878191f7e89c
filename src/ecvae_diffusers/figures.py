# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Which distances may be stated: the rule for metrics, evaluations, tables and cards."""

# What a table says in place of a kernel distance that is not above its own noise.
NOISE = "within its noise"


def why_no_frechet_distance(num_real: int, num_generated: int, num_features: int) -> str | None:
    """
    Say why a Frechet distance may not be stated; `None` if it may. Of fewer images than features the covariance has no full
    rank, and the figure is one of the number of images.
    """
    fewest = min(num_real, num_generated)
    return (
        f"{fewest} images of one kind are fewer than the {num_features} features." if fewest < num_features else None
    )


def is_above_noise(kernel_distance: float | None, std: float | None) -> bool:
    """
    Whether a kernel distance, which is an unbiased estimate and negative by chance where two sets are alike, lies above its standard
    deviation over subsets. If not, it tells that the sets can't be told apart, and is no figure to compare.
    """
    return kernel_distance is not None and std is not None and kernel_distance > std
