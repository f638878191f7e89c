# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Writes a pipeline's folder so that it holds all that is needed to load it, code included."""

import hashlib
import inspect
import json
import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline


def packaged_file(name: str) -> Path:
    """
    A file of the repository's top level that travels in the wheel too, such as `pipelines/ecvae/pipeline.py`.

    Raises:
        FileNotFoundError: if it is neither in the installed package nor in a checkout around it.
    """
    package = Path(__file__).parents[1]
    for path in (package / "files" / name, package.parents[1] / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} is missing from the installation of ecvae_diffusers: install it again.")


def single_file_source(pipeline_class: type) -> str:
    """The code of one of our pipelines as one file that imports only torch and diffusers, generated from the package."""
    name = Path(inspect.getfile(pipeline_class)).stem.removeprefix("pipeline_")
    return packaged_file(f"pipelines/{name}/pipeline.py").read_text(encoding="utf-8")


def weights_fingerprint(pipeline: DiffusionPipeline) -> str:
    """
    SHA-256 of a pipeline's weights, rounded to half precision: the same for a model and its `fp16` variant, so that figures
    can be told to be of these weights.
    """
    modules = {
        name: unwrapped(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    return fingerprint({name: module.state_dict() for name, module in modules.items()})


def fingerprint(weights: dict[str, dict[str, torch.Tensor]]) -> str:
    """That of `weights_fingerprint`, of the tensors of each component."""
    digest = hashlib.sha256()
    for component, tensors in sorted(weights.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{component}.{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_restoration_code(save_directory: str | Path) -> None:
    """
    Write `restoration.py`: without this package the folder's components become a restoration pipeline by
    `DiffusionPipeline.from_pretrained(..., custom_pipeline="restoration", trust_remote_code=True)`.
    """
    source = packaged_file("pipelines/ecvae_restoration/pipeline.py").read_text(encoding="utf-8")
    Path(save_directory).mkdir(parents=True, exist_ok=True)
    (Path(save_directory) / "restoration.py").write_text(source, encoding="utf-8")


def unwrapped(component):
    """Return the model inside of a compiled one (`torch.compile`), any other component as it is."""
    return getattr(component, "_orig_mod", component)


def travelling_components(pipeline: DiffusionPipeline) -> dict[str, type]:
    """The components whose class neither diffusers nor transformers has, so that their code must travel with them."""
    classes = {name: type(unwrapped(component)) for name, component in pipeline.components.items()}
    own = ("ecvae_diffusers", "diffusers_modules")
    return {name: kind for name, kind in classes.items() if kind.__module__.split(".")[0] in own}


def self_contained_index(pipeline: DiffusionPipeline, model_index: str) -> str:
    """
    The text of a `model_index.json` that names the code files in the folder: a list as `_class_name`, a file stem as
    the library of each component of ours. Without `_name_or_path`, which would leak a path of the writer's machine.
    """
    index = json.loads(model_index)
    index.pop("_name_or_path", None)
    index["_class_name"] = ["pipeline", pipeline.saved_class.__name__]
    for name, component_class in travelling_components(pipeline).items():
        index[name] = [Path(inspect.getfile(component_class)).stem, component_class.__name__]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def write_code_files(pipeline: DiffusionPipeline, save_directory: str | Path, pipeline_code: str) -> None:
    """
    Write `pipeline.py` and one code file per component, and take the writer's paths out of the components' configs. Warn of
    classes from elsewhere, whose code is not written.
    """
    save_directory = Path(save_directory)
    save_directory.mkdir(parents=True, exist_ok=True)
    known = ("ecvae_diffusers", "diffusers_modules", "diffusers", "transformers", "builtins")
    for name, component in pipeline.components.items():
        kind = type(unwrapped(component))
        if kind.__module__.split(".")[0] not in known:
            warnings.warn(
                f"The code of `{name}` ({kind.__module__}.{kind.__name__}) is not saved: the folder loads only where that module "
                "can be imported."
            )
    if type(pipeline) is not pipeline.saved_class:
        warnings.warn(
            f"The code of {type(pipeline).__name__} is not saved: `DiffusionPipeline.from_pretrained` loads the folder as its base "
            f"class, {pipeline.saved_class.__name__}, and only {type(pipeline).__name__}.from_pretrained as what it is."
        )
    (save_directory / "pipeline.py").write_text(pipeline_code, encoding="utf-8")
    for name, component_class in travelling_components(pipeline).items():
        source = Path(inspect.getfile(component_class))
        (save_directory / name).mkdir(exist_ok=True)
        (save_directory / name / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        for config_file in (save_directory / name).glob("*config.json"):
            config = json.loads(config_file.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
