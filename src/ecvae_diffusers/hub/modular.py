# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saves the modular form of an [`ECVAEPipeline`] in its folder, which `ModularPipeline.from_pretrained` loads without this package."""

import json
from pathlib import Path
from typing import Any

from diffusers import __version__

from .single_file import single_file


BLOCKS = "ECVAEAutoBlocks"
MODULAR_CODE = "modular_blocks_ecvae.py"
MODULAR_CONFIG = "modular_config.json"  # names the class of the blocks
MODULAR_INDEX = "modular_model_index.json"  # says where the components are
MODULAR_FILES = {MODULAR_CODE, MODULAR_CONFIG, MODULAR_INDEX}


def write_modular_form(folder: str | Path) -> None:
    """Write `MODULAR_FILES` next to `model_index.json`."""
    module = Path(MODULAR_CODE).stem
    config = {"_class_name": BLOCKS, "auto_map": {"ModularPipelineBlocks": f"{module}.{BLOCKS}"}}
    for name, text in (
        (MODULAR_CODE, single_file(module)),
        (MODULAR_CONFIG, to_text(config)),
        (MODULAR_INDEX, modular_index()),
    ):
        (Path(folder) / name).write_text(text, encoding="utf-8")


def modular_index(repo_id: str | None = None) -> str:
    """
    Return the content of `modular_model_index.json`. `load_components` loads the autoencoder from `repo_id` or, if that is `None`,
    from the folder of the index. It loads no other component, because `AutoModel` finds the code of only one in a pipeline's folder.
    """
    source = {"pretrained_model_name_or_path": repo_id, "revision": None, "subfolder": "vae", "variant": None}
    vae = [None, None, source | {"type_hint": ["diffusers", "AutoModel"]}]
    return to_text({"_blocks_class_name": BLOCKS, "_class_name": "ModularPipeline", "vae": vae})


def to_text(config: dict[str, Any]) -> str:
    return json.dumps(config | {"_diffusers_version": __version__}, indent=2, sort_keys=True) + "\n"
