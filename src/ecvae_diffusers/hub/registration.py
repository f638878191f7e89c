# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Makes diffusers' generic loading know this package's classes. Runs once, when the package is imported.

A saved pipeline is self-contained: its `model_index.json` names files that lie in the folder itself (a list as
`_class_name`, a file stem as each component's library), so that a reader without this package loads it with
`trust_remote_code=True`. A reader that has the package should need no trust, and should get the package's classes
wherever their files have moved to since. So the names are translated when `model_index.json` is read.
"""

import os

import diffusers
from diffusers import AutoModel, DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.models import auto_model
from diffusers.pipelines import pipeline_loading_utils


# diffusers' own, before `register` wraps them.
get_signature_keys = DiffusionPipeline.__dict__["_get_signature_keys"]
resolve_trust_remote_code = auto_model.resolve_trust_remote_code
LIBRARY = "ecvae_diffusers"
SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]


def translate_model_index(config: dict, components: set[str], pipelines: set[str]) -> dict:
    """The `model_index.json` of a self-contained folder of ours, in terms of this package; any other, as it is."""

    def named(value) -> str | None:
        # Anybody's file may come by here, such as one with an empty list, or with lists in lists.
        return value[-1] if isinstance(value, list) and value and isinstance(value[-1], str) else None

    class_name = named(config.get("_class_name")) if isinstance(config, dict) else None
    if class_name not in pipelines:
        return config
    translated = {**config, "_class_name": class_name}
    for name, value in config.items():
        if name != "_class_name" and named(value) in components:
            translated[name] = [LIBRARY, value[-1]]
    return translated


def check_holds_components(config: dict, pipeline: type, pipelines: set[str]) -> None:
    """Raises `ValueError` if a `model_index.json` of ours is of a pipeline without the components that `pipeline` needs."""
    saved = config.get("_class_name") if isinstance(config, dict) else None
    expected, _ = pipeline._get_signature_keys(pipeline)
    is_ours = isinstance(saved, str) and saved in pipelines
    missing = set(expected) - set(pipeline._optional_components) - config.keys() if is_ours else None
    if missing:
        raise ValueError(
            f"{pipeline.__name__} can't be loaded from the folder of an {saved}, which has no `{sorted(missing)[0]}`: use "
            f"{saved}.from_pretrained."
        )


def register(components: tuple[type, ...], pipelines: tuple[type, ...]) -> None:
    """
    Register classes with diffusers.

    Args:
        components (`tuple[type]`): Models and schedulers, exported from the top of this package.
        pipelines (`tuple[type]`): [`DiffusionPipeline`] classes.

    [`DiffusionPipeline`] and [`AutoModel`] then load them by name.
    """
    methods = {component.__name__: SAVE_AND_LOAD for component in components}
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(LIBRARY, {}).update(methods)
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(methods)
    for registered in (*components, *pipelines):
        setattr(diffusers, registered.__name__, registered)

    component_names = {component.__name__ for component in components}
    pipeline_names = {pipeline.__name__ for pipeline in pipelines}

    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = ConfigMixin._dict_from_json_file.__func__(cls, json_file)
        config = translate_model_index(config, component_names, pipeline_names)
        for pipeline in pipelines:
            if issubclass(cls, pipeline):
                check_holds_components(config, pipeline, pipeline_names)
        return config

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
