# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tiny pipelines of real classes, and images to train on. Modules that tests share are in `tests/support`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from training_runs import write_images

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel, LangevinScheduler


# Code that old runs saved is data here.
collect_ignore = ["fixtures"]


@pytest.fixture(scope="session")
def make_pipeline() -> Callable[..., ECVAEPipeline]:
    """Makes a pipeline of 16 px with the same random weights every time, in evaluation mode as a loaded one is."""

    def make(in_channels: int = 1, with_energy: bool = True, **scheduler_config) -> ECVAEPipeline:
        torch.manual_seed(0)
        config = {"sample_size": 16, "in_channels": in_channels, "block_out_channels": (16, 16, 16)}
        pipeline = ECVAEPipeline(
            vae=AutoencoderEC(latent_channels=8, **config).eval(),
            energy_model=EnergyModel(**config).eval() if with_energy else None,
            scheduler=LangevinScheduler(**scheduler_config) if with_energy else None,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


class LikeMPS(TorchFunctionMode):
    """Tensors of the CPU say that they are on MPS, and there is no float64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        mps = torch.device("mps")
        args = [torch.device("cpu") if isinstance(one, torch.device) and one == mps else one for one in args]
        kwargs = {name: "cpu" if name == "device" else value for name, value in (kwargs or {}).items()}
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return mps if function == torch.Tensor.device.__get__ else result


@pytest.fixture
def like_mps() -> type[TorchFunctionMode]:
    return LikeMPS


@pytest.fixture
def pipe(make_pipeline) -> ECVAEPipeline:
    return make_pipeline()


@pytest.fixture(scope="session")
def saved(make_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 gray images of 16 px."""
    return write_images(tmp_path_factory.mktemp("data") / "gray")
