# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
# Generated from src/ecvae_diffusers by pipelines/generate.py: change it there.
# Loads without the package: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""One-step image generation with an energy-calibrated normalizing flow."""

import inspect
import json
import warnings
from numbers import Integral, Real
from pathlib import Path

import PIL.Image
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor


# The code of component classes travels in files of their own. Here their base classes stand for them.
EnergyModel = ModelMixin
FlowEC = ModelMixin
LangevinScheduler = SchedulerMixin


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
        >>> from ecvae_diffusers import ECFlowPipeline

        >>> pipe = ECFlowPipeline.from_pretrained("path/or/hub-id")  # doctest: +SKIP
        >>> images = pipe(batch_size=16, temperature=0.8).images  # doctest: +SKIP
        >>> images[0].save("sample.png")  # doctest: +SKIP
        ```
"""


class ECFlowPipeline(SelfContained, DiffusionPipeline):
    r"""
    Pipeline for unconditional image generation with an energy-calibrated normalizing flow: one pass of its inverse an image.

    This model inherits from [`DiffusionPipeline`]. Check the superclass documentation for the generic methods
    implemented for all pipelines (downloading, saving, running on a particular device, etc.).

    Parameters:
        flow ([`FlowEC`]): The flow whose inverse makes images of latents drawn from N(0, I).
        energy_model ([`EnergyModel`], *optional*): The energy model that calibrated it. Not needed to sample.
        scheduler ([`LangevinScheduler`], *optional*): The chain it was calibrated with. Not needed to sample.
    """

    model_cpu_offload_seq = "flow->energy_model"
    _optional_components = ["energy_model", "scheduler"]
    # One pass, which nothing interrupts.
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
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        temperature: float = 1.0,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[list[PIL.Image.Image]]:
        r"""
        The call function to the pipeline for generation: one pass of the flow's inverse, and no other network.

        Args:
            batch_size (`int`, *optional*, defaults to 1): The number of images to generate.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or a list of one an image, to make generation deterministic.
            latents (`torch.Tensor` of shape `(batch_size, num_latents, 1, 1)`, *optional*):
                Latents to map to images as they are, instead of draws from N(0, I).
            temperature (`float`, *optional*, defaults to 1.0):
                Standard deviation of the drawn latents, from 0 to 100. Below 1, images are more typical and less varied.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"` (`PIL.Image.Image`), `"np"` (B, H, W, C) or `"pt"` (B, C, H, W), both in [0, 1], to which a flow's
                images are clamped; or `"latent"`, the latents themselves. `None` is `"np"`.
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
        check_sampling(batch_size, generator, latents, self.flow.num_latents, temperature, output_type)
        device, dtype = self._execution_device, self.flow.dtype
        if latents is None:
            shape = (batch_size, self.flow.num_latents, 1, 1)
            latents = temperature * randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        image = latents.to(device=device, dtype=dtype)
        if output_type != "latent":
            sample = self.flow.decode(image)
            check_finite(sample, temperature)
            sample = self.image_processor.denormalize(sample)
            image = self.image_processor.postprocess(sample, output_type=output_type or "np")
        self.maybe_free_model_hooks()

        if not return_dict:
            return (image,)
        return ImagePipelineOutput(images=image)
