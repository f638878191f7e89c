# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One-step image generation with an energy-calibrated VAE."""

import math
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor

from ..checks import check_number, height_and_width, label_ids, prepare_labels
from ..energy import compute_energy, energy_and_gradient, frozen
from ..models.autoencoder_ec import AutoencoderEC
from ..models.energy_model import EnergyModel
from ..posterior import PosteriorEnergy
from ..posterior import refine as refine_latents
from ..schedulers.scheduling_langevin import LangevinScheduler
from .detection import DetectionMixin
from .editing import EditingMixin
from .inputs import (
    ClassLabels,
    Generators,
    Images,
    check_finite,
    check_generator,
    check_output_type,
    check_shape,
    draw_classes,
    known_labels,
    postprocess,
    prepare_latents,
    prepare_picture,
)
from .self_contained import SelfContained


# On a CPU, batches are decoded in parts whose widest activations take this many bytes. Larger parts outgrow the cache and are
# slower.
CPU_PART_BYTES = 8 * 2**20


class ECVAEPipeline(SelfContained, EditingMixin, DetectionMixin, DiffusionPipeline):
    r"""
    Pipeline for image generation with an energy-calibrated VAE, optionally conditional on classes: one decoder pass per image.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        vae ([`AutoencoderEC`]): The autoencoder whose decoder maps latents from N(0, I) to images.
        energy_model ([`EnergyModel`], *optional*):
            The energy model that calibrated the VAE. Only `score`, `oversample` and `num_refinement_steps` require it.
        scheduler ([`LangevinScheduler`], *optional*):
            The chain of the calibration. Only `num_refinement_steps` requires it.
        anomaly_threshold (`dict`, *optional*):
            What is normal for the model, measured by `ecvae calibrate-threshold`. Only `anomaly` uses it.
    """

    model_cpu_offload_seq = "vae->energy_model"
    _optional_components = ["energy_model", "scheduler"]
    _interrupt = False
    num_timesteps = 0  # refinement steps of the latest call

    def __init__(
        self,
        vae: AutoencoderEC,
        energy_model: EnergyModel | None = None,
        scheduler: LangevinScheduler | None = None,
        anomaly_threshold: dict[str, Any] | None = None,
    ):
        super().__init__()
        # Only if it is there, so that folders of models without it stay as they are.
        if anomaly_threshold is not None:
            self.register_to_config(anomaly_threshold=anomaly_threshold)
        self.register_modules(vae=vae, energy_model=energy_model, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "ECVAEPipeline":
        """
        Create a pipeline that shares the components of another one. A restoration pipeline has no scheduler, so pass one:
        `from_pipe(restoration, scheduler=scheduler)`, or `None` if `num_refinement_steps` is not needed.
        """
        if "scheduler" not in kwargs and "scheduler" not in pipeline.components:
            raise ValueError(
                "`scheduler` must be given (a LangevinScheduler or None), because the other pipeline has none."
            )
        return super().from_pipe(pipeline, **kwargs)

    @property
    def interrupt(self) -> bool:
        """Whether refinement stops before its next step. Set `_interrupt` to stop it, from another thread for example."""
        return self._interrupt

    def refinement_steps(self, num_steps: int) -> Iterable[int]:
        self._interrupt, self.num_timesteps = False, num_steps
        return takewhile(lambda step: not self.interrupt, self.progress_bar(range(num_steps)))

    def latents_placement(self) -> tuple[torch.device, torch.dtype]:
        """
        Return the device and dtype of the decoder's latents. diffusers' properties account for hooks that move or cast them, but
        take as long as half a pass of a small decoder. They are used only if there are such hooks.
        """
        conv_in = self.vae.decoder.conv_in
        modules = (self.vae, self.vae.decoder, conv_in)  # where such hooks are placed
        if any(hasattr(module, hook) for module in modules for hook in ("_hf_hook", "_diffusers_hook")):
            return self._execution_device, self.vae.dtype
        return conv_in.weight.device, conv_in.weight.dtype

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Return the numbers of classes.

        Args:
            label (`str` or `list[str]`): Names of classes, from `pipe.vae.config.id2label`.

        Raises:
            ValueError: if the model has no class of that name.
        """
        return label_ids([label] if isinstance(label, str) else label, self.vae.config)

    def draw_labels(self, class_labels: Sequence[str | int | None], generator: Generators) -> torch.Tensor | None:
        """
        Return class numbers (B,). A label that is `None` is drawn by the class frequencies of the training data. Return `None` for a
        model without classes.
        """
        config = self.vae.config
        if (labels := prepare_labels(list(class_labels), len(class_labels), config)) is None:
            return None
        if None in labels:
            generators = generator if isinstance(generator, list) else [generator]
            share = len(labels) // len(generators)
            drawn = torch.cat([draw_classes(config, share, own) for own in generators]).tolist()
            labels = [other if label is None else label for label, other in zip(labels, drawn)]
        return torch.tensor(labels, device=self._execution_device)

    def decode(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Decode latents to images in [-1, 1]. On a CPU, large batches are decoded in parts."""
        config, part = self.vae.config, len(latents)
        if latents.device.type == "cpu":
            patch = config.get("patch_size", 1)  # configs saved by earlier versions lack it
            num_pixels = math.prod(height_and_width(config.sample_size)) // patch**2
            widest = config.block_out_channels[0] * num_pixels * latents.element_size()
            part = max(1, CPU_PART_BYTES // widest)
        classes = [{}] * len(latents) if labels is None else [{"class_labels": some} for some in labels.split(part)]
        parts = zip(latents.split(part), classes)
        images = [self.vae.decode(some, return_dict=False, **own)[0] for some, own in parts]
        return images[0] if len(images) == 1 else torch.cat(images)

    def prepare_image(self, image: Images) -> torch.Tensor:
        """
        Convert PIL images of any mode, arrays (B, H, W, C) or tensors (B, C, H, W) in [0, 1] to a tensor in [-1, 1]. Raises
        `ValueError` if the size or channels do not fit the model, or a value is out of range or not finite.
        """
        size, channels = height_and_width(self.vae.config.sample_size), self.vae.config.in_channels
        images = prepare_picture(image, self.image_processor, channels)
        check_shape("image", images, (max(1, len(images)), channels, *size))
        if not images.isfinite().all():
            raise ValueError("`image` must have finite values.")
        images = images.to(device=self._execution_device, dtype=self.vae.dtype).clamp(0, 1)
        return self.image_processor.normalize(images)

    def refine(
        self,
        sample: torch.Tensor,
        num_refinement_steps: int,
        generator: Generators,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Run the calibration chain on decoded images, with the energy model frozen.

        Args:
            sample (`torch.Tensor` of shape `(B, C, H, W)`): Images in [-1, 1].
            num_refinement_steps (`int`): Steps of the chain.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): As for generation.
            labels (`torch.Tensor` of shape `(B,)`, *optional*): Class numbers.

        Returns:
            `torch.Tensor` of the shape and dtype of `sample`.
        """
        dtype = sample.dtype
        initial_sample = sample = sample.float()
        # A copy, because the pipeline may share its scheduler with a calibrator that takes another number of steps.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_refinement_steps)
        with frozen(self.energy_model):
            for timestep in self.refinement_steps(num_refinement_steps):
                gradient = energy_and_gradient(self.energy_model, sample, labels)[1]
                sample = scheduler.step(gradient, timestep, sample, initial_sample, generator).prev_sample
        return sample.to(dtype)

    def energies(self, sample: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the energies (B,), float32, of images (B, C, H, W) in [-1, 1], as `score` does."""
        with frozen(self.energy_model):
            return compute_energy(self.energy_model, sample.clamp(-1, 1).to(self.energy_model.dtype), labels)

    def keep_lowest(self, sample: torch.Tensor, oversample: int, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Keep the image of lowest energy of each `oversample` ones in a row: (B * oversample, C, H, W) in [-1, 1] to (B, C, H, W)."""
        energies = self.energies(sample, labels).view(-1, oversample)
        return sample.unflatten(0, energies.shape)[torch.arange(len(energies)), energies.argmin(1)]

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        temperature: float = 1.0,
        num_refinement_steps: int = 0,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        oversample: int = 1,
    ) -> ImagePipelineOutput:
        r"""
        The call function to the pipeline for generation. It runs one decoder pass, and by default no other network.

        Args:
            batch_size (`int`, *optional*, defaults to 1): The number of images to generate.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one per image, to make generation deterministic.
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, 1, 1)`, *optional*):
                Latents to decode as they are, instead of draws from N(0, I).
            temperature (`float`, *optional*, defaults to 1.0):
                Standard deviation of the drawn latents, from 0 to 100. Below 1, images are more typical and less varied.
            num_refinement_steps (`int`, *optional*, defaults to 0):
                Number of Langevin steps on the energy model after decoding. A calibrated decoder does not need them.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`PIL.Image.Image`), `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), both in [0, 1], or
                `"latent"`, the latents without decoding. `None` means `"np"`. `"pil"` exists for 1, 3 or 4 channels.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a plain tuple of the images.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The classes to generate, as names or numbers: one for all images or one per image. `None` draws a class by its
                frequency in the training data. The number `vae.config.num_class_embeds` is the unknown class. A model without
                classes accepts only `None`.
            oversample (`int`, *optional*, defaults to 1):
                Number of images to draw for each one that is returned, which is the one of lowest energy. Recall falls, since kinds of
                images with high energies are left out. Precision rises if the energy model can still tell samples from data. It takes
                as many passes of the decoder and of the energy model.

        Examples:
            ```py
            >>> import torch
            >>> from ecvae_diffusers import ECVAEPipeline

            >>> pipe = ECVAEPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
            >>> images = pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images  # doctest: +SKIP
            >>> images[0].save("sample.png")  # doctest: +SKIP
            ```

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`

        Raises:
            ValueError: if an argument is outside its range.
        """
        check_output_type(output_type, self.vae.config.in_channels, "latent")
        check_number("num_refinement_steps", num_refinement_steps, 0, whole=True)
        if num_refinement_steps and (output_type == "latent" or self.energy_model is None or self.scheduler is None):
            raise ValueError("`num_refinement_steps` requires an `energy_model`, a `scheduler` and decoded images.")
        check_number("oversample", oversample, 1, whole=True)
        if oversample > 1 and (latents is not None or output_type == "latent" or self.energy_model is None):
            raise ValueError(
                f"`oversample` must be 1 with `latents`, for latents, or without an `energy_model`, but is {oversample}."
            )
        if isinstance(class_labels, (list, tuple, torch.Tensor)) and batch_size == 1 and latents is None:
            batch_size = len(class_labels)
        drawn_by = [one for one in generator for _ in range(oversample)] if isinstance(generator, list) else generator
        num_latents, placement = self.vae.config.latent_channels, self.latents_placement()
        latents = prepare_latents(batch_size * oversample, num_latents, temperature, drawn_by, latents, *placement)
        asked_for = prepare_labels(class_labels, len(latents) // oversample, self.vae.config)
        if output_type == "latent":
            image = latents
        else:
            labels = None if asked_for is None else self.draw_labels(asked_for, generator)
            if oversample == 1:
                image = self.decode(latents, labels)
            else:
                repeated = None if labels is None else labels.repeat_interleave(oversample)
                image = self.keep_lowest(self.decode(latents, repeated), oversample, repeated)
            check_finite(image, "`temperature`, `latents` and the decoder's weights")
            if num_refinement_steps > 0:
                image = self.refine(image, num_refinement_steps, generator, labels)
            image = postprocess(image, self.image_processor, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    @torch.no_grad()
    def reconstruct(
        self,
        image: Images,
        sample_posterior: bool = False,
        num_refinement_steps: int = 0,
        variance: float = 0.5,
        generator: Generators = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Encode images and decode them again.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                Images of the model's size: arrays (B, H, W, C) and tensors (B, C, H, W) in [0, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether to decode a draw from the posterior instead of its mean.
            num_refinement_steps (`int`, *optional*, defaults to 0):
                Number of steps on the latents (in generation: on the image). They lead towards the true posterior,
                -log p(z|x) = |x - G(z)|^2 / (2 s^2) + |z|^2 / 2 + constant. A draw (`sample_posterior`) takes Langevin steps, the
                mean descends to the most likely latents. Each step takes a forward and a backward pass of the decoder.
            variance (`float`, *optional*, defaults to 0.5):
                s^2 per pixel, at least 1e-12: half of the KL weight that the autoencoder was trained with.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one per image, to make the draws deterministic.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for generation; `"latent"` returns the encoding, of shape `(batch_size, latent_channels, 1, 1)`.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes, as for generation. `None` is the unknown class.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`

        Raises:
            ValueError: if `image` does not fit the model, or another argument is outside its range.
        """
        check_output_type(output_type, self.vae.config.in_channels, "latent")
        check_number("num_refinement_steps", num_refinement_steps, 0, whole=True)
        check_number("variance", variance, 1e-12)
        images = self.prepare_image(image)
        check_generator(generator, len(images))
        labels = known_labels(self, class_labels, len(images))
        classes = {} if labels is None else {"class_labels": labels}
        posterior = self.vae.encode(images, **classes).latent_dist
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        if num_refinement_steps > 0:
            dtype, steps = latents.dtype, self.refinement_steps(num_refinement_steps)
            energy = PosteriorEnergy(
                lambda z: self.vae.decode(z.to(dtype), **classes).sample, images, posterior, variance
            )
            with frozen(self.vae):
                whitened = refine_latents(energy, energy.whiten(latents.float()), steps, sample_posterior, generator)
            latents = energy.unwhiten(whitened).to(dtype)
        return self(latents=latents, output_type=output_type, return_dict=return_dict, class_labels=labels)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: Images,
        image_b: Images,
        num_steps: int = 8,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
    ) -> ImagePipelineOutput:
        """
        Decode latents on the straight line between the encodings of two images.

        Args:
            image_a, image_b (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images each, as for `reconstruct`. One image is paired with all images of the other argument.
            num_steps (`int`, *optional*, defaults to 8):
                Number of images from a to b, including the reconstructions of both; at least 2.
            output_type (`str`, *optional*, defaults to `"pil"`): As for generation.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The classes of both images of each pair, as for `reconstruct`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple` with B * `num_steps` images, pair by pair.

        Raises:
            ValueError: if there are fewer than 2 steps, or an image does not fit the model.
        """
        check_output_type(output_type, self.vae.config.in_channels, "latent")
        check_number("num_steps", num_steps, 2, whole=True)
        ends = [self.encode(image, class_labels) for image in (image_a, image_b)]
        weights = torch.linspace(0, 1, num_steps, device=ends[0].device, dtype=ends[0].dtype).view(1, -1, 1, 1, 1)
        latents = torch.lerp(ends[0].unsqueeze(1), ends[1].unsqueeze(1), weights).flatten(0, 1)
        labels = known_labels(self, class_labels, len(latents) // num_steps)
        labels = None if labels is None else labels.repeat_interleave(num_steps)
        return self(latents=latents, output_type=output_type, return_dict=return_dict, class_labels=labels)

    @torch.no_grad()
    def score(self, image: Images, class_labels: ClassLabels = None) -> torch.Tensor:
        """
        Return the energies of images. Low energy means like the training data. Only differences between energies are meaningful.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images of the model's size, as for `reconstruct`.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                The images' classes, as for `reconstruct`.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32.

        Raises:
            ValueError: if the pipeline has no energy model, or an image does not fit the model.
        """
        if self.energy_model is None:
            raise ValueError("`score` requires an `energy_model`, but the pipeline has none.")
        sample = self.prepare_image(image)
        energy = self.energies(sample, known_labels(self, class_labels, len(sample)))
        self.maybe_free_model_hooks()
        return energy
