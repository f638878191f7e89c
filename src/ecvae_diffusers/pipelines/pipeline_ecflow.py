# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""One-step image generation with an energy-calibrated normalizing flow."""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor

from ..models.energy_model import EnergyModel
from ..models.flow_ec import FlowEC
from ..schedulers.scheduling_langevin import LangevinScheduler
from .inputs import Generators, check_finite, check_output_type, postprocess, prepare_latents
from .self_contained import SelfContained


class ECFlowPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for unconditional image generation with an energy-calibrated normalizing flow: one pass of its inverse per image.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Args:
        flow ([`FlowEC`]): The flow whose inverse maps latents from N(0, I) to images.
        energy_model ([`EnergyModel`], *optional*): The energy model that calibrated the flow. Sampling does not need it.
        scheduler ([`LangevinScheduler`], *optional*): The chain of the calibration. Sampling does not need it.
    """

    model_cpu_offload_seq = "flow->energy_model"
    _optional_components = ["energy_model", "scheduler"]
    # A single pass can't be interrupted.
    num_timesteps, interrupt = 1, False

    def __init__(
        self,
        flow: FlowEC,
        energy_model: EnergyModel | None = None,
        scheduler: LangevinScheduler | None = None,
    ):
        super().__init__()
        self.register_modules(flow=flow, energy_model=energy_model, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        temperature: float = 1.0,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput:
        r"""
        The call function to the pipeline for generation. It runs one pass of the flow's inverse and no other network.

        Args:
            batch_size (`int`, *optional*, defaults to 1): The number of images to generate.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one per image, to make generation deterministic.
            latents (`torch.Tensor` of shape `(batch_size, num_latents, 1, 1)`, *optional*):
                Latents to map to images as they are, instead of draws from N(0, I).
            temperature (`float`, *optional*, defaults to 1.0):
                Standard deviation of the drawn latents, from 0 to 100. Below 1, images are more typical and less varied.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`PIL.Image.Image`), `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), clamped to [0, 1]; or `"latent"`, the
                latents without decoding. `None` means `"np"`. `"pil"` exists for 1, 3 or 4 channels.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~pipelines.ImagePipelineOutput`] instead of a plain tuple of the images.

        Examples:
            ```py
            >>> from ecvae_diffusers import ECFlowPipeline

            >>> pipe = ECFlowPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
            >>> images = pipe(batch_size=16, temperature=0.8).images  # doctest: +SKIP
            >>> images[0].save("sample.png")  # doctest: +SKIP
            ```

        Returns:
            [`~pipelines.ImagePipelineOutput`] or `tuple`

        Raises:
            ValueError: if an argument is outside its range.
        """
        check_output_type(output_type, self.flow.config.in_channels, "latent")
        image = prepare_latents(
            batch_size, self.flow.num_latents, temperature, generator, latents, self._execution_device, self.flow.dtype
        )
        if output_type != "latent":
            sample = self.flow.decode(image)
            check_finite(sample, "`temperature`, `latents` and the flow's weights")
            image = postprocess(sample, self.image_processor, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)
