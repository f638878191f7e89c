# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One-step image generation with an energy-calibrated VAE."""

from collections.abc import Iterable
from itertools import takewhile
from numbers import Integral, Real

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from ..energy import compute_energy, energy_and_gradient, frozen
from ..models.autoencoder_ec import AutoencoderEC
from ..models.energy_model import EnergyModel
from ..posterior import PosteriorEnergy, refine
from ..schedulers.scheduling_langevin import LangevinScheduler
from .inputs import prepare_picture
from .sampling_inputs import check_finite, check_generator, check_sampling
from .self_contained import SelfContained


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from ecvae_diffusers import ECVAEPipeline

        >>> pipe = ECVAEPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
        >>> images = pipe(batch_size=16, generator=torch.Generator().manual_seed(0)).images  # doctest: +SKIP
        >>> images[0].save("sample.png")  # doctest: +SKIP
        ```
"""

PipelineImageInput = (
    PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray] | list[torch.Tensor]
)

# On a CPU so many bytes of the decoder's widest activations are computed at a time: beyond, they outgrow the cache, and
# each buffer is fetched from the system anew, which made batches of 256 up to 2.5 times slower.
CPU_PART_BYTES = 8 * 2**20


class ECVAEPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for unconditional image generation with an energy-calibrated VAE: one decoder pass an image.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        vae ([`AutoencoderEC`]):
            The autoencoder whose decoder makes images of latents drawn from N(0, I).
        energy_model ([`EnergyModel`], *optional*):
            The energy model that calibrated it. Needed by `score` and `num_refinement_steps` only.
        scheduler ([`LangevinScheduler`], *optional*):
            The chain it was calibrated with. Needed by `num_refinement_steps` only.
    """

    model_cpu_offload_seq = "vae->energy_model"
    _optional_components = ["energy_model", "scheduler"]
    _interrupt, _num_timesteps = False, 0

    def __init__(
        self,
        vae: AutoencoderEC,
        energy_model: EnergyModel | None = None,
        scheduler: LangevinScheduler | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, energy_model=energy_model, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    def check_inputs(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        temperature: float,
        num_refinement_steps: int,
        output_type: str | None,
    ) -> None:
        num_latents = self.vae.config.latent_channels
        check_sampling(batch_size, generator, latents, num_latents, temperature, output_type)
        if not isinstance(num_refinement_steps, Integral) or num_refinement_steps < 0:
            raise ValueError(
                f"`num_refinement_steps` must be an integer of at least 0, but is {num_refinement_steps!r}."
            )
        if num_refinement_steps > 0 and (self.energy_model is None or self.scheduler is None):
            raise ValueError(
                "`num_refinement_steps` above 0 needs an energy model and a scheduler, and this pipeline has not both. "
                "Load it without `energy_model=None`, or pass them to the constructor."
            )
        if output_type == "latent" and num_refinement_steps > 0:
            raise ValueError("`num_refinement_steps` refines images, so `output_type` can't be 'latent' with it.")

    @property
    def num_timesteps(self) -> int:
        """Number of refinement steps that were last asked for."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether refinement ends before its next step: `_interrupt` may be set meanwhile, by another thread for example."""
        return self._interrupt

    def refinement_steps(self, num_steps: int) -> Iterable[int]:
        self._interrupt, self._num_timesteps = False, num_steps
        return takewhile(lambda step: not self.interrupt, self.progress_bar(range(num_steps)))

    def latents_placement(self) -> tuple[torch.device, torch.dtype]:
        """
        Where and as what the decoder takes its latents. Both are those of the layer that reads them, unless a hook
        (offloading, layerwise casting) moves or casts it. diffusers' properties know the hooks, but walk through all
        modules five times to find that there is none, which takes as long as half a pass of a small decoder.
        """
        conv_in = self.vae.decoder.conv_in
        # A hook that reaches this layer sits on it or on a module around it.
        modules = (self.vae, self.vae.decoder, conv_in)
        if any(hasattr(module, hook) for module in modules for hook in ("_hf_hook", "_diffusers_hook")):
            return self._execution_device, self.vae.dtype
        return conv_in.weight.device, conv_in.weight.dtype

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1]; on a CPU a large batch in parts."""
        part = len(latents)
        if latents.device.type == "cpu":
            config = self.vae.config
            widest = config.block_out_channels[0] * config.sample_size**2 * latents.element_size()
            part = max(1, CPU_PART_BYTES // widest)
        if part >= len(latents):
            return self.vae.decode(latents, return_dict=False)[0]
        return torch.cat([self.vae.decode(some, return_dict=False)[0] for some in latents.split(part)])

    def prepare_latents(
        self,
        batch_size: int,
        temperature: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        device, dtype = self.latents_placement()
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        shape = (batch_size, self.vae.config.latent_channels, 1, 1)
        return temperature * randn_tensor(shape, generator=generator, device=device, dtype=dtype)

    def prepare_image(self, image: PipelineImageInput) -> torch.Tensor:
        """
        Read and check images, and bring them to the model's range: PIL images of any mode, arrays (B, H, W, C) or tensors
        (B, C, H, W) in [0, 1] become a tensor in [-1, 1].

        Raises:
            ValueError: if size, channels or range are not the model's, or a value is not finite.
        """
        size, channels = self.vae.config.sample_size, self.vae.config.in_channels
        images = prepare_picture(image, self.image_processor, channels)
        if images.shape[0] == 0 or tuple(images.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"`image` must have {channels} channel(s) and {size}x{size} px, but has shape {tuple(images.shape)} "
                "(batch, channels, height, width)."
            )
        if not torch.isfinite(images).all():
            raise ValueError("`image` holds values that are not finite.")
        images = images.to(device=self._execution_device, dtype=self.vae.dtype).clamp(0, 1)
        return self.image_processor.normalize(images)

    def refine(
        self,
        sample: torch.Tensor,
        num_refinement_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Run the calibrating chain on images in [-1, 1]: the correction that training teaches the decoder."""
        dtype = sample.dtype
        initial_sample = sample = sample.float()
        # A scheduler of its own: the pipeline's may be that of a calibrator, whose chain has another length.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(num_refinement_steps)
        with frozen(self.energy_model):
            for timestep in self.refinement_steps(num_refinement_steps):
                gradient = energy_and_gradient(self.energy_model, sample)[1]
                sample = scheduler.step(gradient, timestep, sample, initial_sample, generator).prev_sample
        return sample.to(dtype)

    def postprocess(
        self, sample: torch.Tensor, output_type: str | None
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Images in [-1, 1] to `output_type`. At once: asked to denormalize, the processor goes image by image."""
        sample = self.image_processor.denormalize(sample)
        return self.image_processor.postprocess(sample, output_type=output_type or "np")

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        temperature: float = 1.0,
        num_refinement_steps: int = 0,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation: one decoder pass, and no other network.

        Args:
            batch_size (`int`, *optional*, defaults to 1):
                The number of images to generate.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one an image, to make generation deterministic.
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, 1, 1)`, *optional*):
                Latents to decode as they are, instead of draws from N(0, I).
            temperature (`float`, *optional*, defaults to 1.0):
                Standard deviation of the drawn latents, from 0 to 100. Below 1, images are more typical and less varied.
            num_refinement_steps (`int`, *optional*, defaults to 0):
                Number of Langevin steps on the energy model after decoding. For comparison: calibration makes the
                decoder do without.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`PIL.Image.Image`), `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), both in [0, 1], or
                `"latent"`, the latents themselves, not decoded. `None` is `"np"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`~pipelines.ImagePipelineOutput`] instead of a plain tuple.

        Examples:

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`:
                If `return_dict` is `True`, [`~pipelines.ImagePipelineOutput`] is returned, otherwise a `tuple` is
                returned where the first element is a list with the generated images.

        Raises:
            ValueError: if an argument is outside what is listed above.
        """
        self.check_inputs(batch_size, generator, latents, temperature, num_refinement_steps, output_type)
        latents = self.prepare_latents(batch_size, temperature, generator, latents)
        if output_type == "latent":
            image = latents
        else:
            image = self.decode(latents)
            check_finite(image, temperature)
            if num_refinement_steps > 0:
                image = self.refine(image, num_refinement_steps, generator)
            image = self.postprocess(image, output_type)
        self.maybe_free_model_hooks()

        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)

    @torch.no_grad()
    def reconstruct(
        self,
        image: PipelineImageInput,
        sample_posterior: bool = False,
        num_refinement_steps: int = 0,
        variance: float = 0.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Encode images and decode them again.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                Images of the model's size: arrays (B, H, W, C) and tensors (B, C, H, W) in [0, 1].
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether to decode a draw from the posterior instead of its mean.
            num_refinement_steps (`int`, *optional*, defaults to 0):
                Number of steps, each a decoder pass there and back, by which the latents are brought nearer to the true
                posterior, -log p(z|x) = |x - G(z)|^2 / (2 s^2) + |z|^2 / 2 but for a constant: of Langevin dynamics from a
                draw, of gradient descent (towards the likeliest latent) from the mean.
            variance (`float`, *optional*, defaults to 0.5):
                s^2 of a pixel, above 0: half of the KL weight that the autoencoder was trained with.
            generator (`torch.Generator` or a list of one an image, *optional*): Makes the draws deterministic.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As for generation; `"latent"` gives the encoding, shape `(batch_size, latent_channels, 1, 1)`.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`

        Raises:
            ValueError: if size, channels or range of `image` are not the model's, a value is not finite, or the number of
                steps or the variance is out of its range.
        """
        self.check_inputs(1, None, None, 1.0, 0, output_type)
        if not isinstance(num_refinement_steps, Integral) or num_refinement_steps < 0:
            raise ValueError(
                f"`num_refinement_steps` must be an integer of at least 0, but is {num_refinement_steps!r}."
            )
        if not isinstance(variance, Real) or not 0 < variance < float("inf"):
            raise ValueError(f"`variance` must be a finite number above 0, but is {variance!r}.")
        images = self.prepare_image(image)
        check_generator(generator, images.shape[0])
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        if num_refinement_steps > 0:
            energy = PosteriorEnergy(
                lambda z: self.vae.decode(z.to(latents.dtype)).sample, images, posterior, variance
            )
            steps = self.refinement_steps(num_refinement_steps)
            with frozen(self.vae):
                whitened = refine(energy, energy.whiten(latents.float()), steps, sample_posterior, generator)
            latents = energy.unwhiten(whitened).to(latents.dtype)
        return self(latents=latents, output_type=output_type, return_dict=return_dict)

    @torch.no_grad()
    def interpolate(
        self,
        image_a: PipelineImageInput,
        image_b: PipelineImageInput,
        num_steps: int = 8,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """
        Decode the straight line between the encodings of two images.

        Args:
            image_a, image_b (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images each, as for `reconstruct`.
            num_steps (`int`, *optional*, defaults to 8):
                Number of images from a to b, both ends' reconstructions included; at least 2.
            output_type (`str`, *optional*, defaults to `"pil"`): As for generation.
            return_dict (`bool`, *optional*, defaults to `True`): As for generation.

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple` with B * `num_steps` images, pair by pair.

        Raises:
            ValueError: if there are fewer than 2 steps, the numbers of images differ, or an image does not fit.
        """
        if not isinstance(num_steps, Integral) or num_steps < 2:
            raise ValueError(f"`num_steps` must be an integer of at least 2, but is {num_steps!r}.")
        ends = [self.reconstruct(image, output_type="latent").images for image in (image_a, image_b)]
        if ends[0].shape != ends[1].shape:
            raise ValueError(f"`image_a` holds {ends[0].shape[0]} image(s) and `image_b` {ends[1].shape[0]}.")
        weights = torch.linspace(0, 1, num_steps, device=ends[0].device, dtype=ends[0].dtype).view(1, -1, 1, 1, 1)
        latents = torch.lerp(ends[0].unsqueeze(1), ends[1].unsqueeze(1), weights).flatten(0, 1)
        return self(latents=latents, output_type=output_type, return_dict=return_dict)

    @torch.no_grad()
    def score(self, image: PipelineImageInput) -> torch.Tensor:
        """
        The energy of images: low = like the training data. Only differences mean anything.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                B images of the model's size, as for `reconstruct`.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32.

        Raises:
            ValueError: if the pipeline has no energy model, or an image does not fit.
        """
        if self.energy_model is None:
            raise ValueError("`score` needs an energy model, and this pipeline was loaded or made without one.")
        sample = self.prepare_image(image).to(self.energy_model.dtype)
        with frozen(self.energy_model):
            energy = compute_energy(self.energy_model, sample)
        self.maybe_free_model_hooks()
        return energy
