# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Runs of other shapes than squares of gray and RGB, from a folder of data to diffusers without this package. Slow: `make test-slow`."""

import signal

import numpy as np
import pytest
import torch
from training_runs import KILLING, SCRIPT, TINY, assert_same_weights, run, succeed, write_shapes
from without_package import run_without_package

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.cli import main


SHAPES = {"24x40 gray": ((24, 40), 1), "48x32 RGB": ((48, 32), 3), "20x20x6": (20, 6)}
# Samples and restores. The image is larger than the model, and its known half is kept.
WITHOUT_PACKAGE = """
import numpy as np

folder, height, width, channels = sys.argv[1], *map(int, sys.argv[2:])
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np").images
restoration = DiffusionPipeline.from_pretrained(folder, custom_pipeline="restoration", trust_remote_code=True)
picture = np.random.default_rng(0).random((1, height + 8, width, channels))
mask = np.zeros((1, height + 8, width, 1))
mask[:, :, : width // 2] = 1
output = restoration(picture, mask_image=mask, noise_std=0.0, num_inference_steps=4, output_type="np")
kept = np.abs(output.images - picture)[:, :, width // 2 :].max()
print(json.dumps({"images": images.tolist(), "residual": output.residual.max().item(), "kept": float(kept)}))
"""


@pytest.mark.parametrize("name", SHAPES)
def test_a_killed_run_ends_alike_and_its_folder_needs_no_package(name, tmp_path):
    sample_size, channels = SHAPES[name]
    sides = [sample_size] if isinstance(sample_size, int) else list(sample_size)
    height, width = (2 * sides)[:2]
    data = write_shapes(tmp_path / "data", sample_size, channels)
    arguments = [
        "--train_data_dir", data, *TINY, "--resolution", *sides, "--max_train_steps", 6, "--checkpointing_steps", 2,
    ]  # fmt: skip
    succeed(*arguments, "--output_dir", tmp_path / "whole")
    killing = tmp_path / "killing.py"
    killing.write_text(KILLING)
    cut = tmp_path / "cut"
    killed = run(signal.SIGKILL.value, 0, cut, SCRIPT, *arguments, "--output_dir", cut, script=killing)
    assert killed.returncode != 0
    succeed(*arguments, "--output_dir", cut, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "whole", cut)

    pipe = ECVAEPipeline.from_pretrained(cut)
    expected = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    found, _ = run_without_package(WITHOUT_PACKAGE, str(cut), str(height), str(width), str(channels))
    np.testing.assert_array_equal(np.array(found["images"], np.float32), expected)
    assert found["residual"] <= 1e-5 and found["kept"] <= 1e-5

    for command in (
        ["report", cut], ["sample", cut, "-n", 4, "-o", tmp_path / "samples.png"],
        ["export", cut, "--output_dir", tmp_path / "onnx"],
    ):  # fmt: skip
        main(list(map(str, command)))
    assert (cut / "report.html").is_file() and (tmp_path / "samples.png").is_file()
    assert (tmp_path / "onnx" / "model.json").is_file()
