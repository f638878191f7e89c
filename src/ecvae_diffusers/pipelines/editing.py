# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The methods of [`ECVAEPipeline`] that edit images: encode, move the latents, decode."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.utils import BaseOutput

from ..checks import check_choice, check_number
from ..edits import METHODS, NUM_FOLDS, held_out_accuracy, principal_directions
from .inputs import ClassLabels, Images, check_finite, check_output_type, check_shape, known_labels, postprocess


# Images that are encoded at a time.
ENCODED_AT_A_TIME = 256


@dataclass
class DirectionOutput(BaseOutput):
    """
    Output of `ECVAEPipeline.direction`.

    Args:
        direction (`torch.Tensor` of shape `(latent_channels, 1, 1)`):
            The direction. An edit of strength 1 moves the mean of `images_a` to the level of the mean of `images_b`.
        accuracy (`float`):
            How often the direction, found without them, tells which set held-out images are from: 0.5 is by chance, 1 is always.
    """

    direction: torch.Tensor
    accuracy: float


class EditingMixin:
    """Mixin for a pipeline with an autoencoder `vae`."""

    vae: Any
    decode: Any
    image_processor: Any
    maybe_free_model_hooks: Any
    prepare_image: Any

    @torch.no_grad()
    def encode(self, image: Images, class_labels: ClassLabels = None) -> torch.Tensor:
        """
        Return the latents of images, the means of their posteriors.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images of the model's size: arrays (B, H, W, C) and tensors (B, C, H, W) in [0, 1].
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes. `None` is the unknown class. A model without classes accepts only `None`.

        Returns:
            `torch.Tensor` of shape `(B, latent_channels, 1, 1)`.

        Raises:
            ValueError: if `image` or `class_labels` does not fit the model.
        """
        images = self.prepare_image(image)
        labels = known_labels(self, class_labels, len(images))
        return self.encode_prepared(images, labels)

    def encode_prepared(self, images: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the posterior means of images in [-1, 1], encoded in parts."""
        parts = images.split(ENCODED_AT_A_TIME)
        classes = (
            [{}] * len(parts) if labels is None else [{"class_labels": x} for x in labels.split(ENCODED_AT_A_TIME)]
        )
        found = [self.vae.encode(part, **own).latent_dist.mode() for part, own in zip(parts, classes)]
        self.maybe_free_model_hooks()
        return torch.cat(found)

    def direction(
        self, images_a: Images, images_b: Images, method: str = "means", class_labels: ClassLabels = None
    ) -> DirectionOutput:
        """
        Return the direction from one set of images to another (`edits.py` has the equations).

        Args:
            images_a, images_b (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                Two sets of at least 5 images each, for example without and with glasses, as for `encode`.
            method (`str`, *optional*, defaults to `"means"`):
                `"means"` is the difference of the means, `"classifier"` the normal of a linear classifier. The classifier leaves alone
                what both sets share, but may need larger strengths for the same effect.
            class_labels (`str`, `int` or `None`, *optional*): The class of all images, as for `encode`.

        Returns:
            [`DirectionOutput`]

        Raises:
            ValueError: if an argument is outside its range, or images do not fit the model.
        """
        check_choice("method", method, tuple(METHODS))
        sets = []
        for name, images in (("images_a", images_a), ("images_b", images_b)):
            latents = self.encode(images, class_labels).float().flatten(1)
            check_number(f"len({name})", len(latents), NUM_FOLDS, whole=True)
            sets.append(latents)
        direction = METHODS[method](sets[0], sets[1])
        return DirectionOutput(direction[:, None, None], held_out_accuracy(sets[0], sets[1], method))

    def principal_directions(self, num_directions: int, image: Images | None = None) -> torch.Tensor:
        """
        Return the directions in which the latents of the data vary most, each as long as one standard deviation.

        Args:
            num_directions (`int`): Number K of directions, from 1 to the number of those that training has saved.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*):
                Images like the training data, as for `encode`, whose directions are returned. If not given, the directions are those
                that training has measured on the training data (`vae.config.posterior_directions`).

        Returns:
            `torch.Tensor` of shape `(K, latent_channels, 1, 1)`, the most variable direction first.

        Raises:
            ValueError: if `num_directions` is outside its range, or `image` is not given and the model has no saved directions.
        """
        saved = self.vae.config.get("posterior_directions")  # configs saved by earlier versions lack it
        if image is not None:
            latents = self.encode(image).flatten(1).double().cpu().numpy()
            saved = principal_directions(latents, self.vae.config.latent_channels)[1].tolist()
        elif saved is None:
            raise ValueError("`image` must be given: the model was saved without `posterior_directions`.")
        check_number("num_directions", num_directions, 1, len(saved), whole=True)
        return torch.tensor(saved[:num_directions])[:, :, None, None]

    @torch.no_grad()
    def edit(
        self,
        image: Images,
        direction: torch.Tensor,
        strength: float | list[float] = 1.0,
        keep_residual: bool = True,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Move images along a direction of the latent space.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them): B images, as for `encode`.
            direction (`torch.Tensor` of shape `(latent_channels, 1, 1)` or `(B, latent_channels, 1, 1)`):
                From `direction` or `principal_directions`: one for all images, or one per image.
            strength (`float` or `list[float]`, *optional*, defaults to 1.0):
                How far to move, in lengths of `direction`. Negative strengths move back. A list gives several edits of each image.
            keep_residual (`bool`, *optional*, defaults to `True`):
                Whether to add what the reconstruction lost. Strength 0 then returns the images themselves.
            output_type (`str`, *optional*, defaults to `"pil"`): As for generation, except `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*): As for `encode`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple` with B times `len(strength)` images, image by image.

        Raises:
            ValueError: if an argument is outside its range, or shapes do not fit.
        """
        check_output_type(output_type, self.vae.config.in_channels)
        strengths = torch.as_tensor(strength, dtype=torch.float64).flatten().tolist()
        check_number("len(strength)", len(strengths), 1)
        for one in strengths:
            check_number("strength", one, -1e6, 1e6)
        images = self.prepare_image(image)
        count, num_latents = len(images), self.vae.config.latent_channels
        direction = direction[None] if direction.ndim == 3 else direction
        check_shape("direction", direction, (count if len(direction) > 1 else 1, num_latents, 1, 1))
        labels = known_labels(self, class_labels, count)
        latents = self.encode_prepared(images, labels)
        steps = torch.tensor(strengths).to(latents).view(1, -1, 1, 1, 1) * direction.to(latents).unsqueeze(1)
        moved = (latents.unsqueeze(1) + steps).flatten(0, 1)
        of_moved = None if labels is None else labels.repeat_interleave(len(strengths))
        edited = self.decode(moved, of_moved)
        if keep_residual:
            residual = images - self.decode(latents, labels)
            edited = edited + residual.repeat_interleave(len(strengths), dim=0)
        check_finite(edited, "`direction`, `strength` and the decoder's weights")
        edited = postprocess(edited, self.image_processor, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=edited) if return_dict else (edited,)

    @torch.no_grad()
    def mix(
        self,
        image: Images,
        weights: list[float] | torch.Tensor,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Decode weighted means of the latents of images.

        Args:
            image (list of `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`): B images, as for `encode`.
            weights (`list[float]` or `torch.Tensor` of shape `(B,)` or `(M, B)`):
                The weight of each image, at least 0: one set for one mixture, or M sets. They are divided by their sum.
            output_type (`str`, *optional*, defaults to `"pil"`): As for generation, except `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int` or `None`, *optional*): The class of all images, as for `encode`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple` with M images.

        Raises:
            ValueError: if weights are below 0, not finite or all 0, or their number is not that of the images.
        """
        check_output_type(output_type, self.vae.config.in_channels)
        latents = self.encode(image, class_labels)
        shares = torch.atleast_2d(torch.as_tensor(weights, dtype=torch.float64))
        check_shape("weights", shares, (len(shares), len(latents)))
        sums = shares.sum(1, keepdim=True)
        if not (shares.isfinite().all() and (shares >= 0).all() and (sums > 0).all()):
            raise ValueError(f"`weights` must be finite, at least 0 and not all 0, but are {shares.tolist()}.")
        mixed = (shares / sums).to(latents) @ latents.flatten(1)
        images = self.decode(mixed[:, :, None, None], known_labels(self, class_labels, len(mixed)))
        check_finite(images, "`image` and the decoder's weights")
        images = postprocess(images, self.image_processor, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
