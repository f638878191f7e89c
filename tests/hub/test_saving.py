# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a saved folder holds: all that is needed to load it, in safetensors, and nothing of the machine that wrote it."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hub_server import files

from ecvae_diffusers import ECVAEPipeline


ROOT = Path(__file__).resolve().parents[2]
MODELS = ("vae", "energy_model")


@pytest.fixture(scope="module")
def saved(make_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny-ecvae"
    make_pipeline().save_pretrained(folder)
    return folder


def test_a_saved_folder_is_complete_and_safe(saved):
    code = {"vae/autoencoder_ec.py", "energy_model/energy_model.py", "scheduler/scheduling_langevin.py"}
    configs = {"vae/config.json", "energy_model/config.json", "scheduler/scheduler_config.json"}
    top_level = {"README.md", "model_index.json", "pipeline.py", "restoration.py"}
    weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in MODELS}
    assert set(files(saved)) == code | configs | top_level | weights


@pytest.mark.parametrize("pipeline_class", [ECVAEPipeline, DiffusionPipeline])
def test_saving_again_gives_the_same_bytes_and_no_path_of_this_machine(saved, pipeline_class, tmp_path):
    pipeline_class.from_pretrained(saved).save_pretrained(tmp_path)
    assert files(tmp_path) == files(saved)
    for path, content in files(tmp_path).items():
        for place in (saved, tmp_path, ROOT, Path.home()):
            assert str(place).encode() + b"/" not in content, path
        assert b"_name_or_path" not in content or path.endswith(".py"), path


@pytest.mark.parametrize("variant, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variants(tmp_path, variant, dtype, make_pipeline):
    make_pipeline().to(dtype).save_pretrained(tmp_path, variant=variant)
    weights = {path for path in files(tmp_path) if path.endswith(".safetensors")}
    assert weights == {f"{name}/diffusion_pytorch_model.{variant}.safetensors" for name in MODELS}
    reference = make_pipeline()
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        pipe = pipeline_class.from_pretrained(tmp_path, variant=variant, dtype=dtype)
        assert type(pipe) is ECVAEPipeline
        for name in MODELS:
            for key, value in reference.components[name].state_dict().items():
                assert torch.equal(pipe.components[name].state_dict()[key], value.to(dtype)), key


def test_a_card_that_is_there_is_kept(pipe, tmp_path):
    (tmp_path / "README.md").write_text("mine\n", encoding="utf-8")
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "mine\n"
