# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What fails says why in one line, the last one that a person sees; bars say what is done where no step is counted."""

import importlib
import subprocess
import sys

import pytest
from training_runs import SCRIPTS, TINY, TINY_DECODER, TINY_FLOW, write_autoencoder, write_images

from ecvae_diffusers.training.run import session
from ecvae_diffusers.training.run.progress import progress


ALL_SCRIPTS = (
    "train_ecvae", "train_flow", "calibrate_decoder", "evaluate", "evaluate_restoration", "publish", "report", "demo",
)  # fmt: skip
FAILING = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from ecvae_diffusers.training.run.last_line import fail
fail("script.py: error: --argument must\\nbe right.")
"""
# What both launchers do: they wait, and say in many lines that a process has failed.
LAUNCHER = """
import subprocess, sys
code = subprocess.run([sys.executable, sys.argv[1]]).returncode
raise RuntimeError(f"it has failed: {code}")
"""
LINE = "script.py: error: --argument must be right."


def standard_error(*command) -> list[str]:
    """Of a command that fails: all lines, once nobody writes any more."""
    process = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True, timeout=300)
    assert process.returncode != 0
    return process.stderr.splitlines()


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_a_wrong_argument_is_one_line(script, capsys, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--no_such_argument", "1"])
    with pytest.raises(SystemExit) as refusal:
        module.main()
    assert refusal.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{script}.py: error: ")


@pytest.mark.parametrize("name, times", [("torchrun", 2), ("accelerate", 2), ("wrapper.py", 1)])
def test_the_last_line_under_a_launcher(name, times, tmp_path):
    """Other programs that start a script are not waited for: they may have more to do."""
    (tmp_path / "script.py").write_text(FAILING)
    (tmp_path / name).write_text(LAUNCHER)
    lines = standard_error(sys.executable, tmp_path / name, tmp_path / "script.py")
    assert lines[0] == LINE and lines.count(LINE) == times
    assert lines[-1] == (LINE if times == 2 else "RuntimeError: it has failed: 1")


def test_without_a_launcher_it_is_said_once(tmp_path):
    (tmp_path / "script.py").write_text(FAILING)
    assert standard_error(sys.executable, tmp_path / "script.py") == [LINE]


def test_a_bar_names_its_work(capsys):
    assert list(progress("Chains", range(3), delay=0)) == [0, 1, 2]
    assert "Chains: " in capsys.readouterr().err
    assert list(progress("Chains", range(3))) == [0, 1, 2]  # short work
    assert list(progress("Chains", range(3), shown=False, delay=0)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", ["train_ecvae", "train_flow", "calibrate_decoder"])
def test_no_repository_for_a_run_that_its_data_refuses(script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(session, "open_repository", lambda *arguments, **kwargs: asked.append(arguments))
    arguments = {"train_ecvae": TINY, "train_flow": TINY_FLOW, "calibrate_decoder": TINY_DECODER}[script]
    if script == "calibrate_decoder":
        arguments = [*arguments, "--pretrained_model_name_or_path", write_autoencoder(tmp_path / "autoencoder")]
    images = write_images(tmp_path / "images", count=4, mode="RGB")
    module = importlib.import_module(f"ecvae_diffusers.training.{script}")
    given = ["--train_data_dir", images, "--output_dir", tmp_path / "out", "--push_to_hub", *arguments]
    with pytest.raises(ValueError, match="train_batch_size"):
        module.run(module.parse_args(list(map(str, given))))
    assert asked == []
