# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Registers this package's classes with diffusers. Runs once, when a public name of the package is first used.

A saved pipeline is self-contained: its `model_index.json` names code files in the same folder (`_class_name` is a list, and
the library of a component is the stem of a file). Readers without this package load it with `trust_remote_code=True`. Readers
with the package need no trust: when `model_index.json` is read, its names are translated to the classes of the package.
"""

import os
from typing import Any

import diffusers
from diffusers import AutoModel, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.models import auto_model
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


LIBRARY = "ecvae_diffusers"
# The functions of diffusers, before `register` wraps them.
get_signature_keys = DiffusionPipeline.__dict__["_get_signature_keys"]
resolve_trust_remote_code = auto_model.resolve_trust_remote_code


def register(components: tuple[type, ...], pipelines: tuple[type, ...]) -> None:
    """
    Register classes with diffusers, so that [`DiffusionPipeline`] and [`AutoModel`] load them by name.

    Args:
        components (`tuple[type]`): Models and schedulers. The package must export them and their base classes.
        pipelines (`tuple[type]`): [`DiffusionPipeline`] classes.
    """
    # Otherwise, diffusers would take the name of this package in an index on the Hub for the name of a file.
    LOADABLE_CLASSES[LIBRARY] = LOADABLE_CLASSES["diffusers"]
    for registered in (*components, *pipelines):
        setattr(diffusers, registered.__name__, registered)
    component_names = [component.__name__ for component in components]
    pipeline_names = [pipeline.__name__ for pipeline in pipelines]

    def last(value: Any) -> Any:
        # Every index is read here, also one with an empty list.
        return value[-1] if isinstance(value, list) and value else None

    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> Any:
        config = ConfigMixin._dict_from_json_file.__func__(cls, json_file)
        if not isinstance(config, dict) or last(config.get("_class_name")) not in pipeline_names:
            return config
        ours = {name: [LIBRARY, last(value)] for name, value in config.items() if last(value) in component_names}
        translated = config | ours | {"_class_name": last(config["_class_name"])}
        translated.pop("auto_map", None)  # names code in the folder
        return translated

    # The generic classes are patched, since their `from_pretrained` reads the file before it knows the class.
    for generic in (AutoModel, DiffusionPipeline):
        generic._dict_from_json_file = classmethod(_dict_from_json_file)

    def resolve_trust(trust_remote_code: bool, model_name: str, has_remote_code: bool) -> bool:
        # `AutoModel` raises for `trust_remote_code=True` if a repository has no code. Classes of this package need none.
        return resolve_trust_remote_code(trust_remote_code, model_name, has_remote_code) and has_remote_code

    auto_model.resolve_trust_remote_code = resolve_trust

    def _get_signature_keys(cls, obj: type) -> tuple[list[str], list[str]]:
        # The generic class looks up optional components on itself instead of on the pipeline that it loads, and would
        # silently ignore `energy_model=None`.
        return get_signature_keys.__func__(obj if obj in pipelines else cls, obj)

    DiffusionPipeline._get_signature_keys = classmethod(_get_signature_keys)
