# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The method of [`ECVAEPipeline`] that finds anomalies: images, and pixels of images, unlike the training data."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput

from ..anomaly import MAP, SCORE, combine, largest, local_mean, robust_reconstruction, spectral_error
from ..energy import energy_and_gradient, frozen
from .inputs import ClassLabels, Images, known_labels


# Images whose anomalies are found at a time.
DETECTED_AT_A_TIME = 256


@dataclass
class AnomalyOutput(BaseOutput):
    """
    Output of `ECVAEPipeline.anomaly`, in bits: n bits mean that a share of 2^-n of normal images, or pixels, is as unusual. Beyond what
    was measured, an exponential tail continues this scale.

    Args:
        score (`torch.Tensor` of shape `(B,)`): How unusual each image is.
        map (`torch.Tensor` of shape `(B, H, W)`): How unusual each pixel is.
        threshold (`float`, *optional*):
            Images with a higher score are anomalous. `None` if none was measured (`ecvae calibrate-threshold`).
    """

    score: torch.Tensor
    map: torch.Tensor
    threshold: float | None = None

    @property
    def is_anomalous(self) -> torch.Tensor:
        """Which images are anomalous, bool (B,). Raises `ValueError` if the model has no threshold."""
        if self.threshold is None:
            raise ValueError(
                "`is_anomalous` requires a threshold, but the model has none: run `ecvae calibrate-threshold`."
            )
        return self.score > self.threshold


class DetectionMixin:
    """Mixin for a pipeline with an autoencoder `vae` and, optionally, an `energy_model`."""

    vae: Any
    energy_model: Any
    config: Any
    maybe_free_model_hooks: Any
    prepare_image: Any

    @torch.no_grad()
    def anomaly(self, image: Images, class_labels: ClassLabels = None) -> AnomalyOutput:
        """
        Return how far images lie from what the model can explain (`anomaly.py` has the equations).

        The unit is bits among normal images, which `ecvae calibrate-threshold` measures and stores in the pipeline's config. Without
        this measurement, score and map hold the error of the reconstruction alone, in the model's own unit.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images of the model's size, as for `encode`.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes, as for `encode`. With a stored threshold, they must be `None`.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from ecvae_diffusers import ECVAEPipeline

            >>> pipe = ECVAEPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
            >>> found = pipe.anomaly(Image.open("part.png"))  # doctest: +SKIP
            >>> found.is_anomalous, found.map.argmax()  # doctest: +SKIP
            ```

        Returns:
            [`AnomalyOutput`]

        Raises:
            ValueError: if an image does not fit the model, or the model has no `reconstruction_variance`.
        """
        measured = self.config.get("anomaly_threshold")
        if measured is not None and ("energy" in measured["tails"]) != (self.energy_model is not None):
            raise ValueError(
                "`energy_model` must be there or not, as when `ecvae calibrate-threshold` measured the threshold."
            )
        if measured is not None and class_labels is not None:
            raise ValueError(
                f"`class_labels` must be None, since the threshold was measured without, but is {class_labels!r}."
            )
        parts = self.anomaly_parts(image, class_labels)
        tails = None if measured is None else measured["tails"]
        return AnomalyOutput(
            score=combine(parts, tails, SCORE),
            map=combine(parts, tails, MAP),
            threshold=None if measured is None else measured["threshold"],
        )

    @torch.no_grad()
    def anomaly_parts(self, image: Images, class_labels: ClassLabels = None) -> dict[str, torch.Tensor]:
        """
        Return the parts of scores, `residual`, `largest` and `energy` (B,), and of maps, `pixel_residual` and `pixel_energy` (B, H, W), in their
        own units. Without an energy model, there are no energies.
        """
        variance, spectrum = (self.vae.config.get(f"reconstruction_{name}") for name in ("variance", "spectrum"))
        if not variance:
            raise ValueError(f"`anomaly` requires a `reconstruction_variance` above 0, but the model's is {variance}.")
        images = self.prepare_image(image)
        labels = known_labels(self, class_labels, len(images))
        found = []
        for start in range(0, len(images), DETECTED_AT_A_TIME):
            batch, own = images[start : start + DETECTED_AT_A_TIME], None
            if labels is not None:
                own = labels[start : start + DETECTED_AT_A_TIME]
            classes = {} if own is None else {"class_labels": own}

            def reconstruct(some: torch.Tensor, classes: dict = classes) -> torch.Tensor:
                latents = self.vae.encode(some, **classes).latent_dist.mode()
                return self.vae.decode(latents, **classes).sample

            residual = batch - robust_reconstruction(reconstruct, batch, variance)
            parts = {"residual": spectral_error(residual, variance, spectrum)}
            parts["pixel_residual"] = local_mean(residual.square())[:, 0] / variance
            parts["largest"] = largest(parts["pixel_residual"])
            if self.energy_model is not None:
                with frozen(self.energy_model):
                    parts["energy"], gradient = energy_and_gradient(self.energy_model, batch.float(), own)
                parts["pixel_energy"] = local_mean(gradient.square())[:, 0]
            found.append(parts)
        self.maybe_free_model_hooks()
        return {name: torch.cat([parts[name].float() for parts in found]) for name in found[0]}
