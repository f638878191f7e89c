# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What pipelines that sample from N(0, I) are given, checked before any work is done."""

from numbers import Integral, Real

import torch


# Latents of training have a standard deviation of 1.
LARGEST_TEMPERATURE = 100.0


def check_generator(generator: torch.Generator | list[torch.Generator] | None, count: int, of: str = "images") -> None:
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` must be a torch.Generator or a list of them, but is {generator!r}.")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` is a list of {len(generator)}, but there are {count} {of}.")


def check_sampling(
    batch_size: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    num_latents: int,
    temperature: float,
    output_type: str | None,
) -> None:
    """
    Raises:
        ValueError: naming the argument, its value and what is allowed. `latents` are (batch_size, num_latents, 1, 1).
    """
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an integer of at least 1, but is {batch_size!r}.")
    if not isinstance(temperature, Real) or not 0 <= temperature <= LARGEST_TEMPERATURE:
        raise ValueError(f"`temperature` must be a number from 0 to {LARGEST_TEMPERATURE:g}, but is {temperature!r}.")
    if output_type not in ("pil", "np", "pt", "latent", None):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")
    if latents is not None:
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"`latents` must be a tensor, but is {type(latents)}.")
        if latents.ndim != 4 or latents.shape[0] == 0 or tuple(latents.shape[1:]) != (num_latents, 1, 1):
            raise ValueError(
                f"`latents` must have shape (batch_size, {num_latents}, 1, 1), not {tuple(latents.shape)}."
            )
        if batch_size not in (1, latents.shape[0]):
            raise ValueError(f"`batch_size` is {batch_size}, but `latents` holds {latents.shape[0]}.")
        if temperature != 1.0:
            raise ValueError("`latents` are decoded as they are: scale them yourself, and leave `temperature` at 1.")
        if not torch.isfinite(latents).all():
            raise ValueError("`latents` holds values that are not finite.")
        batch_size = latents.shape[0]
    check_generator(generator, batch_size)


def check_finite(images: torch.Tensor, temperature: float) -> None:
    """Raise `ValueError` if decoded images are not finite: they would be shown as black."""
    if not images.isfinite().all():
        raise ValueError(
            f"Images at a `temperature` of {temperature:g} or of the given `latents` are not finite in {images.dtype}: lower "
            "`temperature`, or load the pipeline with dtype=torch.float32."
        )
