"""`train_flow.py`. What it shares with `train_ecvae.py` is tested there, except for resuming."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import TINY, TINY_FLOW, metrics, weights, write_images
from training_runs import train as run

from ecvae_diffusers import ECFlowPipeline
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.training.train_flow import parse_args


WARNING = "A new flow is calibrated from its first step"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "gray")


def train(images: Path, output_dir: Path, num_steps: int, *arguments) -> list[dict]:
    given = ["--train_data_dir", images, "--output_dir", output_dir, "--log_steps", 1, "--max_train_steps", num_steps]
    run(*given, *TINY_FLOW, *arguments, script="train_flow")
    return metrics(output_dir)


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of 8 steps with a checkpoint in its middle."""
    output_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(images, output_dir, 8, "--checkpointing_steps", 4, "--lr_scheduler", "constant")
    return output_dir


def test_a_flow_learns_its_data_is_calibrated_and_samples(finished):
    lines = metrics(finished)
    assert lines[-1]["bits_per_dimension"] < lines[0]["bits_per_dimension"]
    assert all(line["constraint"] > 0 and line["tolerance"] > 0 for line in lines)
    assert lines[-1]["dual"] != lines[0]["dual"] and all(0 <= line["far_samples"] <= 1 for line in lines)
    pipe = ECFlowPipeline.from_pretrained(finished)
    assert [image.size for image in pipe(batch_size=3).images] == [(16, 16)] * 3
    assert pipe.energy_model is not None and pipe.scheduler is not None
    assert (finished / "samples").is_dir() and (finished / "chain").is_dir()


def test_a_run_cut_in_two_equals_a_run_in_one(finished, images, tmp_path):
    shutil.copytree(finished, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-8")
    shutil.rmtree(tmp_path / "cut" / "flow")
    resume = ("--checkpointing_steps", 4, "--lr_scheduler", "constant", "--resume_from_checkpoint", "latest")
    train(images, tmp_path / "cut", 8, *resume)
    whole, cut = weights(finished), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)


def test_a_plain_flow_has_no_energy_model_and_is_evaluated_by_bits(images, tmp_path, caplog):
    arguments = ("--calibration", "none", "--evaluation_steps", 1, "--evaluation_samples", 24, "--no-use_ema")
    (line,) = train(images, tmp_path, 1, *arguments, "--overwrite_output_dir")
    assert "constraint" not in line and WARNING not in caplog.text
    pipe = ECFlowPipeline.from_pretrained(tmp_path)
    assert pipe.energy_model is None and pipe.scheduler is None
    found = json.loads((tmp_path / "evaluations.jsonl").read_text())
    pixels = np.stack([np.asarray(PIL.Image.open(path)) for path in sorted(images.glob("*.png"))])
    real = torch.from_numpy(pixels)[:, None] / 127.5 - 1
    with torch.no_grad():
        noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
        bits = bits_per_dimension(pipe.flow.log_prob(dequantize(real, noise)), pipe.flow.num_latents).mean().item()
    assert found["bits_per_dimension"] == pytest.approx(bits, rel=1e-2)  # of other noise, and no other images


def test_bf16_computes_something_else_and_no_other_run(finished, images, tmp_path):
    """Rounding, and nothing beside it: the first step is that of float32 to two digits."""
    half, plain = (
        train(images, tmp_path, 2, "--lr_scheduler", "constant", "--mixed_precision", "bf16"),
        metrics(finished),
    )
    for name in ("bits_per_dimension", "sample_spread"):
        assert half[0][name] == pytest.approx(plain[0][name], rel=1e-2)
    assert half[1]["gradient_norm"] != plain[1]["gradient_norm"] and half[1]["constraint"] > 0


def test_goes_on_from_a_pipeline_at_a_lower_rate(finished, images, tmp_path, caplog):
    """3e-3 of a new flow and 5e-4 of a pretrained one, which begins with its weights and is not initialized anew."""
    start = ("--pretrained_model_name_or_path", finished, "--lr_scheduler", "constant", "--checkpointing_steps", 1)
    (line,) = train(images, tmp_path / "given", 1, *start, "--learning_rate", "1e-12", "--no-use_ema")
    assert line["learning_rate"] == 1e-12
    found = weights(tmp_path / "given")
    for key, value in weights(finished).items():
        if key.startswith("flow/"):
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6)
    out = tmp_path / "default"
    assert train(images, out, 1, *start)[0]["learning_rate"] == 5e-4 and WARNING not in caplog.text
    # Resumed without the argument that its default came from: the weights are the checkpoint's.
    resume = ("--resume_from_checkpoint", "latest")
    assert train(images, out, 2, *resume)[1]["learning_rate"] == 5e-4 and WARNING not in caplog.text
    with pytest.raises(SystemExit, match="learning_rate"):
        train(images, out, 3, *resume, "--learning_rate", 1e-3)
    # Of a file that was edited by hand it is named, whatever it has become.
    arguments = json.loads((out / "training_args.json").read_text())
    (out / "training_args.json").write_text(json.dumps(arguments | {"learning_rate": "fast"}))
    with pytest.raises(SystemExit):
        train(images, out, 3, *resume)
    # Where there is no checkpoint, it is a new run after all.
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    given = ["--train_data_dir", str(images), "--output_dir", str(out), *resume]
    assert parse_args(given).optimizer.learning_rate == 3e-3
    train(images, tmp_path / "new", 1, *resume)
    assert WARNING in caplog.text


def test_wrong_arguments_and_another_model_are_refused(images, tmp_path, capsys):
    for arguments, named in ((["--num_levels", 5], "--num_levels"), (["--kl_weight", 1], "--kl_weight")):
        with pytest.raises(SystemExit):
            train(images, tmp_path / "run", 1, *arguments)
        assert named in capsys.readouterr().err
    run(
        "--train_data_dir",
        images,
        "--output_dir",
        tmp_path / "vae",
        *TINY,
        "--max_train_steps",
        1,
        "--calibration",
        "none",
    )
    with pytest.raises(SystemExit, match="holds no FlowEC"):
        train(images, tmp_path / "run", 1, "--pretrained_model_name_or_path", tmp_path / "vae")
    assert not (tmp_path / "run").exists()
