# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saves a pipeline with its code, so that its folder loads without this package, and computes fingerprints of weights."""

import hashlib
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline


# Packages of classes whose code is saved: this one, and the one in which diffusers imports code from a loaded folder.
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


def weights_fingerprint(pipeline: DiffusionPipeline) -> str:
    """Return the SHA-256 of a pipeline's weights in half precision, which a model and its `fp16` variant share."""
    parts = pipeline.components.items()
    return fingerprint({k: unwrapped(part).state_dict() for k, part in parts if isinstance(part, torch.nn.Module)})


def fingerprint(weights: dict[str, dict[str, torch.Tensor]]) -> str:
    """Return the `weights_fingerprint` of a pipeline from the state dict of each component."""
    digest = hashlib.sha256()
    for component, tensors in sorted(weights.items()):
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{component}.{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().half().contiguous().numpy().tobytes())
    return digest.hexdigest()
