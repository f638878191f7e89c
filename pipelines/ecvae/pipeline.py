# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
# Generated from src/ecvae_diffusers by pipelines/generate.py: change it there.
# Loads without the package: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""One-step image generation with an energy-calibrated VAE."""

import inspect
import json
import math
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import takewhile
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn as nn
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from torch.nn.utils import parametrize


# The code of component classes travels in files of their own. Here their base classes stand for them.
AutoencoderEC = ModelMixin
EnergyModel = ModelMixin
LangevinScheduler = SchedulerMixin


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """
    Hold a module still while a chain runs on it: evaluation mode (spectral norm would otherwise take a power iteration,
    and change the energy, at every step), no parameter gradients, normalized weights computed once. The mode and
    `requires_grad` of every part are restored.

    Gradients pass through a module that diffusers offloads or casts layer by layer too: its hooks swap the data of a parameter
    after the layer's forward pass, so what backward needs is kept from that pass.
    """
    modes = [(m, m.training) for m in module.modules()]
    trained = [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    is_hooked = any(hasattr(m, "_diffusers_hook") for m, _ in modes)
    kept = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
    try:
        with parametrize.cached(), kept if is_hooked else nullcontext():
            yield
    finally:
        for m, mode in modes:
            m.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def compute_energy(energy_model: Callable, sample: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """
    One energy a sample, shape (B,), float32 or more, of an [`EnergyModel`] or of any callable that gives a tensor of B.
    A module is given samples in the precision of its parameters; with `dtype` it computes in that one, by autocast.
    """
    if isinstance(energy_model, nn.Module):
        parameter = next(energy_model.parameters(), sample)
        if parameter.dtype != sample.dtype:
            # A model of diffusers knows in which precision it computes, where layerwise casting stores weights in another.
            sample = sample.to(getattr(energy_model, "dtype", parameter.dtype))
    if dtype is None:
        output = energy_model(sample)
    else:
        with torch.autocast(sample.device.type, dtype=dtype, enabled=dtype != torch.float32):
            # The class's own `forward`: Accelerate puts one on the module that autocasts to the precision of training.
            output = type(energy_model).forward(energy_model, sample)
    energy = getattr(output, "energy", output)
    if not isinstance(energy, torch.Tensor) or energy.numel() != sample.shape[0]:
        found = tuple(energy.shape) if isinstance(energy, torch.Tensor) else type(energy).__name__
        raise ValueError(f"`energy_model` must give one energy a sample ({sample.shape[0]}), but gave {found}.")
    return energy.to(torch.promote_types(energy.dtype, torch.float32)).view(sample.shape[0])


def out_of_inference_mode(x: torch.Tensor) -> torch.Tensor:
    """A tensor of inference mode can't be computed with where gradients are taken, a copy of it can."""
    with torch.inference_mode(False):
        return x.clone() if x.is_inference() else x


def energy_and_gradient(
    energy_model: Callable, sample: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Each sample's energy, shape (B,), and its gradient with respect to the sample, in shape and dtype of `sample`. No
    graph is kept. `dtype` as for `compute_energy`.
    """
    with torch.inference_mode(False), torch.enable_grad():
        sample = out_of_inference_mode(sample).detach().requires_grad_()
        energy = compute_energy(energy_model, sample, dtype)
        return energy.detach(), torch.autograd.grad(energy.sum(), sample)[0]


DRIFT_STEP = 0.1


class PosteriorEnergy:
    """
    U of a batch of images, as a function of whitened latents: an energy for `EnergyCalibrator.calibrate(..., energy_model=)`.

    Args:
        decode (`Callable`): G: latents (B, d, 1, 1) -> images (B, C, H, W).
        images (`torch.Tensor` of shape `(B, C, H, W)`): x, in [-1, 1].
        posterior (`DiagonalGaussianDistribution`): q(z|x); its mean and standard deviation are taken as they are now.
        variance (`float`): s^2 > 0, a pixel.

    Raises:
        ValueError: if `variance` is not above 0.
    """

    def __init__(
        self, decode: Callable, images: torch.Tensor, posterior: DiagonalGaussianDistribution, variance: float
    ):
        if not 0 < variance < math.inf:
            raise ValueError(f"`variance` must be a finite number above 0, but is {variance}.")
        self.decode, self.variance, self.images = decode, variance, out_of_inference_mode(images)
        moments = (posterior.mean, posterior.std)
        self.mean, self.std = (out_of_inference_mode(moment.detach().float()) for moment in moments)

    def whiten(self, latents: torch.Tensor) -> torch.Tensor:
        """u = (z - m) / sigma, with gradients to z alone."""
        return (latents - self.mean) / self.std

    def unwhiten(self, whitened: torch.Tensor) -> torch.Tensor:
        """z = m + sigma u."""
        return self.mean + self.std * whitened

    def __call__(self, whitened: torch.Tensor) -> torch.Tensor:
        """U(m + sigma u), one number an image: shape (B,)."""
        latents = self.unwhiten(whitened)
        error = (self.decode(latents).float() - self.images.float()).square().flatten(1).sum(1)
        return error / (2 * self.variance) + latents.square().flatten(1).sum(1) / 2


def refine(
    energy: PosteriorEnergy,
    whitened: torch.Tensor,
    steps: Iterable,
    noise: bool,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """
    The end of `posterior_chain` from whitened latents; without noise that of gradient descent on U, which never rises. Written
    out, because a pipeline on the Hub has no scheduler but the one it was saved with.

    The step fits where q is near the posterior. Of an image unlike the data q may be far too wide, and a step lead uphill: in
    descent such a step is not taken, and those of that image are halved from there on.

    Args:
        energy ([`PosteriorEnergy`]): U, of a decoder that is held still.
        whitened (`torch.Tensor` of shape `(B, d, 1, 1)`): u_0, float32.
        steps (`Iterable`): As many as there are to be steps, a progress bar for example.
        noise (`bool`): Whether to draw it.
        generator (`torch.Generator` or a list of one an image, *optional*): Draws the noise.
    """
    if noise:
        for _ in steps:
            whitened = whitened - DRIFT_STEP * energy_and_gradient(energy, whitened)[1]
            normal = randn_tensor(whitened.shape, generator=generator, device=whitened.device, dtype=whitened.dtype)
            whitened = whitened + math.sqrt(2 * DRIFT_STEP) * normal
        return whitened
    value, gradient = energy_and_gradient(energy, whitened)
    step = torch.full_like(whitened[:, :1], DRIFT_STEP)
    for _ in steps:
        proposal = whitened - step * gradient
        new_value, new_gradient = energy_and_gradient(energy, proposal)
        lower = new_value < value  # and so not where U is no number any more
        value = torch.where(lower, new_value, value)
        lower = lower.view(step.shape)
        whitened, gradient = torch.where(lower, proposal, whitened), torch.where(lower, new_gradient, gradient)
        step = torch.where(lower, step, step / 2)
    return whitened


logger = logging.get_logger(__name__)


Images = PIL.Image.Image | np.ndarray | torch.Tensor | list


MODES = {1: "L", 3: "RGB", 4: "RGBA"}


GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"}


UNRANGED_MODES = {"F", "I"}


FORMATS_OF_16_BITS = {"PNG", "PPM"}


EXIF_ORIENTATION, TIFF_BITS = 0x0112, 0x0102


UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


RANGE_TOLERANCE = 1e-3


def white_level(image: PIL.Image.Image) -> int | None:
    """Return the value of white in a picture's pixels, `None` if the mode has no agreed one."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in FORMATS_OF_16_BITS):
        return 4095 if getattr(image, "tag_v2", {}).get(TIFF_BITS) == (12,) else 65535
    return None if image.mode in UNRANGED_MODES else 255


def check_pixels(image: PIL.Image.Image) -> None:
    """Raise `ValueError` if pixels are not finite."""
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError("mode F holds values that are not finite.")


def check_mode(image: PIL.Image.Image) -> None:
    """Raise `ValueError` if the mode has no agreed white, or if pixels are not finite."""
    check_pixels(image)
    if white_level(image) is None:
        low, high = image.getextrema()
        white = next((level for level in (1, 255, 65535) if high <= level), high)
        raise ValueError(
            f"mode {image.mode} has no agreed range, and the values go from {low:.4g} to {high:.4g}. If white is {white:g}: "
            f"PIL.Image.fromarray((numpy.asarray(image) / {white:g} * 255).clip(0, 255).round().astype('uint8'))"
        )


def orientation(image: PIL.Image.Image) -> int:
    """
    Return how the EXIF data say that a picture lies, from 1 (upright) to 8.

    Raises:
        ValueError: if the EXIF data can't be read.
    """
    try:
        return image.getexif().get(EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error) as error:
        raise ValueError(
            f"the EXIF data can't be read ({error}). To read the pixels as they are stored: image.info.pop('exif')"
        ) from error


def upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a picture as its EXIF data say. Photographs are stored as the camera was held."""
    image.load()  # Pillow turns TIFF files itself.
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def opacity(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return the alpha channel that the transparent colour of an L, I;16 or RGB picture stands for."""
    pixels, key = np.asarray(image), np.array(image.info["transparency"])
    if image.mode == "RGB" and key.max() > 255:
        key = key >> 8  # Pillow keeps the high bytes of 16-bit pixels, and the whole key.
    if image.mode == "L":
        # Pillow spreads 2- and 4-bit pixels over 8 bits, and leaves the key.
        scales = [scale for scale in (1, 17, 85) if not (pixels % scale).any() and (pixels == key * scale).any()]
        key = key * (scales or [1])[0]
    transparent = pixels == key
    return PIL.Image.fromarray(
        np.where(transparent.all(-1) if image.mode == "RGB" else transparent, 0, 255).astype("u1")
    )


def read_picture(image: PIL.Image.Image, channels: int) -> PIL.Image.Image:
    """
    Bring a picture of any mode to 1, 3 or 4 channels of 8 bits: upright by its EXIF data, with 16 bits scaled and rounded, and
    with transparency on white unless the channels include alpha.

    Raises:
        ValueError: if the mode has no agreed white, or the EXIF data can't be read.
    """
    check_mode(image)
    white = white_level(image)
    image = upright(image)
    alpha = None
    if "transparency" in image.info and (white > 255 or image.mode in ("L", "RGB")):
        alpha = opacity(image)
    if white > 255:
        levels = np.asarray(image).astype(np.float64) * (255 / white)
        image = PIL.Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if alpha is not None:
        image = image.convert("RGB")
        image.info.pop("transparency", None)
        image.putalpha(alpha)
    elif image.has_transparency_data:
        # Pillow converts La, whose colours are multiplied by alpha, to LA alone.
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if channels < 4 and image.mode == "RGBA":
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    # Pillow converts LAB to RGB alone.
    return (image.convert("RGB") if image.mode == "LAB" else image).convert(MODES[channels])


def as_list(image: Images, name: str) -> list:
    """Return what an argument holds as a list of PIL images, of arrays or of tensors; arrays and tensors of one shape."""
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images:
        raise ValueError(f"`{name}` is an empty list.")
    if not any(all(isinstance(one, kind) for one in images) for kind in (PIL.Image.Image, np.ndarray, torch.Tensor)):
        kinds = sorted({type(one).__name__ for one in images})
        raise ValueError(
            f"`{name}` must be PIL images, numpy arrays or a tensor, or a list of one, but holds {kinds}."
        )
    if not isinstance(images[0], PIL.Image.Image):
        check_sizes(name, [tuple(one.shape) for one in images])
    return images


def check_sizes(name: str, sizes: list[tuple[int, ...]]) -> None:
    if len(set(sizes)) > 1:
        raise ValueError(f"`{name}` must hold images of one size, but holds {sorted(set(sizes))}.")


def prepare_picture(image: Images, processor: VaeImageProcessor, channels: int) -> torch.Tensor:
    """
    Return pictures as one tensor (B, C, H, W) in [0, 1]. PIL images get `channels` channels; arrays (B, H, W, C) and tensors
    (B, C, H, W) keep theirs, and may hold values that are not finite.

    Raises:
        ValueError: if there is none, sizes differ, or a picture can't be read or is not in [0, 1].
    """
    images = as_list(image, "image")
    if isinstance(images[0], PIL.Image.Image):
        try:
            pictures = [read_picture(one, channels) for one in images]
        except ValueError as error:
            raise ValueError(f"`image` can't be read: {error}") from error
        check_sizes("image", [one.size for one in pictures])
        if channels == 1 and any(has_colours(one) for one in images):
            logger.warning(
                "`image` has colours, and the model is gray: it is read as gray, as training with 1 channel does."
            )
        levels = np.stack([np.asarray(one).reshape(*one.size[::-1], channels) for one in pictures])
        return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255
    kind = images[0].dtype
    if not (kind.is_floating_point if isinstance(images[0], torch.Tensor) else np.issubdtype(kind, np.floating)):
        raise ValueError(
            f"`image` as an array or tensor must be floating-point in [0, 1], but is {kind}. Of levels from 0 to 255: image / 255."
        )
    image = images if isinstance(image, tuple) else image
    if images[0].ndim == 2:
        image = [one[None] if isinstance(one, torch.Tensor) else one[..., None] for one in images]
    picture = processor.preprocess(image)
    finite = picture[picture.isfinite()]
    if len(finite) and (finite.min() < -RANGE_TOLERANCE or finite.max() > 1 + RANGE_TOLERANCE):
        of_model = finite.min() >= -1 - RANGE_TOLERANCE and finite.max() <= 1 + RANGE_TOLERANCE
        raise ValueError(
            f"`image` must have values in [0, 1], but they go from {finite.min():.4g} to {finite.max():.4g}."
            + (" From [-1, 1]: image / 2 + 0.5." if of_model else "")
        )
    return picture


def has_colours(image: PIL.Image.Image) -> bool:
    if image.mode in GRAY_MODES:
        return False
    pixels = np.asarray(read_picture(image, 3))
    return bool((pixels[..., 1:] != pixels[..., :1]).any())


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


OURS = ("ecvae_diffusers", "diffusers_modules")


KNOWN = (*OURS, "diffusers", "transformers", "builtins")


def unwrapped(component):
    """Return the model inside of a compiled one (`torch.compile`), any other component as it is."""
    return getattr(component, "_orig_mod", component)


class SelfContained:
    """
    Saves a pipeline with its code, so that its folder loads without this package too. Stands before `DiffusionPipeline`.

    In a single file this class is all there is; in the package [`~pipelines.self_contained.SelfContained`] adds to it.
    """

    @property
    def saved_class(self) -> type:
        """The class whose code is saved: for a subclass from elsewhere, the pipeline of this package that it extends."""
        return next(kind for kind in type(self).__mro__ if DiffusionPipeline in kind.__bases__)

    def pipeline_code(self) -> str:
        """Return the content of `pipeline.py`."""
        return Path(inspect.getfile(self.saved_class)).read_text(encoding="utf-8")

    def travelling_components(self) -> dict[str, type]:
        """Return the classes of the components that neither diffusers nor transformers has, so that their code must travel."""
        classes = {name: type(unwrapped(component)) for name, component in self.components.items()}
        return {name: kind for name, kind in classes.items() if kind.__module__.split(".")[0] in OURS}

    def save_code(self, save_directory: str | Path) -> None:
        """Write `pipeline.py` and the code of each component. Warn of classes from elsewhere, whose code is not written."""
        for name, component in self.components.items():
            kind = type(unwrapped(component))
            if kind.__module__.split(".")[0] not in KNOWN:
                warnings.warn(
                    f"The code of `{name}` ({kind.__module__}.{kind.__name__}) is not saved: the folder loads only where that "
                    "module can be imported."
                )
        mine, saved = type(self).__name__, self.saved_class.__name__
        if type(self) is not self.saved_class:
            warnings.warn(
                f"The code of {mine} is not saved: {mine}.from_pretrained loads the folder as what it is, but "
                f"`DiffusionPipeline.from_pretrained` as its base class, {saved}."
            )
        save_directory = Path(save_directory)
        save_directory.mkdir(parents=True, exist_ok=True)
        (save_directory / "pipeline.py").write_text(self.pipeline_code(), encoding="utf-8")
        for name, kind in self.travelling_components().items():
            source = Path(inspect.getfile(kind))
            (save_directory / name).mkdir(exist_ok=True)
            (save_directory / name / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")

    def to_json_string(self) -> str:
        """
        Return `model_index.json`, which names the code files in the folder: a list as `_class_name`, a file's stem as the library
        of each component of ours. Leave out `_name_or_path`, a path of the writer's machine.
        """
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)
        index["_class_name"] = ["pipeline", self.saved_class.__name__]
        for name, kind in self.travelling_components().items():
            index[name] = [Path(inspect.getfile(kind)).stem, kind.__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Save the code and `model_index.json`, and take the writer's paths out of the components' configs."""
        self.save_code(save_directory)
        for name in self.travelling_components():
            for path in (Path(save_directory) / name).glob("*config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None) is not None:
                    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        super().save_config(save_directory, **kwargs)


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
