# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""An evaluation over two processes, and one that was killed. Slow: `make test-slow`."""

import json
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from evaluation_runs import arguments_for, measure, run, write_files


TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def files(make_pipeline, tmp_path_factory) -> Path:
    return write_files(make_pipeline, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def arguments(files) -> list:
    return [*arguments_for(files), "--num_samples", 300]  # two parts for each seed


@pytest.fixture(scope="module")
def evaluation(files, arguments) -> dict:
    return measure(files / "one", *arguments)


def assert_same_figures(one, other, at: str = "evaluation"):
    """Equal texts, counts and keys; figures to 1e-5, for libraries may add in another order in another process."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key, value in one.items():
            assert_same_figures(value, other[key], f"{at}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for index, pair in enumerate(zip(one, other)):
            assert_same_figures(*pair, f"{at}[{index}]")
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-7), at
    else:
        assert one == other, at


def test_two_processes_give_the_figures_of_one(files, arguments, evaluation):
    result = run(*arguments, "--output_dir", files / "two", launcher=TWO_PROCESSES)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_figures(json.loads((files / "two" / "evaluation.json").read_text()), evaluation)
    assert result.stdout.splitlines()[-1].startswith(str(files / "two" / "evaluation.json"))


# Stops, as a kill would, in the middle of the samples.
KILLED = """
import os, sys
from ecvae_diffusers.evaluation import evaluate
from ecvae_diffusers.evaluation.work import EvaluatedModel

sampler, made = EvaluatedModel.sampler, []

def killed(self, count, seed):
    sample, labels = sampler(self, count, seed)

    def counted(chosen):
        made.append(len(chosen))
        if sum(made) > 250:
            os._exit(9)
        return sample(chosen)

    return counted, labels

EvaluatedModel.sampler = killed
evaluate.run(evaluate.parse_args(sys.argv[1:]))
"""


def test_a_killed_evaluation_resumes(files, arguments, evaluation):
    out = files / "killed"
    command = [sys.executable, "-c", KILLED, *map(str, arguments), "--output_dir", str(out)]
    assert subprocess.run(command, capture_output=True).returncode == 9
    kept = {path: path.stat().st_mtime_ns for path in (out / ".parts").glob("*.safetensors")}
    assert {path.name for path in kept} >= {"real-00000.safetensors", "samples_0-00000.safetensors"}
    assert not (out / "evaluation.json").exists()

    changed = [{300: 200}.get(argument, argument) for argument in arguments]
    refused = run(*changed, "--output_dir", out)
    assert refused.returncode == 1 and "num_samples" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    # Other images under the same path, as many as before.
    image = files / "test" / "50.png"
    before = image.read_bytes()
    PIL.Image.open(image).rotate(90).save(image)
    refused = run(*arguments, "--output_dir", out)
    assert refused.returncode == 1 and "images of test" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    image.write_bytes(before)

    part = out / ".parts" / "samples_0-00000.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-9])
    refused = run(*arguments, "--output_dir", out)
    assert refused.returncode == 1 and part.name in refused.stderr and "Traceback" not in refused.stderr
    part.write_bytes(content)

    result = run(*arguments, "--output_dir", out)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_figures(json.loads((out / "evaluation.json").read_text()), evaluation)
    assert "real:" not in result.stderr.replace("\r", "\n")  # was there already
