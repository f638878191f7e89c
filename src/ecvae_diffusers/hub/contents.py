# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Says which files of a saved pipeline, or of an autoencoder of diffusers, belong on the Hub.

A file is published only if it is listed here and passes its checks: secrets, links and paths of this machine stay at home.
"""

import json
import os
import re
from pathlib import Path

import PIL.Image
from diffusers.models import autoencoders
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .saving import fingerprint


INDEX = "model_index.json"
CONFIG = "config.json"  # of a model alone, which is an autoencoder
CARD = "README.md"
EVALUATION = "evaluation.json"
PICTURES = {".png"}
# Of the folder itself, and of a pipeline's. A training run's other files stay at home.
TOP_LEVEL = {CARD, EVALUATION, "LICENSE"}
PIPELINE_FILES = {INDEX, "pipeline.py", "restoration.py"}
# The pipelines that are published, with their components. The first one is required.
OUR_PIPELINES = {
    "ECFlowPipeline": ("flow", "energy_model", "scheduler"),
    "ECVAEPipeline": ("vae", "energy_model", "scheduler"),
    "ECVAERestorationPipeline": ("vae", "energy_model", "scheduler"),
}
# What diffusers calls a model's weights, whole or in shards, and those of a variant such as fp16.
SHARD = r"(-\d{5}-of-\d{5})?"
FULL_WEIGHTS = re.compile(rf"diffusion_pytorch_model{SHARD}\.safetensors")
VARIANT_WEIGHTS = re.compile(
    rf"diffusion_pytorch_model\.\w+{SHARD}\.safetensors|diffusion_pytorch_model\.safetensors\.index\.\w+\.json"
)
COMPONENT_FILES = re.compile(
    r"config\.json|scheduler_config\.json|diffusion_pytorch_model\.safetensors\.index\.json|"
    rf"{FULL_WEIGHTS.pattern}|{VARIANT_WEIGHTS.pattern}"
)
LINK = re.compile(r"https?://[^\s\"'`<>(){}\[\],;]+")


def files_to_publish(folder: str | os.PathLike) -> list[str]:
    """
    List the files of a saved pipeline that belong on the Hub, relative to its folder: index, code, card, evaluation, pictures, and
    the config, code and weights of each component. For an autoencoder of diffusers: config, weights, card and pictures.

    Raises:
        ValueError: if the folder holds no pipeline of ours and no autoencoder, no card, a component that the pipeline does not have or
            that has no config or no safetensors, an evaluation of other weights, or a file that `check_file` refuses.
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
            raise ValueError(
                f"{str(folder / name)!r} must hold a {CONFIG} and safetensors, but holds {sorted(names)}."
            )
        found += files
    files = sorted({path.relative_to(folder).as_posix() for path in found if path.is_file()})
    for name in files:
        check_file(folder / name, folder)
    if CARD not in files:
        raise ValueError(f"{str(folder)!r} has no {CARD}: save the pipeline again, which writes one.")
    if EVALUATION in files and evaluated_weights((folder / EVALUATION).read_bytes()) != folder_fingerprint(folder):
        raise ValueError(
            f"{str(folder / EVALUATION)!r} must be an evaluation of the weights next to it: evaluate this model, or remove the file."
        )
    return files


def component_folders(folder: Path) -> dict[str, str]:
    """
    Return the sub-folder of each component, with the library that the index names for it: the stem of its code file, if its code
    travels. The weights of an autoencoder lie in the folder itself.
    """
    index = read_index(folder)
    if not (folder / INDEX).is_file():
        return {".": ""}
    listed = {name: index[name] for name in OUR_PIPELINES[class_name(index)] if name in index}
    return {name: value[0] for name, value in listed.items() if value[0]}


def component_files(folder: Path, library: str = "") -> list[Path]:
    """List the files of a component that diffusers reads: config, weights and, where its code travels, `<library>.py`."""
    return sorted(p for p in folder.glob("*") if p.name == f"{library}.py" or COMPONENT_FILES.fullmatch(p.name))


def read_index(folder: Path) -> dict:
    """Return the index of a pipeline, or the config of a model alone. Raise `ValueError` if it is not one that is published."""
    name = CONFIG if (folder / CONFIG).is_file() and not (folder / INDEX).is_file() else INDEX
    try:
        index = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(folder)!r} holds no pipeline: its {name} can't be read ({error}).") from error
    if not is_publishable(name, index):
        raise ValueError(
            f"{str(folder)!r} holds {held_class(name, index)}, but only {', '.join(sorted(OUR_PIPELINES))} and autoencoders of "
            "diffusers are published."
        )
    if name == INDEX:
        check_components(str(folder), index)
    return index


def check_components(where: str, index: dict) -> None:
    """Raise `ValueError` if an index names a component that its class does not have, or by anything but a library and a class."""
    required, *_ = known = OUR_PIPELINES[class_name(index)]
    listed = {name for name, value in index.items() if isinstance(value, list) or name in known} - {"_class_name"}
    for name in sorted(listed | {required}):
        value = index.get(name)
        if name not in known:
            raise ValueError(
                f"{where!r}: its {INDEX} names a component {name!r}, but {class_name(index)} has only {', '.join(known)}."
            )
        is_pair = isinstance(value, list) and len(value) == 2
        if not is_pair or not all(is_dotted_name(part) or part is None and name != required for part in value):
            raise ValueError(f"{where!r}: `{name}` of its {INDEX} must be a library and a class, but is {value!r}.")


def is_dotted_name(value) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def is_publishable(name: str, index: dict) -> bool:
    """Tell whether an index, or a config, is of a class that is published."""
    if name == INDEX:
        return class_name(index) in OUR_PIPELINES
    return hasattr(getattr(autoencoders, str(class_name(index)), None), "decode")


def class_name(index) -> str | None:
    """Return the class that an index, or a config, names; `None` if it names none."""
    name = index.get("_class_name") if isinstance(index, dict) else None
    name = name[-1] if isinstance(name, list) and name else name
    return name if isinstance(name, str) else None


def held_class(name: str, index) -> str:
    """Return, in words, what an index, or a config, is of."""
    return f"a {class_name(index) or f'{name} that names no class'}"


def check_file(path: Path, folder: Path) -> None:
    """
    Raise `ValueError` for a file of a folder that may not be published: a link, since what it leads to was not meant; safetensors that
    are damaged or not finite; a PNG that is none; any other that is not text or names a path of this machine.
    """
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        raise ValueError(f"{str(path)!r} leads to {str(path.resolve())!r}: replace it by a copy.")
    if path.suffix == ".safetensors":
        check_safetensors(path)
    elif path.suffix in PICTURES:
        try:
            with PIL.Image.open(path, formats=["PNG"]) as picture:
                picture.verify()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is no PNG picture: remove it.") from error
    else:
        check_text(path, folder)


def check_safetensors(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            broken = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}.") from error
    if broken:
        raise ValueError(f"{str(path)!r} must hold finite weights only, but {broken[0]!r} has some that are not.")


def check_text(path: Path, folder: Path) -> None:
    try:
        text = LINK.sub("", path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be text in UTF-8, but is not: {error}.") from error
    # `~` where the user has no home.
    for private in {str(folder), os.path.expanduser("~")} - {"/", "~"}:
        # Not as a part of a longer name, nor of a relative path.
        if re.search(r"(?<![\w.~-])" + re.escape(private) + r"(?![\w.-])", text):
            raise ValueError(f"{str(path)!r} names {private!r}, a path of this machine: remove it before publishing.")


def folder_fingerprint(folder: str | os.PathLike) -> str:
    """Return `weights_fingerprint` of a saved pipeline's files: of the full weights, where a variant lies next to them."""
    weights = {}
    for name in component_folders(Path(folder)):
        files = [path for path in component_files(Path(folder) / name) if path.suffix == ".safetensors"]
        chosen = [path for path in files if FULL_WEIGHTS.fullmatch(path.name)] or files
        if chosen:  # a scheduler has none
            weights[name] = {key: tensor for path in chosen for key, tensor in load_file(path).items()}
    return fingerprint(weights)


def evaluated_weights(content: bytes) -> str | None:
    """Return the fingerprint of the weights that an `evaluation.json` is of; `None` if it names none."""
    try:
        evaluation = json.loads(content)
    except ValueError:
        return None
    return evaluation.get("weights") if isinstance(evaluation, dict) else None
