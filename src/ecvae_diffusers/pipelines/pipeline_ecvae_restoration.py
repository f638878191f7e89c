# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot restoration of damaged or incomplete images with an energy-calibrated VAE."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging

from ..checks import LARGEST_VALUE, check_choice, check_number
from ..energy import compute_energy, energy_and_gradient, frozen
from ..models.autoencoder_ec import AutoencoderEC
from ..models.energy_model import EnergyModel
from ..operators.linear_operator import LinearOperator, as_operator
from ..operators.pixelwise import Inpainting
from ..restoration import Canvas, Likelihood, draw, neural_transport
from .inputs import (
    GRAY_MODES,
    ClassLabels,
    Generators,
    Images,
    as_list,
    check_finite,
    check_generator,
    check_shape,
    is_turned,
    known_labels,
    postprocess,
    prepare_mask,
    prepare_picture,
)
from .self_contained import SelfContained


logger = logging.get_logger(__name__)

# Entries of a generation pipeline's index.
GENERATION_ONLY = ("scheduler", "anomaly_threshold")
# Standard deviation of rounding to 8 bits, for values in [-1, 1].
ROUNDING_STD = 2 / (255 * math.sqrt(12))
# Spread of the initial latents around the encoding of A^+ y, in standard deviations of the prior.
START_SPREAD = 0.3
# Least damping of the inverse that makes the image to encode from the measurement: A^+ alone would amplify noise.
START_DAMPING = 1e-3
# The pipeline warns if answers leave [-1, 1] by more than LARGEST_EXCESS, or differ from a noisy measurement by more than
# LARGEST_MISFIT standard deviations of the noise (both root mean squares), or have a relative residual above LARGEST_RESIDUAL
# without noise.
LARGEST_EXCESS, LARGEST_MISFIT, LARGEST_RESIDUAL = 0.1, 3.0, 1e-5
# Upper bound of `reconstruction_variance`: the largest squared error of a pixel in [-1, 1].
LARGEST_VARIANCE = 4.0


@dataclass
class ECVAERestorationOutput(BaseOutput):
    """
    Output of the restoration pipeline: M answers to each of B measurements, grouped by measurement.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            B * M answers. Without noise, each agrees with its measurement. With noise, each is a draw whose residual is about as
            large as the noise.
        mean (as `images`): The mean of the answers to each measurement, B images, without the noise of the draws.
        std (`np.ndarray` of shape `(B, H, W, C)`, or `torch.Tensor` `(B, C, H, W)` for `output_type="pt"`):
            Standard deviation of each pixel given the measurement, for images in [0, 1]. It combines the spread of the answers and
            the error of the model at the right latents. A single answer has no spread, so set `num_restorations` to 8 or so if
            `std` matters.
        residual (`torch.Tensor` of shape `(B * M,)`):
            ||A x - y|| / ||y|| of each answer as a float image, before it is clamped to [-1, 1].
        residual_output (`torch.Tensor` of shape `(B * M,)`): The same for `images`, which are clamped and rounded.
        residual_mean (`torch.Tensor` of shape `(B,)`): The same for `mean` before it is clamped.
        energy (`torch.Tensor` of shape `(B * M,)`, *optional*): Energy of each answer, mean over tiles; low means like the training data.
        num_network_calls (`int`): Passes through the decoder, the encoder and the energy model per answer and tile.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    mean: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    std: np.ndarray | torch.Tensor
    residual: torch.Tensor
    residual_output: torch.Tensor
    residual_mean: torch.Tensor
    energy: torch.Tensor | None
    num_network_calls: int


class Interruption(Exception):
    """Raised to stop a search early. Its argument is the latents that the search has reached."""


class ECVAERestorationPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for zero-shot restoration: it solves inverse problems y = A x + n with a known linear A, such as inpainting,
    super-resolution, deblurring, colorization, denoising and compressed sensing. The model needs no training for these tasks.

    The pipeline loads the folder of an [`ECVAEPipeline`], or shares its weights (`ECVAERestorationPipeline.from_pipe`). Images
    larger than the model's size are restored in overlapping tiles.

    Args:
        vae ([`AutoencoderEC`]): The autoencoder whose decoder defines the prior: it maps latents from N(0, I) to images.
        energy_model ([`EnergyModel`], *optional*): Measures how similar an answer is to the training data.
    """

    model_cpu_offload_seq = "vae->energy_model"
    _optional_components = ["energy_model"]
    _callback_tensor_inputs = ["latents"]
    _interrupt = False
    num_timesteps = 0  # steps of the latest search: its `num_inference_steps`

    def __init__(self, vae: AutoencoderEC, energy_model: EnergyModel | None = None):
        super().__init__()
        self.register_modules(vae=vae, energy_model=energy_model)
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False)
        self.mask_processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # Folders of a generation pipeline also have these, and all folders of version 0.1 a scheduler.
        config_dict = {name: value for name, value in config_dict.items() if name not in GENERATION_ONLY}
        return super().extract_init_dict(config_dict, **kwargs)

    def register_to_config(self, **kwargs) -> None:
        # `from_pipe` also passes config entries that only a generation pipeline has.
        super().register_to_config(
            **{name: value for name, value in kwargs.items() if name.removeprefix("_") not in GENERATION_ONLY}
        )

    @property
    def interrupt(self) -> bool:
        """Whether the search stops after this step. Set `_interrupt` to stop it, from a callback for example."""
        return self._interrupt

    def prepare_measurement(
        self, image: Images, operator: Any, mask_image: Images | None
    ) -> tuple[LinearOperator, torch.Tensor, bool, tuple[int, int]]:
        """Return the operator, the measurement y of images in [-1, 1], whether it was a picture, and the image's height and width."""
        channels, size = self.vae.config.in_channels, self.vae.config.sample_size
        images = as_list(image, "image")
        is_picture = mask_image is not None or not isinstance(images[0], torch.Tensor)
        if is_picture:
            # Gray pictures stay gray, because an operator may measure the gray values of colour images.
            gray = mask_image is None and all(getattr(one, "mode", None) in GRAY_MODES for one in images)
            y = prepare_picture(image, self.image_processor, 1 if gray else channels)
        else:
            y = image if isinstance(image, torch.Tensor) else torch.stack(images)
            if not y.is_floating_point():
                raise ValueError(f"`image` as a tensor must be a floating-point measurement, but is {y.dtype}.")
        y = y.to(device=self._execution_device, dtype=torch.promote_types(y.dtype, torch.float32))
        if mask_image is not None:
            observed = prepare_mask(mask_image, self.mask_processor, y).to(y.device)
            if is_turned(image) and not is_turned(mask_image):
                logger.warning(
                    "`image` is turned upright by its EXIF data, but `mask_image` has none: check that it is upright."
                )
            # Repainted pixels do not count, even if their values are not finite.
            y = torch.where(observed, y, 0.0)
            y = y.expand(-1, channels, -1, -1) if y.shape[1] == 1 else y
            operator = Inpainting(observed)
        operator = as_operator(operator)
        back = operator.A_adjoint(y)
        if back.ndim != 4 or back.shape[1] != channels or min(back.shape[2:]) < size:
            allowed = f"of images with {channels} channel(s) and at least {size}x{size} px"
            raise ValueError(f"`image` must be a measurement {allowed}, but is one of {tuple(back.shape[1:])}.")
        measured = operator.A(torch.ones_like(back) if is_picture else back)
        check_shape("image", y, tuple(measured.shape))
        if not all((values.abs() <= LARGEST_VALUE).all() for values in (y, back, measured)):
            raise ValueError(f"`image`, and `operator` applied to it, must be finite and at most {LARGEST_VALUE:g}.")
        if is_picture:
            # A picture p measures an image in [0, 1]. The measurement of the same image in [-1, 1] is 2 p - A 1.
            y = 2 * y - measured
        return operator, y, is_picture, tuple(back.shape[2:])

    def prepare_latents(
        self,
        likelihood: Likelihood,
        canvas: Canvas,
        start: str,
        generator: Generators,
        latents: torch.Tensor | None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        count = len(likelihood.y) * likelihood.num_answers
        check_generator(generator, count)
        shape = (count * len(canvas), self.vae.config.latent_channels, 1, 1)
        if latents is not None:
            check_shape("latents", latents, shape)
            return latents.to(device=self._execution_device, dtype=torch.float32)
        noise = draw(shape, generator, likelihood.y)
        if start == "prior":
            return noise
        guess = likelihood.operator.A_dagger(likelihood.y, max(likelihood.damping, START_DAMPING)).float().clamp(-1, 1)
        classes = {} if labels is None else {"class_labels": labels.repeat_interleave(len(canvas))}
        encoded = self.vae.encode(canvas.split(guess).to(self.vae.dtype), **classes).latent_dist.mode().float()
        answers = encoded.unflatten(0, (-1, len(canvas))).repeat_interleave(likelihood.num_answers, dim=0)
        return answers.flatten(0, 1) + START_SPREAD * noise

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        operator: Any = None,
        mask_image: Images | None = None,
        noise_std: float | None = None,
        num_restorations: int = 1,
        num_inference_steps: int = 75,
        method: str = "langevin",
        energy_weight: float = 0.0,
        start: str = "encoding",
        tile_overlap: int | None = None,
        reconstruction_variance: float | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        class_labels: ClassLabels = None,
    ) -> ECVAERestorationOutput:
        r"""
        The call function to the pipeline for restoration.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                The measurement, never a clean image. With `mask_image` it is a picture: PIL, an array (B, H, W, C) or a tensor
                (B, C, H, W) in [0, 1]. With `operator`, PIL images and arrays are measurements of an image in [0, 1], and a
                tensor (B, ...) is the measurement y = A x of an image x in [-1, 1]. PIL images are read as in training: turned
                upright by their EXIF data, with transparent pixels over white.
            operator ([`~operators.LinearOperator`], an object with `A` and `A_adjoint`, or a pair of functions, *optional*):
                The linear operator A, called with batches of B.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*):
                Instead of `operator`: white (1) pixels of `image` are repainted, black (0) ones kept. One mask, or one per image.
                PIL masks may also have black and one other level or colour, such as labels 0 and 1, or painted strokes.
            noise_std (`float`, *optional*):
                The standard deviation sigma of the noise in each entry of y, for images in [-1, 1]. Divide noise in 8-bit levels
                by 127.5. Defaults to 0.0023 (rounding to 8 bits) for pictures, and to 0 for tensors with an `operator`.
            num_restorations (`int`, *optional*, defaults to 1):
                Number M of answers per measurement. They differ in what was not measured; `std` needs several.
            num_inference_steps (`int`, *optional*, defaults to 75):
                Number of search steps, each a forward and a backward pass of the decoder. One more pass decodes the answer.
            method (`str`, *optional*, defaults to `"langevin"`):
                `"langevin"` draws answers from the posterior, `"map"` finds the most likely latents near each start.
            energy_weight (`float`, *optional*, defaults to 0.0):
                Weight w of an answer's energy in the search, at least 0. A weight above 0 requires an `energy_model`.
            start (`str`, *optional*, defaults to `"encoding"`):
                `"encoding"` starts the latents near the encoding of A^+ y, `"prior"` at draws from N(0, I).
            tile_overlap (`int`, *optional*): Pixels that neighbouring tiles share. Defaults to a quarter of a tile.
            reconstruction_variance (`float`, *optional*):
                Mean squared error v of the model's reconstructions per pixel, for images in [-1, 1]. Defaults to the value that
                training measured. How the error spreads over frequencies always comes from training.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one per answer (B * M), to make restoration deterministic.
            latents (`torch.Tensor` of shape `(B * M * tiles, latent_channels, 1, 1)`, *optional*):
                Initial latents instead of `start`.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), both in [0, 1]. `None` means `"np"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`ECVAERestorationOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, step, {"latents": latents})` after each step. It may return new latents in a dict,
                or set `pipe._interrupt = True`: the answers are then made from the latents of that step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Tensors that the callback gets: `"latents"`.
            class_labels (`str`, `int`, `None`, a list of these or a `torch.Tensor`, *optional*):
                Names or numbers of the classes that the measurements show, one for all or one per measurement (B). `None` is the
                unknown class. A model without classes accepts only `None`.

        Examples:
            ```py
            >>> from PIL import Image
            >>> from ecvae_diffusers import ECVAERestorationPipeline

            >>> pipe = ECVAERestorationPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
            >>> output = pipe(Image.open("damaged.png"), mask_image=Image.open("mask.png"))  # doctest: +SKIP
            >>> output.images[0].save("restored.png")  # doctest: +SKIP
            ```

        Returns:
            [`ECVAERestorationOutput`] or `tuple`

        Raises:
            ValueError: if an argument is outside its range, or shapes do not fit.
        """
        config, size = self.vae.config, self.vae.config.sample_size
        overlap = size // 4 if tile_overlap is None else tile_overlap
        variance = config.reconstruction_variance if reconstruction_variance is None else reconstruction_variance
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, ("latents",))
        if (operator is None) == (mask_image is None):
            raise ValueError("Exactly one of `operator` and `mask_image` must be given.")
        if variance is None or (energy_weight and self.energy_model is None):
            missing = (
                "`reconstruction_variance` must be given"
                if variance is None
                else "`energy_weight` requires an `energy_model`"
            )
            raise ValueError(f"{missing}: the pipeline has none.")
        check_number("num_restorations", num_restorations, 1, whole=True)
        check_number("num_inference_steps", num_inference_steps, 1, whole=True)
        check_number("energy_weight", energy_weight, 0)
        check_number("tile_overlap", overlap, 0, size - 1, whole=True)
        check_number("reconstruction_variance", variance, 1e-12, LARGEST_VARIANCE)
        check_choice("method", method, ("langevin", "map"))
        check_choice("start", start, ("encoding", "prior"))
        check_choice("output_type", output_type, ("pil", "np", "pt", None))
        operator, y, is_picture, (height, width) = self.prepare_measurement(image, operator, mask_image)
        noise_std = (ROUNDING_STD if is_picture else 0.0) if noise_std is None else float(noise_std)
        check_number("noise_std", noise_std, 0, max(1.0, y.abs().max().item()))

        spectrum = config.get("reconstruction_spectrum")  # configs saved by earlier versions lack it
        likelihood = Likelihood(operator, y, noise_std, variance, num_restorations, spectrum)
        canvas = Canvas(height, width, size, overlap)
        labels, of_tiles = known_labels(self, class_labels, len(y)), None
        if labels is not None:
            of_tiles = labels.repeat_interleave(num_restorations * len(canvas))
        classes = {} if of_tiles is None else {"class_labels": of_tiles}
        calls = ["encoder"] if latents is None and start == "encoding" else []
        latents = self.prepare_latents(likelihood, canvas, start, generator, latents, labels)
        # Operators without a `solver_dtype`, such as functions, are called in the measurement's precision.
        dtype = y.dtype if operator.solver_dtype is None else torch.float32

        def decode(latents: torch.Tensor) -> torch.Tensor:
            calls.append("decoder")
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False, **classes)[0].to(dtype)

        def energy_gradient(tiles: torch.Tensor) -> torch.Tensor:
            calls.append("energy model")
            return energy_and_gradient(self.energy_model, tiles, of_tiles)[1]

        def on_step(step: int, latents: torch.Tensor) -> torch.Tensor:
            progress_bar.update()
            if callback_on_step_end is not None:
                tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                latents = (callback_on_step_end(self, step, step, tensors) or {}).pop("latents", latents)
            if self.interrupt:
                raise Interruption(latents)
            return latents

        self._interrupt, self.num_timesteps = False, num_inference_steps
        frozen_energy_model = frozen(self.energy_model) if energy_weight > 0 else nullcontext()
        with self.progress_bar(total=num_inference_steps) as progress_bar, frozen(self.vae), frozen_energy_model:
            try:
                latents = neural_transport(
                    decode, likelihood, canvas, latents, num_inference_steps, method,
                    energy_gradient if energy_weight > 0 else None, energy_weight, generator, on_step,
                )  # fmt: skip
            except Interruption as interruption:
                (latents,) = interruption.args
            decoded = canvas.join(decode(latents))

        check_finite(decoded, "`latents`, `callback_on_step_end`, `energy_weight` and the decoder's weights")
        center = likelihood.mean(decoded)
        answers = likelihood.sample(decoded, generator) if noise_std > 0 else center
        by_measurement = center.unflatten(0, (-1, num_restorations))
        mean, spread = by_measurement.mean(1), by_measurement.var(1, correction=min(1, num_restorations - 1))
        std = (spread + likelihood.variance(by_measurement[:, 0])).sqrt() / 2
        returned = answers.clamp(-1, 1)
        if output_type == "pil":
            returned = (returned * 127.5 + 127.5).round() / 127.5 - 1
        residual = likelihood.relative_residual(answers)
        self.check_answers(likelihood, center, residual.max().item())
        energy = None
        if self.energy_model is not None:
            calls.append("energy model")
            with frozen(self.energy_model):
                energies = compute_energy(self.energy_model, canvas.split(answers), of_tiles)
            energy = energies.unflatten(0, (-1, len(canvas))).mean(1)
        output = ECVAERestorationOutput(
            images=postprocess(answers, self.image_processor, output_type),
            mean=postprocess(mean, self.image_processor, output_type),
            std=std if output_type == "pt" else std.permute(0, 2, 3, 1).cpu().numpy(),
            residual=residual,
            residual_output=likelihood.relative_residual(returned),
            residual_mean=Likelihood(operator, y, noise_std, variance).relative_residual(mean),
            energy=energy,
            num_network_calls=len(calls),
        )
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()

    @staticmethod
    def check_answers(likelihood: Likelihood, center: torch.Tensor, residual: float) -> None:
        """Warn if answers leave [-1, 1], or disagree with the measurement."""
        excess = (center.abs() - 1).clamp(min=0).square().mean().sqrt().item()
        misfit, noise_std = likelihood.misfit(center).square().mean().sqrt().item(), likelihood.noise_std
        faults = [f"leave [-1, 1] by {excess:.2g}"] if excess > LARGEST_EXCESS else []
        if 0 < LARGEST_MISFIT * noise_std < misfit:
            faults.append(f"differ from `image` by {misfit:.2g}")
        if noise_std == 0 and residual > LARGEST_RESIDUAL:
            faults.append(f"agree with `image` only to {residual:.1g}")
        if faults:
            logger.warning(
                f"Answers {' and '.join(faults)}, but `noise_std` is {noise_std:.2g}. Possible causes: `image` has more noise, is "
                "outside the operator's range (missing pixels of `Inpainting` must be 0), or shows nothing like the training data."
            )
