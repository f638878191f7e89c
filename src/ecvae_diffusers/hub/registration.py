# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Makes diffusers' generic loading know this package's classes. Runs once, when the package is imported.

A saved pipeline is self-contained: its `model_index.json` names files in the folder itself (a list as `_class_name`, a file's
stem as the library of each component), so that a reader without this package loads it with `trust_remote_code=True`. A reader
with the package needs no trust, and gets the package's classes wherever their files have moved to since. So the names are
translated when `model_index.json` is read.
"""

import os

import diffusers
from diffusers import AutoModel, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.models import auto_model
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


# diffusers' own, before `register` wraps them.
get_signature_keys = DiffusionPipeline.__dict__["_get_signature_keys"]
resolve_trust_remote_code = auto_model.resolve_trust_remote_code
LIBRARY = "ecvae_diffusers"


def translate_model_index(config: dict, components: set[str], pipelines: set[str]) -> dict:
    """Return the `model_index.json` of a self-contained folder of ours in terms of this package, any other as it is."""

    def named(value) -> str | None:
        # Anybody's file may come by here, such as one with an empty list, or with lists in lists.
        return value[-1] if isinstance(value, list) and value and isinstance(value[-1], str) else None

    class_name = named(config.get("_class_name")) if isinstance(config, dict) else None
    if class_name not in pipelines:
        return config
    translated = {
        name: [LIBRARY, named(value)] if named(value) in components else value for name, value in config.items()
    }
    return translated | {"_class_name": class_name}


def register(components: tuple[type, ...], pipelines: tuple[type, ...]) -> None:
    """
    Register classes with diffusers, so that [`DiffusionPipeline`] and [`AutoModel`] load them by name.

    Args:
        components (`tuple[type]`): Models and schedulers, exported from the top of this package, as are their base classes.
        pipelines (`tuple[type]`): [`DiffusionPipeline`] classes.
    """
    # Without it, an index on the Hub that names this package would be taken for one that names a file.
    LOADABLE_CLASSES[LIBRARY] = LOADABLE_CLASSES["diffusers"]
    for registered in (*components, *pipelines):
        setattr(diffusers, registered.__name__, registered)

    component_names = {component.__name__ for component in components}
    pipeline_names = {pipeline.__name__ for pipeline in pipelines}

    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = ConfigMixin._dict_from_json_file.__func__(cls, json_file)
        return translate_model_index(config, component_names, pipeline_names)

    # On the base classes: the generic ones' `from_pretrained` reads the file before it knows the class.
    for generic in (AutoModel, DiffusionPipeline):
        generic._dict_from_json_file = classmethod(_dict_from_json_file)

    def resolve_trust(trust_remote_code: bool, model_name: str, has_remote_code: bool) -> bool:
        # `AutoModel` refuses trust in a repository without code for it to run, and a class of this package needs none.
        return resolve_trust_remote_code(trust_remote_code, model_name, has_remote_code) and has_remote_code

    auto_model.resolve_trust_remote_code = resolve_trust

    def _get_signature_keys(cls, obj) -> tuple[list[str], list[str]]:
        # The generic class asks itself, not the pipeline it loads, which components are optional, and so would ignore
        # `energy_model=None` without a word.
        return get_signature_keys.__func__(obj if obj in pipelines else cls, obj)

    DiffusionPipeline._get_signature_keys = classmethod(_get_signature_keys)
