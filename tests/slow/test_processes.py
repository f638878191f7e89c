"""Several processes train what one does. Slow: `make test-slow`."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from training_runs import SCRIPT, TINY, metrics, run, run_with_fault, succeed, weights, write_images

from ecvae_diffusers.training.run.folder import locked
from ecvae_diffusers.training.run.log import read_metrics


STEPS = 50
# What Accelerate itself allows when it loads a file of random states: numpy's generator is in it.
NUMPY_STATE = [np.dtype, np.ndarray, np.dtypes.UInt32DType, np._core.multiarray._reconstruct]


def run_ranks(num_processes: int, *arguments) -> None:
    succeed(*arguments, ranks=num_processes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", count=64)


@pytest.fixture(scope="module")
def two_ranks(data, tmp_path_factory):
    """50 steps of two ranks with 8 images each, with flips, a checkpoint at every 25."""
    output_dir = tmp_path_factory.mktemp("runs") / "two"
    run_ranks(
        2, "--train_data_dir", data, "--output_dir", output_dir, *TINY, "--max_train_steps", STEPS, "--log_steps", 1,
        "--checkpointing_steps", 25, "--random_flip",
    )  # fmt: skip
    return output_dir


def test_two_ranks_equal_one_process_with_the_same_global_batch(two_ranks, data, tmp_path):
    arguments = [*TINY[:-1], "16", "--max_train_steps", STEPS, "--log_steps", 1, "--random_flip"]
    run_ranks(1, "--train_data_dir", data, "--output_dir", tmp_path, *arguments)
    one, two = weights(tmp_path), weights(two_ranks)
    assert one.keys() == two.keys()
    # Sums in another order: two runs part by rounding, which Adam makes steps of where a gradient is all rounding, and which
    # grows as training goes on. A wrong average over the ranks, or other data, would show at the first step.
    for a, b in list(zip(metrics(tmp_path), metrics(two_ranks), strict=True))[:10]:
        for name in (
            "reconstruction",
            "constraint",
            "dual",
            "langevin_drift_step",
            "gradient_norm",
            "energy_gradient_norm",
        ):
            assert a[name] == pytest.approx(b[name], rel=1e-3), (a["step"], name)
    difference = torch.cat([(one[key] - two[key]).float().flatten() for key in one]).norm()
    assert difference <= 0.01 * torch.cat([value.float().flatten() for value in one.values()]).norm()


def test_two_ranks_resumed_equal_two_ranks_in_one_run(two_ranks, data, tmp_path):
    arguments = [
        "--train_data_dir", data, "--output_dir", tmp_path, *TINY, "--log_steps", 1, "--checkpointing_steps", 25,
        "--random_flip",
    ]  # fmt: skip
    run_ranks(2, *arguments, "--max_train_steps", 25)
    run_ranks(2, *arguments, "--max_train_steps", STEPS, "--resume_from_checkpoint", "latest")
    expected, found = weights(two_ranks), weights(tmp_path)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_two_nodes_of_one_rank_equal_two_ranks(two_ranks, data, tmp_path):
    """As on two machines: two launchers that meet at an address, here on loopback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    nodes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank),
                "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", "29517", str(SCRIPT),
                "--train_data_dir", str(data), "--output_dir", str(tmp_path), *TINY,
                "--max_train_steps", str(STEPS), "--random_flip",
            ],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for node in nodes:
            _, errors = node.communicate(timeout=600)
            assert node.returncode == 0, errors[-3000:]
    finally:
        for node in nodes:
            node.kill()
    expected, found = weights(two_ranks), weights(tmp_path)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_accumulation_cut_in_two_equals_a_run_in_one(data, tmp_path):
    """64 images make 8 batches an epoch; three a step, so that steps lie across its end."""
    arguments = [
        "--train_data_dir", data, *TINY, "--log_steps", 1, "--gradient_accumulation_steps", 3, "--max_grad_norm", 50,
        "--checkpointing_steps", 5, "--lr_warmup_steps", 4, "--lr_scheduler", "constant_with_warmup",
    ]  # fmt: skip
    run_ranks(1, *arguments, "--output_dir", tmp_path / "whole", "--max_train_steps", 12)
    run_ranks(1, *arguments, "--output_dir", tmp_path / "cut", "--max_train_steps", 5)
    resume = ["--max_train_steps", 12, "--resume_from_checkpoint", "latest"]
    run_ranks(1, *arguments, "--output_dir", tmp_path / "cut", *resume)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    records = metrics(tmp_path / "whole")
    assert [record["epoch"] for record in records] == [(3 * step - 1) // 8 for step in range(1, 13)]
    # Rates warm up by steps, not by batches; each optimizer has stepped once a step.
    assert [record["learning_rate"] for record in records[:4]] == pytest.approx([1.25e-4, 2.5e-4, 3.75e-4, 5e-4])
    state = torch.load(tmp_path / "whole" / "checkpoint-10" / "optimizer_1.bin", weights_only=True)
    assert {int(entry["step"]) for entry in state["state"].values()} == {10}


def test_saved_states_load_with_weights_only(two_ranks):
    files = [path for path in (two_ranks / "checkpoint-50").iterdir() if path.suffix in (".bin", ".pkl")]
    assert len(files) >= 6
    for path in files:
        with torch.serialization.safe_globals(NUMPY_STATE if path.name.startswith("random_states") else []):
            torch.load(path, weights_only=True)


def test_two_ranks_measure_what_one_process_does(data, tmp_path):
    """Samples, reference images and features are shared out; the figures and the best model are those of one process."""
    arguments = [
        "--train_data_dir", data, "--max_train_steps", 4, "--log_steps", 1, "--evaluation_steps", 2,
        "--evaluation_samples", 41, *TINY[:-1],
    ]  # fmt: skip
    run_ranks(1, *arguments, 16, "--output_dir", tmp_path / "one")
    run_ranks(2, *arguments, 8, "--output_dir", tmp_path / "two")
    one, two = (read_metrics(tmp_path / name / "evaluations.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in two] == [2, 4]
    for a, b in zip(one, two):
        assert a.pop("kernel_distance_std") < 1e-6 and b.pop("kernel_distance_std") < 1e-6  # one subset of 41
        assert a.pop("features") == b.pop("features")
        assert a.pop("frechet_distance") is b.pop("frechet_distance") is None  # of fewer images than features
        assert a == pytest.approx(b, rel=1e-2, abs=1e-3)
    for name in ("neighbours/step-000002.png", "best/vae/config.json", "chain/step-000004.png"):
        assert (tmp_path / "two" / name).is_file()
    spread = [metrics(tmp_path / name)[0]["energy_real_std"] for name in ("one", "two")]
    assert spread[0] == pytest.approx(spread[1], rel=1e-2)


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


def test_two_ranks_with_a_gradient_penalty(data, tmp_path):
    """The penalty takes a second pass of the wrapped energy model. More steps part by rounding."""
    common = ["--train_data_dir", data, "--max_train_steps", 4, "--log_steps", 1, "--energy_gradient_penalty", 0.1]
    run_ranks(2, *common, "--output_dir", tmp_path / "two", *TINY)
    run_ranks(1, *common, "--output_dir", tmp_path / "one", *TINY[:-1], 16)
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        for name in ("reconstruction", "constraint", "dual", "gradient_norm", "energy_gradient_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
