"""`--use_8bit_adam`, with bitsandbytes fetched for this test: installed beside the rest, diffusers imports it every time.

Slow: `make test-slow`.
"""

import subprocess
import sys

import pytest
import torch
from training_runs import TINY, run, run_with_fault, succeed, weights, write_images

from ecvae_diffusers.training.run.log import read_metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bitsandbytes")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, "bitsandbytes==0.50.2"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return {"PYTHONPATH": str(folder)}


def test_without_the_package_it_is_named(data, tmp_path):
    result = run("--train_data_dir", data, "--output_dir", tmp_path / "out", *TINY, "--use_8bit_adam")
    assert result.returncode == 2 and "pip install 'bitsandbytes'" in result.stderr


def test_a_run_cut_in_two_equals_a_run_in_one(data, environment, tmp_path):
    """And the moments of large parameters are bytes."""
    arguments = ["--train_data_dir", data, *TINY, "--block_out_channels", 16, 32, "--use_8bit_adam", "--log_steps", 1]
    whole, cut = ["--output_dir", tmp_path / "whole"], ["--output_dir", tmp_path / "cut", "--checkpointing_steps", 4]
    succeed(*arguments, *whole, "--max_train_steps", 8, "--checkpointing_steps", 8, environment=environment)
    succeed(*arguments, *cut, "--max_train_steps", 4, environment=environment)
    resume = ["--max_train_steps", 8, "--resume_from_checkpoint", "latest"]
    succeed(*arguments, *cut, *resume, environment=environment)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    for file in ("optimizer.bin", "optimizer_1.bin"):
        state = torch.load(tmp_path / "whole" / "checkpoint-8" / file, weights_only=True)["state"]
        moments = [entry.get("__bnb_optimizer_quant_state__", entry)["state2"] for entry in state.values()]
        assert {moment.dtype for moment in moments} == {torch.uint8, torch.float32}


def test_a_healthy_state_is_gone_back_to(data, environment, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 15, "--use_8bit_adam", environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [event["kind"] for event in read_metrics(out / "events.jsonl")] == ["rollback", "recovery"]
    assert all(torch.isfinite(value).all() for value in weights(out).values())
