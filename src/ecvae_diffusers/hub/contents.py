# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lists the files of a saved pipeline, or of an autoencoder of diffusers, that are published on the Hub.

A file is published only if it is listed here and passes its checks, so that no secret, link or path of this machine is.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import PIL.Image
from diffusers.models import autoencoders
from safetensors import SafetensorError
from safetensors.torch import load_file

from .modular import MODULAR_FILES
from .saving import fingerprint


INDEX = "model_index.json"
CONFIG = "config.json"  # of an autoencoder alone
CARD = "README.md"
EVALUATION = "evaluation.json"
PICTURES = {".png"}
# Files at the top of every folder, and of a pipeline's folder. Other files of a training run are not published.
TOP_LEVEL = {CARD, EVALUATION, "LICENSE"}
PIPELINE_FILES = {INDEX, "pipeline.py", "restoration.py"} | MODULAR_FILES
# The pipelines that may be published, with their components, of which the first one is required.
OUR_PIPELINES = {
    "ECFlowPipeline": ("flow", "energy_model", "scheduler"),
    "ECVAEPipeline": ("vae", "energy_model", "scheduler"),
    "ECVAERestorationPipeline": ("vae", "energy_model", "scheduler"),
}
# The names that diffusers gives to a model's weights, in one file or in shards, and to those of a variant such as fp16.
SHARD = r"(-\d{5}-of-\d{5})?"
FULL_WEIGHTS = re.compile(rf"diffusion_pytorch_model{SHARD}\.safetensors")
VARIANT_WEIGHTS = re.compile(
    rf"diffusion_pytorch_model\.\w+{SHARD}\.safetensors|diffusion_pytorch_model\.safetensors\.index\.\w+\.json"
)
COMPONENT_FILES = re.compile(
    r"config\.json|scheduler_config\.json|diffusion_pytorch_model\.safetensors\.index\.json|"
    rf"{FULL_WEIGHTS.pattern}|{VARIANT_WEIGHTS.pattern}"
)


def files_to_publish(folder: str | os.PathLike) -> list[str]:
    """
    List the files to publish, relative to the folder. For a pipeline these are index, code, card, evaluation and pictures, and
    the config, code and weights of each component. For an autoencoder of diffusers: config, weights, card and pictures.

    Raises:
        ValueError: if the folder holds neither a pipeline of this package nor an autoencoder, if it has no card, if a component
            is unknown or lacks its config or safetensors, if the evaluation was made with other weights, or if `check_file`
            refuses a file.
    """
    folder = Path(folder).resolve()
    components = component_folders(folder)
    top_level = TOP_LEVEL if "." in components else TOP_LEVEL | PIPELINE_FILES
    found = [path for path in folder.iterdir() if path.name in top_level or path.suffix in PICTURES]
    for name, library in components.items():
        files = component_files(folder / name, library)
        names = {path.name for path in files}
        has_weights = any(path.suffix == ".safetensors" for path in files)
        if "scheduler_config.json" not in names and not (has_weights and CONFIG in names):
            raise ValueError(f"{str(folder / name)!r} must hold {CONFIG} and safetensors, but holds {sorted(names)}.")
        found += files
    files = [path for path in found if path.is_file()]
    for path in files:
        check_file(path, folder)
    published = sorted(path.relative_to(folder).as_posix() for path in files)
    if CARD not in published:
        raise ValueError(f"{str(folder)!r} has no {CARD}: save the pipeline again, which writes one.")
    if EVALUATION in published:
        if evaluated_weights((folder / EVALUATION).read_bytes()) != folder_fingerprint(folder):
            raise ValueError(
                f"{str(folder / EVALUATION)!r} was made with other weights than those next to it: remove it."
            )
    return published


def component_folders(folder: Path) -> dict[str, str]:
    """Return each component's sub-folder, `.` for an autoencoder, with the library that the index names for it."""
    index = read_index(folder)
    if not (folder / INDEX).is_file():
        return {".": ""}
    listed = {name: index[name] for name in OUR_PIPELINES[str(class_name(index))] if name in index}
    return {name: library for name, (library, _) in listed.items() if library}


def component_files(folder: Path, library: str = "") -> list[Path]:
    """List the files of a component that diffusers reads: config, weights and, if its code is saved, `<library>.py`."""
    return sorted(p for p in folder.glob("*") if p.name == f"{library}.py" or COMPONENT_FILES.fullmatch(p.name))


def read_index(folder: Path) -> dict[str, Any]:
    """Return a pipeline's index, or an autoencoder's config. Raises `ValueError` if its class may not be published."""
    name = CONFIG if (folder / CONFIG).is_file() and not (folder / INDEX).is_file() else INDEX
    try:
        index = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no pipeline: its {name} can't be read ({error}).") from error
    if not is_publishable(name, index):
        allowed = f"only {', '.join(OUR_PIPELINES)} and autoencoders of diffusers are published"
        raise ValueError(f"{str(folder)!r} holds {held_class(name, index)}, but {allowed}.")
    if name == INDEX:
        check_components(str(folder), index)
    return index


def check_components(where: str, index: dict[str, Any]) -> None:
    """Raise `ValueError` if an index names an unknown component, or names one by anything except a library and a class."""
    required, *_ = known = OUR_PIPELINES[str(class_name(index))]
    listed = {name: value for name, value in index.items() if name in known or isinstance(value, list)}
    for name, value in ({required: None} | listed).items():
        is_absent = value == [None, None] and name != required
        is_pair = isinstance(value, list) and [type(part) for part in value] == [str, str]
        if name != "_class_name" and (name not in known or not (is_absent or is_pair)):
            allowed = f"name {', '.join(known)}, each by a library and a class"
            raise ValueError(f"{where!r}: its {INDEX} must {allowed}, but holds `{name}`: {value!r}.")


def is_publishable(name: str, index: Any) -> bool:
    """Return whether the class of an index, or of a config, may be published."""
    if name == INDEX:
        return class_name(index) in OUR_PIPELINES
    return hasattr(getattr(autoencoders, str(class_name(index)), None), "decode")


def class_name(index: Any) -> str | None:
    """Return the class that an index or a config names, or `None`."""
    name = index.get("_class_name") if isinstance(index, dict) else None
    name = name[-1] if isinstance(name, list) and name else name
    return name if isinstance(name, str) else None


def held_class(name: str, index: Any) -> str:
    """Return the class of an index or a config in words, for a message."""
    return f"a {class_name(index) or f'{name} that names no class'}"


def check_file(path: Path, folder: Path) -> None:
    """Raise `ValueError` for a link, damaged or non-finite safetensors, a broken PNG, or a text with a path of this machine."""
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        raise ValueError(f"{str(path)!r} leads to {str(path.resolve())!r}: replace it by a copy.")
    if path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}.") from error
        if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{str(path)!r} must hold finite weights only, but {broken[0]!r} has others.")
    elif path.suffix in PICTURES:
        try:
            with PIL.Image.open(path, formats=["PNG"]) as picture:
                picture.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not a PNG picture: remove it.") from error
    else:
        text = path.read_text(encoding="utf-8", errors="replace")
        # `expanduser` returns `~` if the user has no home.
        for private in {str(folder), os.path.expanduser("~")} - {"/", "~"}:
            # A longer name, a URL or a relative path may contain it.
            if re.search(r"(?<![\w.~-])" + re.escape(private) + r"(?![\w.-])", text):
                raise ValueError(f"{str(path)!r} names {private!r}, a path of this machine: remove it.")


def folder_fingerprint(folder: str | os.PathLike) -> str:
    """Return the `weights_fingerprint` of a saved folder: that of the full weights, if there is a variant too."""
    weights = {}
    for name in component_folders(Path(folder)):
        files = [path for path in component_files(Path(folder) / name) if path.suffix == ".safetensors"]
        chosen = [path for path in files if FULL_WEIGHTS.fullmatch(path.name)] or files
        weights[name] = {key: tensor for path in chosen for key, tensor in load_file(path).items()}
    return fingerprint(weights)


def evaluated_weights(content: bytes) -> str | None:
    """Return the fingerprint of the weights that an `evaluation.json` was made with, or `None` if it names none."""
    try:
        return json.loads(content)["weights"]
    except (ValueError, TypeError, KeyError):
        return None
