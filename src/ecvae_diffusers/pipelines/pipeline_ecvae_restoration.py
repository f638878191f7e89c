# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot restoration of damaged or incomplete images with an energy-calibrated VAE."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput, logging, replace_example_docstring

from ..energy import compute_energy, energy_and_gradient, frozen
from ..models.autoencoder_ec import AutoencoderEC
from ..models.energy_model import EnergyModel
from ..operators.linear_operator import LinearOperator, as_operator
from ..operators.pixelwise import Inpainting
from ..restoration import Canvas, Likelihood, draw, neural_transport
from ..schedulers.scheduling_langevin import LangevinScheduler
from .inputs import (
    GRAY_MODES,
    Images,
    as_list,
    check_turned_together,
    prepare_mask,
    prepare_measurement,
    prepare_picture,
)
from .sampling_inputs import check_generator
from .self_contained import SelfContained


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from PIL import Image
        >>> from ecvae_diffusers import ECVAERestorationPipeline

        >>> pipe = ECVAERestorationPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
        >>> output = pipe(Image.open("damaged.png"), mask_image=Image.open("mask.png"))  # doctest: +SKIP
        >>> output.images[0].save("restored.png")  # doctest: +SKIP
        ```
"""

logger = logging.get_logger(__name__)

# Standard deviation of rounding to 8 bits, of values in [-1, 1].
ROUNDING_STD = 2 / (255 * math.sqrt(12))
# Spread, in standard deviations of the prior, of the answers' starts around the encoding of A^+ y.
START_SPREAD = 0.3
# Root mean square by which answers may exceed the range of images before a warning.
LARGEST_EXCESS = 0.1
# In standard deviations of the noise: root mean square of the difference between a measurement and answers before a warning.
LARGEST_MISFIT = 3.0
# Relative residuals of answers to measurements without noise are below this, or a warning says that they are not.
LARGEST_RESIDUAL = 1e-5
# Of `noise_std`, `energy_weight` and measurements: their squares are still numbers in float32.
LARGEST_VALUE = 1e12
# Mean squared error per pixel of images in [-1, 1].
LARGEST_VARIANCE = 4.0
# What is asked of latents is damped at least so much before it is encoded: without, noise would be blown up.
START_DAMPING = 1e-3


@dataclass
class ECVAERestorationOutput(BaseOutput):
    """
    Output of restoration: M answers to each of B measurements, measurement-major (the answers to one stand together).

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            B * M answers. Without noise each agrees with its measurement; with noise it is a draw, whose residual is that of
            the noise.
        mean (as `images`): The mean of the answers to each measurement, B images, without the draws' noise.
        std (`np.ndarray` of shape `(B, H, W, C)`, or `torch.Tensor` `(B, C, H, W)` for `output_type="pt"`):
            Standard deviation of each pixel given the measurement, in the unit of images in [0, 1]: the spread of the answers,
            and the error that the model makes even where it knows the latents. Of a single answer there is no spread: ask for
            several (8, say) where `std` matters.
        residual (`torch.Tensor` of shape `(B * M,)`):
            ||A x - y|| / ||y|| of each answer as a float image, before it is clamped to the range of images.
        residual_output (`torch.Tensor` of shape `(B * M,)`): The same of what `images` holds, clamped and rounded.
        residual_mean (`torch.Tensor` of shape `(B,)`): As `residual`, of `mean` before it is clamped.
        energy (`torch.Tensor` of shape `(B * M,)`, *optional*): The energy model's, mean over tiles; low = like training data.
        num_network_calls (`int`): Passes through a network, for each answer (and tile): decoder, encoder, energy model.
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
    """Ends a search early, with the latents that it has come to."""


class ECVAERestorationPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for inverse problems y = A x + n with a known linear A: inpainting, super-resolution, deblurring, colorization,
    denoising, compressed sensing and any other operator, by a model that was never trained for the task.

    Loads the folder of an [`ECVAEPipeline`], or shares its weights (`ECVAERestorationPipeline.from_pipe`). Larger images than
    the model's are restored in overlapping tiles.

    Parameters:
        vae ([`AutoencoderEC`]): Its decoder is the prior: images of latents from N(0, I).
        energy_model ([`EnergyModel`], *optional*): Tells how much like the training data an answer is.
        scheduler ([`LangevinScheduler`], *optional*): Not used; kept, so that the folder stays whole.
    """

    model_cpu_offload_seq = "vae->energy_model"
    _optional_components = ["energy_model", "scheduler"]
    _callback_tensor_inputs = ["latents"]
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
        self.mask_processor = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_grayscale=True)

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the latest search, which are its `num_inference_steps`."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the search ends after its present step: `_interrupt` may be set meanwhile, by a callback for example."""
        return self._interrupt

    def check_inputs(
        self,
        operator: Any,
        mask_image: Images | None,
        noise_std: float | None,
        num_restorations: int,
        num_inference_steps: int,
        method: str,
        energy_weight: float,
        start: str,
        output_type: str | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        if (operator is None) == (mask_image is None):
            raise ValueError(
                "What was measured must be given by either `operator` or `mask_image`, but "
                + ("neither was given." if operator is None else "both were given.")
            )
        for name, value in (("num_restorations", num_restorations), ("num_inference_steps", num_inference_steps)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, but is {value!r}.")
        for name, value in (("noise_std", noise_std), ("energy_weight", energy_weight)):
            if name == "noise_std" and value is None:
                continue
            if not isinstance(value, Real) or not 0 <= value <= LARGEST_VALUE:
                raise ValueError(f"`{name}` must be a number from 0 to {LARGEST_VALUE:g}, but is {value!r}.")
        if energy_weight > 0 and self.energy_model is None:
            raise ValueError("`energy_weight` above 0 needs an energy model, and this pipeline has none.")
        for name, value, allowed in (
            ("method", method, ("langevin", "map")),
            ("start", start, ("encoding", "prior")),
            ("output_type", output_type, ("pil", "np", "pt", None)),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, but is {value!r}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be of {self._callback_tensor_inputs}, but holds {unknown}."
            )

    def model_variance(self, reconstruction_variance: float | None) -> float:
        variance = (
            self.vae.config.reconstruction_variance if reconstruction_variance is None else reconstruction_variance
        )
        if variance is None:
            raise ValueError(
                "`reconstruction_variance` is not in the autoencoder's config, where training writes it: give the mean "
                "squared error of its reconstructions, a pixel of images in [-1, 1]."
            )
        if not isinstance(variance, Real) or not 0 < variance <= LARGEST_VARIANCE:
            raise ValueError(
                f"`reconstruction_variance` must be above 0 and at most {LARGEST_VARIANCE:g}, of images in [-1, 1], but is {variance!r}."
            )
        return float(variance)

    def prepare_measurement(
        self, image: Images, operator: Any, mask_image: Images | None, height: int | None, width: int | None
    ) -> tuple[LinearOperator, torch.Tensor, bool, tuple[int, int]]:
        """
        Return the operator, the measurement y of an image in [-1, 1], whether it was a picture, and the image's height and width.
        """
        channels, size = self.vae.config.in_channels, self.vae.config.sample_size
        images = as_list(image, "image")
        is_picture = mask_image is not None or not isinstance(images[0], torch.Tensor)
        if is_picture:
            # An operator may measure gray values of colours.
            gray = mask_image is None and all(getattr(one, "mode", None) in GRAY_MODES for one in images)
            y = prepare_picture(image, self.image_processor, 1 if gray else channels)
        else:
            y = prepare_measurement(image)
        y = y.to(device=self._execution_device, dtype=torch.promote_types(y.dtype, torch.float32))
        if mask_image is not None:
            if y.ndim != 4 or y.shape[1] not in (1, channels):
                raise ValueError(
                    f"`image` must have the model's {channels} channel(s), but has shape {tuple(y.shape)} (batch, channels, "
                    "height, width)."
                )
            y = y.expand(-1, channels, -1, -1)
            check_turned_together(image, mask_image)
            observed = prepare_mask(mask_image, self.mask_processor, y.shape[0], *y.shape[-2:]).to(y.device)
            # Whatever stands in the picture where it is to be repainted, even values that are not finite.
            y = torch.where(observed, y, 0.0)
            operator = Inpainting(observed)
        operator = as_operator(operator)
        if not (y.abs() <= LARGEST_VALUE).all():
            raise ValueError(f"`image` holds values that are not finite, or beyond {LARGEST_VALUE:g}.")
        try:
            back = operator.A_adjoint(y)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            raise ValueError(
                f"`image` of shape {tuple(y.shape)} and {y.dtype} is no measurement by the operator {operator}: {error}"
            ) from error
        if back.ndim != 4 or back.shape[1] != channels or min(back.shape[2:]) < size:
            raise ValueError(
                f"`image` was measured of images of shape {tuple(back.shape[1:])} (channels, height, width) by the operator, "
                f"but the model makes images of {channels} channel(s) and at least {size}x{size} px."
            )
        for name, given, found in (("height", height, back.shape[2]), ("width", width, back.shape[3])):
            if given is not None and given != found:
                raise ValueError(f"`{name}` is {given}, but the measurement is one of images of {name} {found}.")
        measured = operator.A(torch.ones_like(back) if is_picture else back)
        if not (back.isfinite().all() and measured.isfinite().all()):
            raise ValueError("`operator` makes values that are not finite.")
        if measured.shape != y.shape:
            raise ValueError(
                f"`image` has shape {tuple(y.shape)}, but the operator makes {tuple(measured.shape)} of images of "
                f"{tuple(back.shape)}."
            )
        if is_picture:
            # A picture p is what A makes of an image in [0, 1]; of the same image in [-1, 1] it makes 2 p - A 1.
            y = 2 * y - measured
        return operator, y, is_picture, tuple(back.shape[2:])

    def prepare_latents(
        self,
        likelihood: Likelihood,
        canvas: Canvas,
        start: str,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        count = len(likelihood.y) * likelihood.num_answers
        shape = (count * len(canvas), self.vae.config.latent_channels, 1, 1)
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != shape or not latents.isfinite().all():
                found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else latents
                raise ValueError(f"`latents` must be finite, of shape {shape}, but is {found}.")
            return latents.to(device=self._execution_device, dtype=torch.float32)
        noise = draw(shape, generator, likelihood.y)
        if start == "prior":
            return noise
        guess = likelihood.operator.A_dagger(likelihood.y, max(likelihood.damping, START_DAMPING)).float().clamp(-1, 1)
        encoded = self.vae.encode(canvas.split(guess).to(self.vae.dtype)).latent_dist.mode().float()
        encoded = (
            encoded.unflatten(0, (-1, len(canvas))).repeat_interleave(likelihood.num_answers, dim=0).flatten(0, 1)
        )
        return encoded + START_SPREAD * noise

    def postprocess(
        self, sample: torch.Tensor, output_type: str | None
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        sample = self.image_processor.denormalize(sample)
        return self.image_processor.postprocess(sample, output_type=output_type or "np")

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
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
        height: int | None = None,
        width: int | None = None,
        tile_overlap: int | None = None,
        reconstruction_variance: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ECVAERestorationOutput | tuple:
        r"""
        The call function to the pipeline for restoration.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them):
                The measurement, never a clean image. With `mask_image` it is a picture: PIL, an array (B, H, W, C) or a tensor
                (B, C, H, W) in [0, 1]. With `operator` PIL images and arrays are what the operator makes of an image in [0, 1],
                and a tensor (B, ...) is y = A x of an image x in [-1, 1]. PIL images are read as training reads files: turned by
                their EXIF data, with transparency on white.
            operator ([`~operators.LinearOperator`], an object with `A` and `A_adjoint`, or a pair of functions, *optional*):
                What was measured. Called with batches of B.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of one of them, *optional*):
                Instead of `operator`: white (1) pixels of `image` are repainted, black (0) ones kept. One mask, or one per image.
                PIL masks of black and one other level or colour are read too: labels 0 and 1, palettes of one object, paint.
            noise_std (`float`, *optional*):
                sigma: standard deviation of the noise in each entry of y, for images in [-1, 1]; of noise in 8-bit levels a
                127.5th. If not given, that of rounding to 8 bits (0.0023) for pictures, 0 for measurements.
            num_restorations (`int`, *optional*, defaults to 1):
                M: answers to each measurement. They differ in what was not measured, and `std` needs several.
            num_inference_steps (`int`, *optional*, defaults to 75):
                Decoder passes (each with one back) that search latents; one more makes the answer.
            method (`str`, *optional*, defaults to `"langevin"`):
                `"langevin"` draws answers from the posterior, `"map"` gives the likeliest latents near each start.
            energy_weight (`float`, *optional*, defaults to 0.0):
                w: how much the energy of an answer counts.
            start (`str`, *optional*, defaults to `"encoding"`):
                Latents start near the encoding of A^+ y, or, with `"prior"`, from N(0, I).
            height, width (`int`, *optional*): Of the image, where it should be checked: the operator's adjoint knows it.
            tile_overlap (`int`, *optional*): Pixels that tiles of a larger image share, a quarter of a tile if not given.
            reconstruction_variance (`float`, *optional*):
                v: mean squared error of the model's reconstructions, a pixel of images in [-1, 1]. What training measured if not
                given; how it spreads over frequencies is that in any case.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one an answer (B * M), to make restoration deterministic.
            latents (`torch.Tensor` of shape `(B * M * tiles, latent_channels, 1, 1)`, *optional*): Where to start instead.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), both in [0, 1]. `None` is `"np"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`ECVAERestorationOutput`] instead of a plain tuple.
            callback_on_step_end (`Callable`, *optional*):
                Called as `callback(pipe, step, step, {"latents": latents})` after each step; may return new latents in a dict, or
                set `pipe._interrupt = True`, and the answers are made of the latents of that step.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Which tensors the callback is given.

        Examples:

        Returns:
            [`ECVAERestorationOutput`] or `tuple`

        Raises:
            ValueError: if an argument is outside what is listed above, or sizes do not fit.
        """
        self.check_inputs(
            operator, mask_image, noise_std, num_restorations, num_inference_steps, method, energy_weight, start, output_type,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        variance = self.model_variance(reconstruction_variance)
        operator, y, is_picture, (height, width) = self.prepare_measurement(image, operator, mask_image, height, width)
        count = len(y) * num_restorations
        check_generator(generator, count, of="answers")
        size = self.vae.config.sample_size
        overlap = size // 4 if tile_overlap is None else tile_overlap
        if not isinstance(overlap, Integral) or not 0 <= overlap < size:
            raise ValueError(f"`tile_overlap` must be an integer from 0 to {size - 1}, but is {tile_overlap!r}.")
        noise_std = (ROUNDING_STD if is_picture else 0.0) if noise_std is None else float(noise_std)
        if noise_std >= (largest := max(1.0, y.abs().max().item())):
            raise ValueError(
                f"`noise_std` is for images in [-1, 1], and must be below the largest entry of the measurement ({largest:.4g}), but "
                f"is {noise_std:g}. Of noise in 8-bit levels: noise_std / 127.5."
            )

        spectrum = self.vae.config.get("reconstruction_spectrum")  # not in a repository of earlier code
        likelihood = Likelihood(operator, y, noise_std, variance, num_restorations, spectrum)
        canvas = Canvas(height, width, size, overlap)
        latents_were_encoded = latents is None and start == "encoding"
        latents = self.prepare_latents(likelihood, canvas, start, generator, latents)

        # Functions are called in the measurement's precision.
        dtype = y.dtype if operator.solver_dtype is None else torch.float32
        calls = {"decoder": 0, "encoder": int(latents_were_encoded), "energy model": 0}

        def decode(latents: torch.Tensor) -> torch.Tensor:
            calls["decoder"] += 1
            return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].to(dtype)

        def energy_gradient(tiles: torch.Tensor) -> torch.Tensor:
            calls["energy model"] += 1
            return energy_and_gradient(self.energy_model, tiles)[1]

        self._interrupt, self._num_timesteps = False, num_inference_steps
        with self.progress_bar(total=num_inference_steps) as progress_bar:

            def on_step(step: int, latents: torch.Tensor) -> torch.Tensor:
                progress_bar.update()
                if callback_on_step_end is not None:
                    given = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    returned = callback_on_step_end(self, step, step, given)
                    latents = latents if returned is None else returned.pop("latents", latents)
                if self.interrupt:
                    raise Interruption(latents)
                return latents

            with frozen(self.vae):
                search = (
                    decode,
                    likelihood,
                    canvas,
                    latents,
                    num_inference_steps,
                    method,
                    energy_gradient,
                    energy_weight,
                )
                try:
                    with frozen(self.energy_model) if energy_weight > 0 else nullcontext():
                        latents = neural_transport(*search, generator, on_step)
                except Interruption as interruption:
                    (latents,) = interruption.args
                decoded = canvas.join(decode(latents))

        if not decoded.isfinite().all():
            raise ValueError(
                f"Answers are not finite in {self.vae.dtype}: the latents that `callback_on_step_end` returns are not, or the decoder's "
                "weights; else load the pipeline with dtype=torch.float32."
            )
        center = likelihood.mean(decoded)
        if (excess := (center.abs() - 1).clamp(min=0).square().mean().sqrt().item()) > LARGEST_EXCESS:
            logger.warning(
                f"Answers leave the range of images, [-1, 1], by {excess:.2g} (root mean square): `image` is no measurement of images "
                f"in [-1, 1], or it holds more noise than `noise_std` ({noise_std:.2g}), which A^+ blows up. Rounding to 8 bits has "
                f"{ROUNDING_STD:.2g}."
            )
        misfit = likelihood.misfit(center).square().mean().sqrt().item()
        if noise_std > 0 and misfit > LARGEST_MISFIT * noise_std:
            logger.warning(
                f"Answers differ from `image` by {misfit:.2g} (root mean square), but `noise_std` is {noise_std:.2g}: `image` is no "
                "measurement of images in [-1, 1], or of none that the model knows."
            )
        answers = likelihood.sample(decoded, generator) if noise_std > 0 else center
        by_measurement = center.unflatten(0, (-1, num_restorations))
        spread = (
            by_measurement.var(dim=1, correction=1) if num_restorations > 1 else torch.zeros_like(by_measurement[:, 0])
        )
        std = (spread + likelihood.variance(by_measurement[:, 0])).sqrt() / 2
        returned = answers.clamp(-1, 1)
        if output_type == "pil":
            returned = (returned * 127.5 + 127.5).round() / 127.5 - 1
        residual = likelihood.relative_residual(answers)
        if noise_std == 0 and (worst := residual.max().item()) > LARGEST_RESIDUAL:
            logger.warning(
                f"`noise_std` is 0, but answers agree with `image` only to a relative {worst:.1g}: it is not in the range of the "
                "operator (a hole of `Inpainting` that is not 0, for example), or its A^+ was not solved to the end."
            )
        energy = None
        if self.energy_model is not None:
            calls["energy model"] += 1
            with frozen(self.energy_model):
                energy = (
                    compute_energy(self.energy_model, canvas.split(answers)).unflatten(0, (-1, len(canvas))).mean(1)
                )
        mean = by_measurement.mean(1)
        output = ECVAERestorationOutput(
            images=self.postprocess(answers, output_type),
            mean=self.postprocess(mean, output_type),
            std=std if output_type == "pt" else std.permute(0, 2, 3, 1).cpu().numpy(),
            residual=residual,
            residual_output=likelihood.relative_residual(returned),
            energy=energy,
            num_network_calls=sum(calls.values()),
            residual_mean=Likelihood(operator, y, noise_std, variance).relative_residual(mean),
        )
        self.maybe_free_model_hooks()
        return output if return_dict else output.to_tuple()
