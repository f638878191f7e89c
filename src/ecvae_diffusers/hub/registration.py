# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Makes diffusers' generic loading know this package's classes. Runs once, when a public name of the package is used.

A saved pipeline is self-contained: its `model_index.json` names files in the folder itself (a list as `_class_name`, a file's
stem as the library of each component), so that a reader without this package loads it with `trust_remote_code=True`. A reader
with the package needs no trust, and gets the package's classes wherever their files have moved to since. So the names are
translated when `model_index.json` is read.
"""

import os
from typing import Any

import diffusers
from diffusers import AutoModel, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.models import auto_model
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


LIBRARY = "ecvae_diffusers"
# diffusers' own, before `register` wraps them.
get_signature_keys = DiffusionPipeline.__dict__["_get_signature_keys"]
resolve_trust_remote_code = auto_model.resolve_trust_remote_code


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
    component_names = [component.__name__ for component in components]
    pipeline_names = [pipeline.__name__ for pipeline in pipelines]

    def last(value: Any) -> Any:
        # Anybody's index comes by here, such as one with an empty list.
        return value[-1] if isinstance(value, list) and value else None

    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> Any:
        config = ConfigMixin._dict_from_json_file.__func__(cls, json_file)
        if not isinstance(config, dict) or last(config.get("_class_name")) not in pipeline_names:
            return config
        ours = {name: [LIBRARY, last(value)] for name, value in config.items() if last(value) in component_names}
        return config | ours | {"_class_name": last(config["_class_name"])}

    # On the base classes: the generic ones' `from_pretrained` reads the file before it knows the class.
    for generic in (AutoModel, DiffusionPipeline):
        generic._dict_from_json_file = classmethod(_dict_from_json_file)

    def resolve_trust(trust_remote_code: bool, model_name: str, has_remote_code: bool) -> bool:
        # `AutoModel` refuses trust in a repository without code for it to run, and a class of this package needs none.
        return resolve_trust_remote_code(trust_remote_code, model_name, has_remote_code) and has_remote_code

    auto_model.resolve_trust_remote_code = resolve_trust

    def _get_signature_keys(cls, obj: type) -> tuple[list[str], list[str]]:
        # The generic class asks itself, not the pipeline it loads, which components are optional, and so would ignore
        # `energy_model=None` without a word.
        return get_signature_keys.__func__(obj if obj in pipelines else cls, obj)

    DiffusionPipeline._get_signature_keys = classmethod(_get_signature_keys)
