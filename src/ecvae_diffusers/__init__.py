# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Energy-calibrated VAEs for diffusers: one-step image generators, trained with an energy model that sampling does not need."""

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .public import (
        AnomalyOutput,
        AutoencoderEC,
        AutoencoderECOutput,
        CalibrationOutput,
        DirectionOutput,
        ECFlowPipeline,
        ECVAEAutoBlocks,
        ECVAEBlocks,
        ECVAEPipeline,
        ECVAERestorationBlocks,
        ECVAERestorationOutput,
        ECVAERestorationPipeline,
        EnergyCalibrator,
        EnergyLossOutput,
        EnergyModel,
        EnergyModelOutput,
        FlowEC,
        FlowECOutput,
        LangevinScheduler,
        LangevinSchedulerOutput,
    )


__version__ = "0.1.0"

__all__ = [
    "AnomalyOutput",
    "AutoencoderEC",
    "AutoencoderECOutput",
    "CalibrationOutput",
    "DirectionOutput",
    "ECFlowPipeline",
    "ECVAEAutoBlocks",
    "ECVAEBlocks",
    "ECVAEPipeline",
    "ECVAERestorationBlocks",
    "ECVAERestorationOutput",
    "ECVAERestorationPipeline",
    "EnergyCalibrator",
    "EnergyLossOutput",
    "EnergyModel",
    "EnergyModelOutput",
    "FlowEC",
    "FlowECOutput",
    "LangevinScheduler",
    "LangevinSchedulerOutput",
]


# diffusers also looks up the base classes of components in the package that `model_index.json` names.
PUBLIC = (*__all__, "ModelMixin", "SchedulerMixin")


# Importing torch and diffusers takes seconds, and `ecvae --help` needs neither. As in diffusers, public names are therefore
# imported at first use.
def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        public = importlib.import_module(".public", __name__)
        globals().update({one: getattr(public, one) for one in PUBLIC})
        return globals()[name]
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class RegisterBeforeLoading:
    """
    An import hook that registers the public classes with diffusers just before it reads its first config. After
    `import ecvae_diffusers`, `DiffusionPipeline.from_pretrained` then loads folders of this package. diffusers may be imported
    before or after this package.
    """

    module = "diffusers.configuration_utils"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return a spec of the module that reads configs, which patches it after its import. Return `None` for other modules."""
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                self.patch(module)

            setattr(spec.loader, "exec_module", execute_and_patch)
        return spec

    @staticmethod
    def patch(module: ModuleType) -> None:
        mixin = module.ConfigMixin
        original = mixin.__dict__["_dict_from_json_file"]

        def _dict_from_json_file(cls, json_file):
            mixin._dict_from_json_file = original
            importlib.import_module(".public", __name__)
            return cls._dict_from_json_file(json_file)

        mixin._dict_from_json_file = classmethod(_dict_from_json_file)


if RegisterBeforeLoading.module in sys.modules:
    RegisterBeforeLoading.patch(sys.modules[RegisterBeforeLoading.module])
else:
    sys.meta_path.insert(0, RegisterBeforeLoading())
