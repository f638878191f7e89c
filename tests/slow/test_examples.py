"""The examples at toy size: they train, print figures and write what they say. Slow: `make test-slow`."""

import importlib
import json
import re
import sys
from pathlib import Path

import fork_server
import pytest
from training_runs import SCRIPT

import demo
from ecvae_diffusers.training.data.digits import DigitFeatures


FIGURES = {
    "audio_decoder": r"Frechet distance before ([\d.]+), after ([\d.]+)",
    "image_generator": r"Frechet distance before ([\d.]+), after ([\d.]+)",
    "text_decoder": r"different ones before (\d+), after (\d+)",
}


def run(name, monkeypatch, *arguments) -> None:
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "NUM_SAMPLES", 500)
    if hasattr(module, "train_digit_features"):
        monkeypatch.setattr(module, "train_digit_features", lambda: (DigitFeatures().eval(), 0.1))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    module.main()


def test_all_examples_are_here():
    assert {path.stem for path in Path(demo.__file__).parent.glob("*.py")} == {*FIGURES, "demo", "server"}


@pytest.mark.parametrize("name", FIGURES)
def test_example_prints_before_and_after(name, tmp_path, monkeypatch, capsys):
    output = tmp_path / ("samples.wav" if name == "audio_decoder" else "samples.png")
    run(name, monkeypatch, "--num_steps", 20, *([] if name == "text_decoder" else ["--output", output]))
    before, after = re.search(FIGURES[name], capsys.readouterr().out).groups()
    assert float(before) != float(after) or float(before) == 0
    assert output.is_file() or name == "text_decoder"


def test_the_demo_trains_and_compares(tmp_path, monkeypatch):
    # `python -m MODULE ARGUMENTS` by the script, in a forked process.
    monkeypatch.setattr(demo.subprocess, "run", lambda command: fork_server.run(SCRIPT, *command[3:]))
    run("demo", monkeypatch, "--output_dir", tmp_path, "--max_train_steps", 2)
    written = {path.name for path in tmp_path.iterdir()}
    pictures = {
        f"{name}.png" for name in ("comparison", "interpolation", "restoration", "calibration", "damaged", "mask")
    }
    assert written == {"digits", "vae", "ecvae", "metrics.json", *pictures}
    measured = json.loads((tmp_path / "metrics.json").read_text())
    assert measured["ratio"] == measured["vae"]["frechet_distance"] / measured["ecvae"]["frechet_distance"]
