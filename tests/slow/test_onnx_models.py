# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The published models as ONNX, and networks of every kind. Slow: `make test-slow`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from without_package import run_without

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel
from ecvae_diffusers.cli import main
from ecvae_diffusers.onnx import OnnxECVAEPipeline
from ecvae_diffusers.onnx.export import export_onnx


FOLDERS = sorted(
    path.parent for path in (Path(__file__).resolve().parents[2] / "model_cards").glob("*/model_index.json")
)
BATCHES = (1, 2, 3, 64, 257, 673)  # 1,000 latents
RUN = """
import numpy as np
from ecvae_diffusers.onnx import OnnxECVAEPipeline

latents = np.load(sys.argv[2])
for precision in ("fp32", "fp16"):
    pipe = OnnxECVAEPipeline(sys.argv[1], precision)
    images = np.concatenate([pipe.decode(some) for some in np.split(latents, json.loads(sys.argv[4]))])
    np.savez(f"{sys.argv[3]}/{precision}.npz", images=images, energies=pipe.score(images))
assert not {"torch", "diffusers"} & sys.modules.keys()
"""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_published_model_draws_the_same_without_torch(folder, tmp_path):
    main(["export", folder, "--output_dir", tmp_path / "onnx"])
    pipe = ECVAEPipeline.from_pretrained(folder)
    latents = torch.randn(1000, pipe.vae.config.latent_channels, 1, 1, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "latents.npy", latents.numpy())
    splits = json.dumps(np.cumsum(BATCHES[:-1]).tolist())
    done = run_without("torch", RUN, str(tmp_path / "onnx"), str(tmp_path / "latents.npy"), str(tmp_path), splits)
    assert done.returncode == 0, done.stderr

    levels = 255 * pipe(latents=latents, output_type="np").images
    half_way = np.abs(levels % 1 - 0.5)
    for precision, tolerance in (("fp32", 1e-5), ("fp16", 2e-3)):
        found = np.load(tmp_path / f"{precision}.npz")
        difference = np.abs(found["images"] - levels.round())
        # Where rounding in float32 decides, at the middle of two levels, torch differs between batch sizes too.
        assert found["images"].dtype == np.uint8 and difference.max() <= 1
        assert (difference[half_way > 2e-3] == 0).all() and difference.mean() <= 1e-4
        energies = pipe.score(found["images"] / np.float32(255)).numpy()
        np.testing.assert_allclose(found["energies"], energies, rtol=0, atol=tolerance)

    card, config = (
        ModelCard.load(folder / "README.md").data,
        json.loads((tmp_path / "onnx" / "model.json").read_text()),
    )
    assert (config["license"], config["title"]) == (card.license, card.model_name)
    assert [one["value"] for one in config["figures"]] == [one.metric_value for one in card.eval_results] != []
    for network in ("decoder", "encoder", "energy"):
        full, half = (tmp_path / "onnx" / f"{network}{suffix}.onnx" for suffix in ("", "_fp16"))
        assert 1.7 < full.stat().st_size / half.stat().st_size < 2


@pytest.mark.parametrize(
    "vae, energy_model",
    [
        ({"sample_size": 8, "norm_type": "batch", "act_fn": "relu"}, {"act_fn": "relu", "spectral_norm": False}),
        ({"sample_size": 16, "in_channels": 4, "act_fn": "mish", "layers_per_block": 2}, {"act_fn": "mish", "layers_per_block": 2}),
        ({"sample_size": 32, "in_channels": 3, "act_fn": "gelu"}, {"act_fn": "gelu", "num_scales": 2}),
        ({"sample_size": 128, "in_channels": 3, "block_out_channels": (8, 8, 8, 8, 8)}, {"num_scales": 3, "act_fn": "silu"}),
        ({"sample_size": 256, "in_channels": 1, "block_out_channels": (8, 8, 8, 8, 8, 8)}, {}),
    ],
)  # fmt: skip
def test_networks_of_every_kind(vae, energy_model, tmp_path):
    torch.manual_seed(0)
    shared = {"in_channels": 1, "block_out_channels": (8, 16)} | {k: v for k, v in vae.items() if k != "norm_type"}
    shared = {name: shared[name] for name in ("sample_size", "in_channels", "block_out_channels")}
    pipe = ECVAEPipeline(
        vae=AutoencoderEC(latent_channels=4, **shared | vae).eval(), energy_model=EnergyModel(**shared | energy_model)
    )
    pipe.energy_model.train()  # as after training: it is exported, and stays, as it is
    state = {name: value.clone() for name, value in pipe.energy_model.state_dict().items()}
    export_onnx(pipe, tmp_path / "onnx")
    assert pipe.energy_model.training
    assert all((value == state[name]).all() for name, value in pipe.energy_model.state_dict().items())
    exported = OnnxECVAEPipeline(tmp_path / "onnx")
    latents = torch.randn(5, 4, 1, 1)
    images = exported.decode(latents.numpy())
    assert np.abs(255 * pipe(latents=latents, output_type="np").images - images).max() <= 0.51
    energies = pipe.score(images / np.float32(255)).numpy()
    np.testing.assert_allclose(exported.score(images), energies, rtol=1e-4, atol=1e-5)
