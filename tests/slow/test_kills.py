"""A run that is killed again and again ends where the run that was never killed does. Slow: `make test-slow`."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from training_runs import (
    SCRIPT,
    SCRIPTS,
    TINY,
    TINY_DECODER,
    TINY_FLOW,
    succeed,
    weights,
    write_autoencoder,
    write_images,
)


# Of each script its arguments, the steps of a run, and how often it is killed. What is saved and loaded is one implementation:
# of the others, what is their own, such as a second dual variable.
KILLED = {
    "train_ecvae": (TINY, 300, 10),
    "train_ecvae --calibration both": ([*TINY, "--calibration", "both"], 60, 2),
    "train_flow": (TINY_FLOW, 60, 2),
    "calibrate_decoder": ([*TINY_DECODER, "--latent_noise", 0.1], 60, 2),
}


def newest_step(folder):
    """The step of the newest checkpoint, read from the names alone: the run deletes old ones while we look."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=None)


@pytest.mark.parametrize("name", list(KILLED))
def test_kills_at_random_moments(name, tmp_path):
    """SIGKILL, of ten some during a save (every second step ends in one), each followed by --resume latest."""
    data, script = write_images(tmp_path / "data", count=24), SCRIPTS / f"{name.split()[0]}.py"
    own, num_steps, num_kills = KILLED[name]
    arguments = ["--train_data_dir", data, *own, "--max_train_steps", num_steps]
    if name == "calibrate_decoder":
        arguments += ["--pretrained_model_name_or_path", write_autoencoder(tmp_path / "autoencoder")]
    succeed(*arguments, "--output_dir", tmp_path / "whole", "--checkpointing_steps", 1000, script=script)
    # Where the guard goes back to is in memory, so what it does after a kill may differ: here it has no reason to.
    assert not (tmp_path / "whole" / "events.jsonl").exists()

    killed = [*arguments, "--output_dir", tmp_path / "killed", "--checkpointing_steps", 2]
    killed += ["--checkpoints_total_limit", 2, "--resume_from_checkpoint", "latest"]
    command = [sys.executable, str(script), *map(str, killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    rng, kills, during_a_save = random.Random(0), 0, 0
    while kills < num_kills:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        # From the first new checkpoint on it trains; then a moment within the next few steps and saves.
        newest = newest_step(tmp_path / "killed")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if newest_step(tmp_path / "killed") != newest:
                break
            time.sleep(0.005)
        # A few steps and saves at most, so that all kills are over long before the run is.
        time.sleep(rng.uniform(0, 0.2))
        while kills % 2 and process.poll() is None and not any((tmp_path / "killed").glob(".checkpoint-*")):
            time.sleep(0.001)  # every second one in the middle of a save
        assert process.poll() is None, f"the run ended before it was killed {num_kills} times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        during_a_save += any((tmp_path / "killed").glob(".checkpoint-*"))
    assert during_a_save > 0 or num_kills < 10
    succeed(*killed, script=script)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_a_message(number, tmp_path):
    data = write_images(tmp_path / "data", count=24)
    arguments = ["--train_data_dir", data, *TINY, "--max_train_steps", 60, "--log_steps", 1]
    succeed(*arguments, "--output_dir", tmp_path / "whole")

    stopped = [*arguments, "--output_dir", tmp_path / "stopped"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, stopped)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > 5):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in errors
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    assert checkpoint.name in errors and "--resume_from_checkpoint latest" in errors
    succeed(*stopped, "--resume_from_checkpoint", "latest")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(expected[key], found[key]) for key in expected)
