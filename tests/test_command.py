# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Command lines: `~` in folders, files and Hub ids, what does not exist, and one line that says why a script has ended."""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from training_runs import TINY, TINY_DECODER, TINY_FLOW, write_autoencoder, write_images

from ecvae_diffusers.command import check_places, name_as_text, why_missing
from ecvae_diffusers.commands import export, publish
from ecvae_diffusers.evaluation import evaluate, evaluate_restoration
from ecvae_diffusers.training import calibrate_decoder, train_ecvae, train_flow
from ecvae_diffusers.training.run import launch


TRAINING = ["--train_data_dir", "x", "--output_dir", "x"]
MODEL = ["--pretrained_model_name_or_path", "x"]
# Of each script what it must be given, and its places.
SCRIPTS = {
    train_ecvae: (TRAINING, "train_data_dir output_dir pretrained_model_name_or_path resume_from_checkpoint evaluation_features"),
    train_flow: (TRAINING, "train_data_dir pretrained_model_name_or_path"),
    calibrate_decoder: ([*TRAINING, *MODEL], "output_dir pretrained_model_name_or_path latents_file"),
    evaluate: (
        [*TRAINING, *MODEL],
        "train_data_dir test_data_dir output_dir cache_dir pretrained_model_name_or_path features",
    ),
    evaluate_restoration: (
        [*MODEL, "--image_dir", "x", "--output_dir", "x"],
        "image_dir output_dir pretrained_model_name_or_path baseline features",
    ),
    export: (["x", "--output_dir", "x"], "output_dir"),
    publish: (["x", "--output_dir", "x"], "output_dir"),
}  # fmt: skip
FAILING = """
from ecvae_diffusers.command import fail
fail("script.py: error: --argument must\\nbe right.")
"""
# What both launchers do: they wait, and say in many lines that a process has failed.
LAUNCHER = """
import subprocess, sys
code = subprocess.run([sys.executable, sys.argv[1]]).returncode
raise RuntimeError(f"it has failed: {code}")
"""
LINE = "script.py: error: --argument must be right."


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_home_is_expanded_and_nothing_empty_is_taken(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    given, arguments = SCRIPTS[script]
    for argument in arguments.split():
        for text, expected in (("~/x", str(tmp_path / "x")), ("./~/x", "./~/x")):
            parsed = script.parse_args([*given, f"--{argument}", text])
            values = vars(parsed) if isinstance(parsed, argparse.Namespace) else parsed.flat()
            assert values[argument] == expected
        for wrong in ("", "  ", "~nobody-of-that-name/x"):
            with pytest.raises(SystemExit):
                script.parse_args([*given, f"--{argument}={wrong}"])
            assert f"--{argument}" in capsys.readouterr().err


def test_places_of_a_config_and_places_with_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    # In UTF-8, with and without a byte order mark, as editors of Windows write it.
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.yaml").write_bytes(mark + "# Größe\ndataset_name: ~/Bücher\noutput_dir: ~/out\n".encode())
        config = train_ecvae.parse_args(["--config", "~/a.yaml"])
        assert (config.data.dataset_name, config.run.output_dir) == (str(tmp_path / "Bücher"), str(tmp_path / "out"))
    args = evaluate.parse_args([*SCRIPTS[evaluate][0], "--out_of_distribution", "a=~/x", "b=y"])
    assert args.out_of_distribution == [f"a={tmp_path}/x", "b=y"]
    given = ["--evaluation", "~/e", "--details", "~/d", "--training_seeds", "0=~/s", "--baseline", "B=~/b"]
    args = publish.parse_args([*SCRIPTS[publish][0], *given])
    assert (args.evaluation, args.details) == (str(tmp_path / "e"), str(tmp_path / "d"))
    assert (args.training_seeds, args.baseline) == ([f"0={tmp_path}/s"], f"B={tmp_path}/b")


def test_what_is_not_there_is_told_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "unused")
    for argument in ("train_data_dir", "test_data_dir", "generated_image_dir", "image_dir"):
        with pytest.raises(ValueError, match=argument):
            check_places(argparse.Namespace(**{argument: str(tmp_path / "nowhere")}))
        check_places(argparse.Namespace(**{argument: str(tmp_path)}))
    for argument in ("dataset_name", "pretrained_model_name_or_path", "baseline", "out_of_distribution"):
        for source in ("./x", "a/b/c", "/nowhere/x", "x/", "with space"):
            value = [f"name={source}"] if argument == "out_of_distribution" else source
            with pytest.raises(ValueError, match=argument):
                check_places(argparse.Namespace(**{argument: value}))


def test_the_hub_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        assert "Hub" in why_missing("data/imgaes", "model")
    started = time.monotonic()
    for kind in ("model", "dataset"):  # the Hub is gone
        assert "Hub" in why_missing("data/imgaes", kind)
    assert time.monotonic() - started < 5
    (tmp_path / "cache" / "models--data--imgaes").mkdir(parents=True)
    assert why_missing("data/imgaes", "model") is None
    (tmp_path / "data" / "imgaes").mkdir(parents=True)
    assert why_missing("data/imgaes", "dataset") is None


@pytest.mark.parametrize("script", [train_ecvae, train_flow, calibrate_decoder], ids=lambda script: script.__name__)
def test_training_scripts_look_before_they_load(script, tmp_path, monkeypatch):
    data = write_images(tmp_path / "data", count=4, mode="RGB")
    for argument, others in (("train_data_dir", []), ("pretrained_model_name_or_path", ["--train_data_dir", data])):
        args = script.parse_args([*SCRIPTS[script][0], *others, f"--{argument}", str(tmp_path / "imgaes")])
        with pytest.raises(SystemExit, match=argument):
            launch.run_script("script", args, script.run)
        assert not Path("x").exists()
    # Nor does a run that its data refuses open a repository.
    asked = []
    monkeypatch.setattr(launch, "open_repository", lambda *arguments, **kwargs: asked.append(arguments))
    own = {train_ecvae: TINY, train_flow: TINY_FLOW, calibrate_decoder: TINY_DECODER}[script]
    if script is calibrate_decoder:
        own = [*own, "--pretrained_model_name_or_path", write_autoencoder(tmp_path / "autoencoder")]
    given = ["--train_data_dir", data, "--output_dir", tmp_path / "out", "--push_to_hub", *own]
    with pytest.raises(ValueError, match="train_batch_size"):
        script.run(script.parse_args(given))
    assert asked == []


def test_names_of_folders_are_text(tmp_path):
    """Under an ASCII locale as well, where Python keeps what is no ASCII as surrogates."""
    for name, text in (("Größe".encode(), "Größe"), (b"\xff", "\\xff")):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        assert name_as_text(os.fsdecode(folder)) == text
    assert name_as_text("user/name") == "user/name"


@pytest.mark.parametrize(
    "script",
    [
        "train_ecvae",
        "train_flow",
        "calibrate_decoder",
        "evaluate",
        "evaluate_restoration",
        "publish",
        "report",
        "demo",
    ],
)
def test_a_wrong_argument_is_one_line(script, capsys, monkeypatch):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--no_such_argument", "1"])
    with pytest.raises(SystemExit) as refusal:
        module.main()
    assert refusal.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line and "Traceback" not in line


@pytest.mark.parametrize("name, times", [("torchrun", 2), ("accelerate", 2), ("wrapper.py", 1), (None, 1)])
def test_the_last_line_under_a_launcher(name, times, tmp_path):
    """Other programs that start a script are not waited for: they may have more to do."""
    (tmp_path / "script.py").write_text(FAILING)
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / str(name)).write_text(LAUNCHER)
    launcher = [] if name is None else [tmp_path / "launcher" / name]
    command = [sys.executable, *map(str, launcher), str(tmp_path / "script.py")]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
    lines = process.stderr.splitlines()
    assert process.returncode != 0 and lines[0] == LINE and lines.count(LINE) == times
    assert lines[-1] == ("RuntimeError: it has failed: 1" if name == "wrapper.py" else LINE)
