"""Several processes train what one does, with each script. Slow: `make test-slow`."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from training_runs import (
    SCRIPT,
    SCRIPTS,
    TINY,
    TINY_DECODER,
    TINY_FLOW,
    metrics,
    run,
    run_with_fault,
    succeed,
    weights,
    write_autoencoder,
    write_images,
)

from ecvae_diffusers.training.run.folder import locked
from ecvae_diffusers.training.run.log import read_metrics


STEPS = 10
# What Accelerate itself allows when it loads a file of random states: numpy's generator is in it.
NUMPY_STATE = [np.dtype, np.ndarray, np.dtypes.UInt32DType, np._core.multiarray._reconstruct]
CALIBRATED = ("constraint", "dual", "langevin_drift_step", "gradient_norm", "energy_gradient_norm")
POSTERIOR = ("reconstruction", "kl", "posterior_constraint", "posterior_dual")
# A dual variable that is free to move.
MOVING = ("--max_posterior_dual", 10)
# Of each run its script, its arguments, and what is logged of it.
RUNS = {
    "energy": ("train_ecvae", TINY, ("reconstruction", *CALIBRATED)),
    "both": (
        "train_ecvae",
        [*TINY, "--calibration", "both", *MOVING],
        (*POSTERIOR, "refined_reconstruction", *CALIBRATED),
    ),
    "classes": ("train_ecvae", [*TINY, "--class_conditional"], ("reconstruction", *CALIBRATED)),
    "flow": ("train_flow", TINY_FLOW, ("bits_per_dimension", *CALIBRATED)),
    "decoder": ("calibrate_decoder", [*TINY_DECODER, "--gradient_checkpointing"], ("reconstruction", *CALIBRATED)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images in two sub-folders."""
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder / "left", count=64)
    (folder / "right").mkdir()
    for path in sorted((folder / "left").iterdir())[::3]:
        path.rename(folder / "right" / path.name)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def started(request, data, tmp_path_factory) -> tuple[str, Path, list, tuple]:
    """The name of a run, its script, its arguments but for the folder, and what is logged of it."""
    script, own, logged = RUNS[request.param]
    own = ["--train_data_dir", data, *own, "--log_steps", 1, "--random_flip"]
    if script == "calibrate_decoder":
        own += ["--pretrained_model_name_or_path", write_autoencoder(tmp_path_factory.mktemp("model") / "autoencoder")]
    return request.param, SCRIPTS / f"{script}.py", own, logged


@pytest.fixture(scope="module")
def two_ranks(started, tmp_path_factory) -> Path:
    """A run of two ranks with 8 images each, evaluated and saved in its middle."""
    out = tmp_path_factory.mktemp("runs") / "two"
    own = [*started[2], "--output_dir", out, "--max_train_steps", STEPS, "--checkpointing_steps", STEPS // 2]
    succeed(*own, "--evaluation_steps", STEPS // 2, "--evaluation_samples", 21, script=started[1], ranks=2)
    return out


def assert_same(found: Path, expected: Path) -> None:
    found, expected = weights(found), weights(expected)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def assert_close(one: Path, two: Path, logged: tuple[str, ...]) -> None:
    """
    Sums in another order: two runs part by rounding, which Adam makes steps of where a gradient is all rounding, and which
    grows as training goes on. A wrong average over the ranks, or other data, would show at the first step.
    """
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name in logged:
            assert a[name] == pytest.approx(b[name], rel=1e-3), (a["step"], name)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    difference = torch.cat([(first[key] - second[key]).float().flatten() for key in first]).norm()
    assert difference <= 0.01 * torch.cat([value.float().flatten() for value in first.values()]).norm()


def test_two_ranks_equal_one_process_with_the_same_global_batch(started, two_ranks, tmp_path):
    name, script, own, logged = started
    own = [*own, "--output_dir", tmp_path, "--max_train_steps", STEPS, "--train_batch_size", 16]
    succeed(*own, "--evaluation_steps", STEPS // 2, "--evaluation_samples", 21, script=script)
    assert_close(tmp_path, two_ranks, logged)
    # What is sampled, reconstructed and measured is shared out; bounds on the likelihood are the main process's.
    one, two = (read_metrics(folder / "evaluations.jsonl")[0] for folder in (tmp_path, two_ranks))
    assert one.pop("kernel_distance_std") < 1e-6 and two.pop("kernel_distance_std") < 1e-6  # one subset of 21
    assert ("amortisation_gap" in one) == (name in ("energy", "both", "classes"))
    # Of a hundred steps of Adam, which make more of a rounding.
    assert one.pop("amortisation_gap", 0) == pytest.approx(two.pop("amortisation_gap", 0), abs=0.1)
    # Of 21 images there is no Frechet distance.
    assert one.pop("frechet_distance") is two.pop("frechet_distance") is None
    assert one.pop("features") == two.pop("features")
    assert one == pytest.approx(two, rel=1e-2, abs=2e-3)
    for picture in ("neighbours/step-000005.png", "chain/step-000010.png"):
        assert (two_ranks / picture).is_file()
    assert weights(two_ranks / "best").keys() == weights(two_ranks).keys()


def test_two_ranks_resume_bit_for_bit_from_states_that_run_no_code(started, two_ranks, tmp_path):
    files = [path for path in (two_ranks / "checkpoint-5").iterdir() if path.suffix in (".bin", ".pkl")]
    assert len(files) >= 6
    for path in files:
        with torch.serialization.safe_globals(NUMPY_STATE if path.name.startswith("random_states") else []):
            torch.load(path, weights_only=True)
    shutil.copytree(two_ranks, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-10")
    own = [*started[2], "--output_dir", tmp_path / "cut", "--max_train_steps", STEPS]
    succeed(*own, "--resume_from_checkpoint", "latest", script=started[1], ranks=2)
    assert_same(tmp_path / "cut", two_ranks)


def test_accumulation_cut_in_two_equals_a_run_in_one(started, tmp_path):
    """64 images make 8 batches an epoch; three a step, so that steps lie across its end."""
    own = [*started[2], "--gradient_accumulation_steps", 3, "--max_grad_norm", 50, "--checkpointing_steps", 2]
    own += ["--lr_warmup_steps", 4, "--lr_scheduler", "constant_with_warmup", "--max_train_steps", 6]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeed(*own, "--output_dir", whole, script=started[1])
    shutil.copytree(whole, cut)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / name)
    succeed(*own, "--output_dir", cut, "--resume_from_checkpoint", "latest", script=started[1])
    assert_same(cut, whole)
    records = metrics(whole)
    for name in ("dual", "posterior_dual", "reconstruction"):
        assert [record.get(name) for record in records] == [record.get(name) for record in metrics(cut)]
    assert [record["epoch"] for record in records] == [(3 * step - 1) // 8 for step in range(1, 7)]
    # Rates warm up by steps, not by batches; each optimizer has stepped once a step.
    rates = [record["learning_rate"] / records[-1]["learning_rate"] for record in records]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    state = torch.load(whole / "checkpoint-4" / "optimizer_1.bin", weights_only=True)
    assert {int(entry["step"]) for entry in state["state"].values()} == {4}


@pytest.mark.parametrize("kind", ["noise on latents", "latents of a file", "the encoder alone"])
def test_two_ranks_equal_one_process_with_other_latents(kind, data, tmp_path):
    """What is drawn of latents is shared out by rank, and a decoder that is held still is the same on each."""
    script, logged = SCRIPTS / "calibrate_decoder.py", ("reconstruction", *CALIBRATED)
    if kind == "the encoder alone":
        succeed(*TINY, "--train_data_dir", data, "--output_dir", tmp_path / "model", "--max_train_steps", 2)
        script, logged = SCRIPT, (*POSTERIOR, "gradient_norm")
        own = [*TINY, "--calibration", "posterior", "--freeze_decoder", *MOVING]
    else:
        write_autoencoder(tmp_path / "model")
        file = tmp_path / "latents.safetensors"
        save_file({"latents": torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0))}, file)
        own = [*TINY_DECODER, *(["--latents_file", file] if kind == "latents of a file" else ["--latent_noise", 0.5])]
    own += ["--pretrained_model_name_or_path", tmp_path / "model", "--train_data_dir", data, "--log_steps", 1]
    own += ["--max_train_steps", STEPS]
    succeed(*own, "--output_dir", tmp_path / "one", "--train_batch_size", 16, script=script)
    succeed(*own, "--output_dir", tmp_path / "two", script=script, ranks=2)
    assert_close(tmp_path / "one", tmp_path / "two", logged)


def test_ranks_go_back_together(data, tmp_path):
    result = run_with_fault(data, tmp_path / "out", 14, 15, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    event, recovery = read_metrics(tmp_path / "out" / "events.jsonl")
    assert event["kind"] == "rollback" and event["to_step"] == 12 and recovery["kind"] == "recovery"
    assert [record["step"] for record in metrics(tmp_path / "out")] == list(range(2, 25, 2))
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "out").values())


def test_all_ranks_end_with_the_line_of_the_first_where_a_folder_is_in_use(data, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    with locked(tmp_path / "out"):
        result = run("--train_data_dir", data, "--output_dir", tmp_path / "out", *TINY, launcher=torchrun)
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if "in use" in line]
    # Of each rank, and once below what the launcher prints.
    assert len(lines) == 3 and len(set(lines)) == 1 and result.stderr.splitlines()[-1] == lines[0]
