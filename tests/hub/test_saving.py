# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a saved folder holds: all that is needed to load it, in safetensors, and nothing of the machine that wrote it."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from hub_server import files

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.hub.modular import MODULAR_FILES


ROOT = Path(__file__).resolve().parents[2]
MODELS = ("vae", "energy_model")


def test_a_saved_folder_is_complete_safe_and_of_no_machine(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "first")
    saved = files(tmp_path / "first")
    code = {"vae/autoencoder_ec.py", "energy_model/energy_model.py", "scheduler/scheduling_langevin.py"}
    configs = {"vae/config.json", "energy_model/config.json", "scheduler/scheduler_config.json"}
    top_level = {"README.md", "model_index.json", "pipeline.py", "restoration.py", *MODULAR_FILES}
    weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in MODELS}
    assert set(saved) == code | configs | top_level | weights
    # Saving again gives the same bytes.
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        folder = tmp_path / pipeline_class.__name__
        pipeline_class.from_pretrained(tmp_path / "first").save_pretrained(folder)
        assert files(folder) == saved
    for path, content in saved.items():
        for place in (tmp_path, ROOT, Path.home()):
            assert str(place).encode() + b"/" not in content, path
        assert b'"_name_or_path"' not in content or path.endswith(".py"), path


def test_a_variant_next_to_a_card_of_the_user(tmp_path, make_pipeline):
    (tmp_path / "README.md").write_text("mine")
    make_pipeline().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "README.md").read_text() == "mine"
    weights = {path for path in files(tmp_path) if path.endswith(".safetensors")}
    assert weights == {f"{name}/diffusion_pytorch_model.fp16.safetensors" for name in MODELS}
    reference = make_pipeline()
    for pipeline_class in (ECVAEPipeline, DiffusionPipeline):
        pipe = pipeline_class.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
        for name in MODELS:
            for key, value in reference.components[name].state_dict().items():
                assert torch.equal(pipe.components[name].state_dict()[key], value.half()), key
