# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The wheel, installed into an environment of its own, does all that a person without a clone needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
from environments import make_environment
from training_runs import TINY, write_images


ROOT = Path(__file__).resolve().parents[2]


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800, **kwargs)


def test_everything_works_after_installing_the_wheel(tmp_path):
    install = make_environment(tmp_path / "environment")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    programs = install("-c", ROOT / "constraints.txt", f"{wheel}[training]")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def ecvae(*arguments) -> subprocess.CompletedProcess:
        return run(programs / "ecvae", *arguments, cwd=tmp_path, env=environment)

    def succeed(*arguments) -> None:
        result = ecvae(*arguments)
        assert result.returncode == 0, result.stderr[-3000:]

    write_images(tmp_path / "my_images", count=40)
    write_images(tmp_path / "other_images", count=24)
    mask = np.repeat(np.uint8([0, 255]), 8)[:, None].repeat(16, axis=1)
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")

    succeed("train", "my_images", *TINY, "--max_train_steps", 20, "--output_dir", "my_model")
    succeed("sample", "my_model", "-n", 16, "-o", "samples.png")
    assert PIL.Image.open(tmp_path / "samples.png").size == (4 * 67, 4 * 67)
    options = ["--mask", "mask.png", "--num_inference_steps", 5]
    succeed("restore", "other_images/000.png", *options, "--model", "my_model", "-o", "restored")
    assert (tmp_path / "restored" / "000-uncertainty.png").is_file()
    succeed("report", "my_model")
    assert (tmp_path / "my_model" / "report.html").stat().st_size > 10_000
    succeed("publish", "my_model", "--output_dir", "published")
    assert (tmp_path / "published" / "README.md").is_file()

    evaluate = [
        "evaluate", "--pretrained_model_name_or_path", "my_model", "--train_data_dir", "my_images", "--test_data_dir",
        "other_images", "--output_dir", "my_evaluation", "--num_samples", 32, "--num_reference", 24, "--num_test", 20,
        "--num_likelihood_images", 2, "--importance_samples", 5, "--seeds", 0,
    ]  # fmt: skip
    succeed(*evaluate)
    evaluation = json.loads((tmp_path / "my_evaluation" / "evaluation.json").read_text())
    assert evaluation["generation"]["measures"]
