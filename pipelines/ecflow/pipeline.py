# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
# Generated from src/ecvae_diffusers by pipelines/generate.py: change it there.
# diffusers loads it from a folder without the package, with trust_remote_code=True.
"""One-step image generation with an energy-calibrated normalizing flow."""

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


# The code of component classes is saved in separate files. Here their base classes stand in for them.
EnergyModel = ModelMixin
FlowEC = ModelMixin
LangevinScheduler = SchedulerMixin


MODES = {1: "L", 3: "RGB", 4: "RGBA"}


LARGEST_VALUE = 1e12


LARGEST_TEMPERATURE = 100.0


def check_number(name: str, value: float, low: float, high: float = LARGEST_VALUE, whole: bool = False) -> None:
    """Raise `ValueError` if an argument is not from `low` to `high` or, with `whole`, not an integer."""
    if not low <= value <= high or (whole and not isinstance(value, int | np.integer)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind} from {low:g} to {high:g}, but is {value}.")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raise `ValueError` if an argument is none of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {choices}, but is {value!r}.")


Generators = torch.Generator | list[torch.Generator] | None


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"`{name}` must have shape {shape}, but has {tuple(tensor.shape)}.")


def check_generator(generator: Generators, count: int) -> None:
    """Raise `ValueError` if `generator` is not one generator, or a list of one for each of `count` images."""
    kinds = [type(one) for one in generator] if isinstance(generator, list) else type(generator)
    if kinds not in (torch.Generator, [torch.Generator] * count, type(None)):
        raise ValueError(f"`generator` must be a torch.Generator or a list of {count}, one per image, but is {kinds}.")


def check_finite(images: torch.Tensor, suspects: str) -> None:
    """Raise `ValueError` if decoded images are not finite: they would be displayed as black."""
    if not images.isfinite().all():
        raise ValueError(f"Images are not finite in {images.dtype}. Check {suspects}.")


def prepare_latents(
    batch_size: int,
    num_latents: int,
    temperature: float,
    generator: Generators,
    latents: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the given latents, or draw them: (batch_size, num_latents, 1, 1). Raises `ValueError` if an argument does not fit."""
    check_number("batch_size", batch_size, 1, whole=True)
    check_number("temperature", temperature, 0, LARGEST_TEMPERATURE)
    if latents is not None and temperature != 1:
        raise ValueError(f"`temperature` must be 1 if `latents` are given, but is {temperature}.")
    if latents is not None and batch_size == 1:
        batch_size = max(1, len(latents))
    check_generator(generator, batch_size)
    shape = (batch_size, num_latents, 1, 1)
    if latents is None:
        return temperature * randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    check_shape("latents", latents, shape)
    return latents.to(device=device, dtype=dtype)


def check_output_type(output_type: str | None, channels: int, *others: str) -> None:
    """Raise `ValueError` if `output_type` is not one of `others`, or one in which images of so many channels exist."""
    choices = ("pil", "np", "pt", None, *others)
    if channels not in MODES:
        choices = choices[1:]
        if output_type == "pil":
            raise ValueError(
                f"`output_type` must be one of {choices} for images of {channels} channels, but is 'pil', which has 1, 3 or 4."
            )
    check_choice("output_type", output_type, choices)


def postprocess(sample: torch.Tensor, processor: VaeImageProcessor, output_type: str | None) -> Any:
    """Convert images in [-1, 1] to `output_type`. Denormalizes the batch at once, which the processor would do image by image."""
    return processor.postprocess(processor.denormalize(sample), output_type=output_type or "np")


OURS = ("ecvae_diffusers", "diffusers_modules")


KNOWN = (*OURS, "diffusers", "transformers", "builtins")


def unwrapped(component):
    """Return the model inside a compiled one (`torch.compile`), or any other component unchanged."""
    return getattr(component, "_orig_mod", component)


class SelfContained:
    """
    Mixin for pipelines that are saved with their code, so that the folder also loads without this package. It must stand
    before `DiffusionPipeline` in the list of base classes.

    Generated single-file pipelines use this class. In the package, [`~pipelines.self_contained.SelfContained`] extends it.
    """

    components: dict[str, Any]  # of `DiffusionPipeline`

    @property
    def saved_class(self) -> type:
        """The class whose code is saved. For a subclass from another package, it is the pipeline that it extends."""
        return next(kind for kind in type(self).__mro__ if DiffusionPipeline in kind.__bases__)

    def pipeline_code(self) -> str:
        """Return the content of `pipeline.py`."""
        return Path(inspect.getfile(self.saved_class)).read_text(encoding="utf-8")

    def travelling_components(self) -> dict[str, type]:
        """Return the classes of components, by name, that neither diffusers nor transformers provides. Their code is saved."""
        classes = {name: type(unwrapped(component)) for name, component in self.components.items()}
        return {name: kind for name, kind in classes.items() if kind.__module__.split(".")[0] in OURS}

    def save_code(self, save_directory: str | Path) -> None:
        """Write `pipeline.py` and the code of each component. Warn of classes from other packages, whose code is not saved."""
        for name, component in self.components.items():
            kind = type(unwrapped(component))
            if kind.__module__.split(".")[0] not in KNOWN:
                warnings.warn(
                    f"The code of `{name}` ({kind}) is not saved: import its module before you load the folder."
                )
        mine, saved = type(self).__name__, self.saved_class.__name__
        if type(self) is not self.saved_class:
            warnings.warn(f"The code of {mine} is not saved: `DiffusionPipeline.from_pretrained` loads a {saved}.")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(self.pipeline_code(), encoding="utf-8")
        for name, kind in self.travelling_components().items():
            source = Path(inspect.getfile(kind))
            (folder / name).mkdir(exist_ok=True)
            (folder / name / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")

    @classmethod
    def extract_init_dict(cls, config_dict: dict, **kwargs) -> tuple[dict, dict, dict]:
        # `auto_map` is for `AutoModel`.
        parent: Any = super()
        return parent.extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        """Return the content of `model_index.json`, which names code files in the folder and no path of this machine."""
        parent: Any = super()
        index = json.loads(parent.to_json_string())
        index.pop("_name_or_path", None)
        index["_class_name"] = ["pipeline", self.saved_class.__name__]
        for name, kind in self.travelling_components().items():
            index[name] = [Path(inspect.getfile(kind)).stem, kind.__name__]
        # `AutoModel` looks up the code of a component here. Only one class can be named: that of the first component.
        first = next(iter(self.components))
        if first in self.travelling_components():
            index["auto_map"] = {"AutoModel": ".".join(index[first])}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Save the code and `model_index.json`, and remove paths of this machine from the components' configs."""
        self.save_code(save_directory)
        for name in self.travelling_components():
            for path in (Path(save_directory) / name).glob("*config.json"):
                config = json.loads(path.read_text(encoding="utf-8"))
                if config.pop("_name_or_path", None) is not None:
                    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        parent: Any = super()
        parent.save_config(save_directory, **kwargs)


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
