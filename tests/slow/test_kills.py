"""A run that is killed again and again ends where the run that was never killed does. Slow: `make test-slow`."""

import signal

import pytest
import torch
from training_runs import (
    KILLING,
    SCRIPTS,
    TINY,
    TINY_DECODER,
    TINY_FLOW,
    run,
    succeed,
    weights,
    write_autoencoder,
    write_images,
)


# Of each script its arguments and how often it is killed. What is saved and loaded is one implementation: of the others, what is
# their own, such as a second dual variable.
KILLED = {
    "train_ecvae": (TINY, 6),
    "train_ecvae --calibration both": ([*TINY, "--calibration", "both"], 1),
    "train_flow": (TINY_FLOW, 1),
    "calibrate_decoder": ([*TINY_DECODER, "--latent_noise", 0.1], 1),
}


def assert_same(found, expected) -> None:
    expected, found = weights(expected), weights(found)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", KILLED)
def test_kills_at_random_moments(name, tmp_path):
    """SIGKILL, every second one during a save, each followed by --resume latest."""
    data, script = write_images(tmp_path / "data", count=24), SCRIPTS / f"{name.split()[0]}.py"
    (tmp_path / "killing.py").write_text(KILLING)
    own, num_kills = KILLED[name]
    own = ["--train_data_dir", data, *own, "--max_train_steps", 24 * num_kills]
    if name == "calibrate_decoder":
        own += ["--pretrained_model_name_or_path", write_autoencoder(tmp_path / "autoencoder")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    succeed(*own, "--output_dir", whole, "--checkpointing_steps", 1000, script=script)
    # Where the guard goes back to is in memory, so what it does after a kill may differ: here it has no reason to.
    assert not (whole / "events.jsonl").exists()
    own += ["--output_dir", killed, "--checkpointing_steps", 2, "--checkpoints_total_limit", 2]
    own += ["--resume_from_checkpoint", "latest"]
    during_a_save = 0
    for kill in range(1, num_kills + 1):
        result = run(signal.SIGKILL, kill, killed, script, *own, script=tmp_path / "killing.py")
        assert result.returncode == -signal.SIGKILL, result.stderr[-3000:]
        during_a_save += any(killed.glob(".checkpoint-*"))
    assert during_a_save > 0
    succeed(*own, script=script)
    assert_same(killed, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_a_message(number, tmp_path):
    data, whole, stopped = write_images(tmp_path / "data", count=24), tmp_path / "whole", tmp_path / "stopped"
    (tmp_path / "killing.py").write_text(KILLING)
    own = ["--train_data_dir", data, *TINY, "--max_train_steps", 40]
    succeed(*own, "--output_dir", whole)
    own += ["--output_dir", stopped, "--checkpointing_steps", 7]
    result = run(number, 0, stopped, SCRIPTS / "train_ecvae.py", *own, script=tmp_path / "killing.py")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    newest = max(stopped.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert newest.name in result.stderr.splitlines()[-1] and "--resume_from_checkpoint" in result.stderr
    succeed(*own, "--resume_from_checkpoint", "latest")
    assert_same(stopped, whole)
