"""
What holds for `train_ecvae.py` with several processes holds for the other training scripts, and with posteriors calibrated too.
Slow: `make test-slow`.
"""

import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from training_runs import (
    SCRIPTS,
    TINY,
    TINY_DECODER,
    TINY_FLOW,
    metrics,
    succeed,
    weights,
    write_autoencoder,
    write_images,
)


STEPS = 20
HEADLINES = {
    "train_flow": ("bits_per_dimension",),
    "calibrate_decoder": ("reconstruction",),
    # With posteriors calibrated too.
    "train_ecvae": ("reconstruction", "kl", "posterior_constraint", "posterior_dual", "refined_reconstruction"),
}


def run_ranks(num_processes: int, name: str, *arguments) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += [str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module", params=list(HEADLINES))
def script(request, tmp_path_factory) -> tuple[str, list]:
    """A script's name, and its arguments but for the batch."""
    folder = tmp_path_factory.mktemp("data")
    arguments = ["--train_data_dir", write_images(folder / "images", count=64), "--log_steps", 1, "--random_flip"]
    if request.param == "train_flow":
        return request.param, [*arguments, *TINY_FLOW]
    if request.param == "train_ecvae":
        return request.param, [*arguments, *TINY, "--calibration", "both"]
    model = write_autoencoder(folder / "autoencoder")
    own = ["--pretrained_model_name_or_path", model, "--gradient_checkpointing"]
    return request.param, [*arguments, *TINY_DECODER, *own]


@pytest.fixture(scope="module")
def two_ranks(script, tmp_path_factory):
    name, arguments = script
    output_dir = tmp_path_factory.mktemp("runs") / "two"
    run_ranks(2, name, *arguments, "--output_dir", output_dir, "--max_train_steps", STEPS)
    return output_dir


def test_two_ranks_equal_one_process_with_the_same_global_batch(script, two_ranks, tmp_path):
    name, arguments = script
    run_ranks(1, name, *arguments, "--output_dir", tmp_path, "--max_train_steps", STEPS, "--train_batch_size", 16)
    for a, b in list(zip(metrics(tmp_path), metrics(two_ranks), strict=True))[:10]:
        for measure in (*HEADLINES[name], "constraint", "dual", "gradient_norm", "energy_gradient_norm"):
            assert a[measure] == pytest.approx(b[measure], rel=1e-3), (a["step"], measure)
    one, two = weights(tmp_path), weights(two_ranks)
    assert one.keys() == two.keys()
    difference = torch.cat([(one[key] - two[key]).float().flatten() for key in one]).norm()
    assert difference <= 0.01 * torch.cat([value.float().flatten() for value in one.values()]).norm()


def test_two_ranks_resumed_equal_two_ranks_in_one_run(script, two_ranks, tmp_path):
    name, arguments = script
    arguments = [*arguments, "--output_dir", tmp_path, "--checkpointing_steps", STEPS // 2]
    run_ranks(2, name, *arguments, "--max_train_steps", STEPS // 2)
    run_ranks(2, name, *arguments, "--max_train_steps", STEPS, "--resume_from_checkpoint", "latest")
    expected, found = weights(two_ranks), weights(tmp_path)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_decoder_is_measured_and_its_best_kept(tmp_path):
    """Reconstructions are measured; what is kept in `best/` is an autoencoder of diffusers too."""
    images, model = write_images(tmp_path / "images"), write_autoencoder(tmp_path / "autoencoder")
    succeed(
        *TINY_DECODER, "--pretrained_model_name_or_path", model, "--train_data_dir", images, "--output_dir",
        tmp_path / "run", "--max_train_steps", 3, "--evaluation_steps", 1, "--evaluation_samples", 12,
        "--early_stopping_patience", 1, "--learning_rate", "1e-9", script=SCRIPTS / "calibrate_decoder.py",
    )  # fmt: skip
    AutoencoderKL.from_pretrained(tmp_path / "run" / "best")
    AutoencoderKL.from_pretrained(tmp_path / "run")
    assert "from `autoencoder`" in (tmp_path / "run" / "README.md").read_text()
