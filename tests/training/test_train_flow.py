"""`train_flow.py`, run as a user runs it. What it shares with `train_ecvae.py` is tested there, but for going on."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import SCRIPTS, TINY_FLOW, metrics, run, succeed, weights, write_images

from ecvae_diffusers import ECFlowPipeline
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.training.train_flow import parse_args


SCRIPT = SCRIPTS / "train_flow.py"


def train(*arguments, **kwargs):
    return succeed(*arguments, *TINY_FLOW, script=SCRIPT, **kwargs)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "gray")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of 12 steps through `accelerate launch`, with a checkpoint at every fourth."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    train(
        "--train_data_dir", images, "--output_dir", output_dir, "--max_train_steps", 12, "--log_steps", 1,
        "--checkpointing_steps", 4, "--lr_scheduler", "constant", launcher=launcher,
    )  # fmt: skip
    return output_dir


def test_writes_a_pipeline_that_samples(finished):
    pipe = ECFlowPipeline.from_pretrained(finished)
    assert [image.size for image in pipe(batch_size=3).images] == [(16, 16)] * 3
    assert pipe.energy_model is not None and pipe.scheduler is not None
    assert (finished / "samples").is_dir() and (finished / "chain").is_dir()


def test_a_flow_learns_its_data(finished):
    """In bits an entry; and it is calibrated as the autoencoder is."""
    lines = metrics(finished)
    assert lines[-1]["bits_per_dimension"] < lines[0]["bits_per_dimension"]
    assert all(line["constraint"] > 0 and line["tolerance"] > 0 for line in lines)
    assert lines[-1]["dual"] != lines[0]["dual"] and all(0 <= line["far_samples"] <= 1 for line in lines)


def test_a_run_cut_in_two_equals_a_run_in_one(finished, images, tmp_path):
    common = [
        "--train_data_dir",
        images,
        "--output_dir",
        tmp_path / "cut",
        "--log_steps",
        1,
        "--checkpointing_steps",
        4,
        "--lr_scheduler",
        "constant",
    ]
    train(*common, "--max_train_steps", 8)
    train(*common, "--max_train_steps", 12, "--resume_from_checkpoint", "latest")
    whole, cut = weights(finished), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and any(key.startswith("flow/") for key in whole)
    for key in whole:
        assert torch.equal(whole[key], cut[key]), key


def test_evaluations_have_the_bits_of_what_would_be_saved(images, tmp_path):
    train(
        "--train_data_dir", images, "--output_dir", tmp_path / "run", "--max_train_steps", 1, "--calibration", "none",
        "--evaluation_steps", 1, "--evaluation_samples", 24, "--no-use_ema",
    )  # fmt: skip
    [found] = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    pixels = np.stack([np.asarray(PIL.Image.open(path)) for path in sorted(images.glob("*.png"))])
    real = torch.from_numpy(pixels)[:, None] / 127.5 - 1
    flow = ECFlowPipeline.from_pretrained(tmp_path / "run").flow
    with torch.no_grad():
        noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
        bits = bits_per_dimension(flow.log_prob(dequantize(real, noise)), flow.num_latents).mean().item()
    assert found["bits_per_dimension"] == pytest.approx(bits, rel=1e-2)  # of other noise, and no other images


def test_plain_flow_has_no_energy_model(images, tmp_path):
    train(
        "--train_data_dir", images, "--output_dir", tmp_path / "run", "--max_train_steps", 2, "--calibration", "none"
    )
    pipe = ECFlowPipeline.from_pretrained(tmp_path / "run")
    assert pipe.energy_model is None and pipe.scheduler is None
    assert "constraint" not in metrics(tmp_path / "run")[-1]


def test_bf16_computes_something_else_and_no_other_run(images, tmp_path):
    """Rounding, and nothing beside it: the first step is that of float32 to three digits."""
    for precision in ("no", "bf16"):
        train(
            "--train_data_dir", images, "--output_dir", tmp_path / precision, "--max_train_steps", 2, "--log_steps", 1,
            "--mixed_precision", precision,
        )  # fmt: skip
    plain, half = (metrics(tmp_path / precision) for precision in ("no", "bf16"))
    for name in ("bits_per_dimension", "sample_spread"):
        assert half[0][name] == pytest.approx(plain[0][name], rel=1e-2)
    assert half[1]["gradient_norm"] != plain[1]["gradient_norm"] and half[1]["constraint"] > 0


def test_goes_on_from_a_pipeline(finished, images, tmp_path):
    """One step of learning rate almost 0: the weights are still those of the start, not initialized anew."""
    train(
        "--train_data_dir", images, "--output_dir", tmp_path / "run", "--pretrained_model_name_or_path", finished,
        "--learning_rate", "1e-12", "--max_train_steps", 1, "--no-use_ema",
    )  # fmt: skip
    start, found = weights(finished), weights(tmp_path / "run")
    for key in start:
        if key.startswith("flow/"):
            torch.testing.assert_close(found[key], start[key], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num_levels", 5], "--num_levels must be at most 4 at --resolution 16, but is 5"),
        (["--steps_per_level", 0], "--steps_per_level must be at least 1, but is 0"),
        (["--kl_weight", 1], "unrecognized arguments: --kl_weight 1"),
    ],
)
def test_wrong_arguments(images, tmp_path, arguments, message):
    result = run(
        "--train_data_dir", images, "--output_dir", tmp_path / "run", *TINY_FLOW, *arguments, script=SCRIPT
    )  # fmt: skip
    assert result.returncode == 2 and message in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_is_no_flow(images, tmp_path):
    succeed(
        "--train_data_dir", images, "--output_dir", tmp_path / "vae", "--resolution", 16, "--block_out_channels", 16, 16,
        "--latent_channels", 4, "--train_batch_size", 8, "--max_train_steps", 1, "--calibration", "none",
    )  # fmt: skip
    result = run(
        "--train_data_dir", images, "--output_dir", tmp_path / "run", *TINY_FLOW,
        "--pretrained_model_name_or_path", tmp_path / "vae", script=SCRIPT,
    )  # fmt: skip
    assert result.returncode == 1 and "holds no FlowEC" in result.stderr


def test_a_flow_that_has_learned_is_calibrated_at_a_lower_rate(finished, images, tmp_path):
    """3e-3 of a new flow and 5e-4 of one that is gone on with, of which an argument is above."""
    common = ("--train_data_dir", images, "--max_train_steps", 1, "--log_steps", 1, "--lr_scheduler", "constant")
    start = ("--pretrained_model_name_or_path", finished)
    rates, warned = [], []
    for name, arguments in (("new", ()), ("gone_on", start), ("given", (*start, "--learning_rate", 1e-4))):
        log = train(*common, "--output_dir", tmp_path / name, *arguments).stderr
        rates.append(metrics(tmp_path / name)[0]["learning_rate"])
        warned.append("A new flow is calibrated from its first step" in log)
    plain = train(*common, "--output_dir", tmp_path / "plain", "--calibration", "none").stderr
    warned.append("A new flow is calibrated from its first step" in plain)
    assert rates == [3e-3, 5e-4, 1e-4] and warned == [True, False, False, False]


def test_a_run_is_gone_on_with_at_its_own_rate(finished, images, tmp_path):
    """Without the argument that its default came from: the weights are the checkpoint's."""
    out = tmp_path / "run"
    common = ("--train_data_dir", images, "--output_dir", out, "--checkpointing_steps", 2, "--log_steps", 1)
    train(*common, "--max_train_steps", 2, "--pretrained_model_name_or_path", finished)
    resumed = train(*common, "--max_train_steps", 4, "--resume_from_checkpoint", "latest").stderr
    assert metrics(out)[-1]["step"] == 4 and "A new flow is calibrated" not in resumed
    assert json.loads((out / "training_args.json").read_text())["learning_rate"] == 5e-4
    new_run = ("--train_data_dir", images, "--resume_from_checkpoint", "latest")
    # One that is given must be the run's.
    arguments = ("--max_train_steps", 6, "--resume_from_checkpoint", "latest", "--learning_rate", 1e-3)
    result = run(*common, *TINY_FLOW, *arguments, script=SCRIPT)
    assert result.returncode == 1 and "--learning_rate (was 0.0005, is 0.001)" in result.stderr
    # Of a file that was edited by hand it is named, whatever it has become.
    shutil.copytree(out, tmp_path / "edited")
    edited = json.loads((out / "training_args.json").read_text()) | {"learning_rate": "fast"}
    (tmp_path / "edited" / "training_args.json").write_text(json.dumps(edited))
    arguments = ("--output_dir", tmp_path / "edited", "--resume_from_checkpoint", "latest")
    result = run("--train_data_dir", images, *TINY_FLOW, *arguments, script=SCRIPT)
    assert result.returncode != 0 and "--learning_rate" in result.stderr and "fast" in result.stderr
    # Where there is no checkpoint, it is a new run after all: also where one was cut off before its first.
    (tmp_path / "cut").mkdir()
    shutil.copy(out / "training_args.json", tmp_path / "cut")
    assert parse_args([*map(str, (*new_run, "--output_dir", tmp_path / "cut"))]).optimizer.learning_rate == 3e-3
    new = ("--train_data_dir", images, "--output_dir", tmp_path / "new", "--max_train_steps", 1)
    assert "A new flow is calibrated" in train(*new, "--resume_from_checkpoint", "latest").stderr
