"""All command lines expand `~` in folders, files and Hub ids, refuse empty ones, and say at once what does not exist."""

import argparse
import ast
import importlib
import os
import time
from pathlib import Path

import pytest
from hub_server import HubServer
from huggingface_hub import constants
from training_runs import write_images

from ecvae_diffusers.commands import publish
from ecvae_diffusers.evaluation import evaluate, evaluate_restoration
from ecvae_diffusers.report import report
from ecvae_diffusers.training import calibrate_decoder, train_ecvae, train_flow
from ecvae_diffusers.training.run.places import check_places, name_as_text, why_missing
from ecvae_diffusers.training.run.session import run_script


ROOT = Path(__file__).resolve().parents[3]
TRAINING = ["--train_data_dir", "x", "--output_dir", "x"]
MODEL = ["--pretrained_model_name_or_path", "x"]
SCRIPTS = {
    "train_ecvae": (train_ecvae.parse_args, TRAINING),
    "train_flow": (train_flow.parse_args, TRAINING),
    "calibrate_decoder": (calibrate_decoder.parse_args, [*TRAINING, *MODEL]),
    "evaluate": (evaluate.parse_args, [*TRAINING, *MODEL]),
    "evaluate_restoration": (evaluate_restoration.parse_args, [*MODEL, "--image_dir", "x", "--output_dir", "x"]),
    "publish": (publish.parse_args, ["x", "--output_dir", "x"]),
}  # fmt: skip
OF_TRAINING = (
    "train_data_dir", "output_dir", "pretrained_model_name_or_path", "resume_from_checkpoint",
    "evaluation_features",
)  # fmt: skip
PLACES = [
    *[(script, argument) for script in ("train_ecvae", "train_flow", "calibrate_decoder") for argument in OF_TRAINING],
    ("calibrate_decoder", "latents_file"),
    *[
        ("evaluate", argument)
        for argument in ("train_data_dir", "test_data_dir", "output_dir", "cache_dir", "pretrained_model_name_or_path", "features")
    ],
    *[
        ("evaluate_restoration", argument)
        for argument in ("image_dir", "output_dir", "pretrained_model_name_or_path", "baseline", "features")
    ],
    ("publish", "output_dir"),
]  # fmt: skip


@pytest.mark.parametrize("script, argument", PLACES)
def test_home_is_expanded_and_nothing_empty_is_taken(script, argument, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    parse, given = SCRIPTS[script]
    for text, expected in (("~/x", str(tmp_path / "x")), ("./~/x", "./~/x")):
        parsed = parse([*given, f"--{argument}", text])
        values = vars(parsed) if isinstance(parsed, argparse.Namespace) else parsed.flat()
        assert values[argument] == expected
    for wrong in ("", "  ", "~nobody-of-that-name/x"):
        with pytest.raises(SystemExit):
            parse([*given, f"--{argument}={wrong}"])
        assert f"--{argument}" in capsys.readouterr().err


def test_places_of_a_config_and_places_with_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    # In UTF-8, with and without a byte order mark, as editors of Windows write it.
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.yaml").write_bytes(mark + "# Größe\ndataset_name: ~/Bücher\noutput_dir: ~/out\n".encode())
        config = train_ecvae.parse_args(["--config", "~/a.yaml"])
        assert (config.data.dataset_name, config.run.output_dir) == (str(tmp_path / "Bücher"), str(tmp_path / "out"))
    parse, given = SCRIPTS["evaluate"]
    args = parse([*given, "--out_of_distribution", "a=~/x", "b=y"])
    assert args.out_of_distribution == [f"a={tmp_path}/x", "b=y"]
    parse, given = SCRIPTS["publish"]
    args = parse(
        [*given, "--evaluation", "~/e", "--details", "~/d", "--training_seeds", "0=~/s", "--baseline", "B=~/b"]
    )
    assert (args.evaluation, args.details) == (str(tmp_path / "e"), str(tmp_path / "d"))
    assert (args.training_seeds, args.baseline) == ([f"0={tmp_path}/s"], f"B={tmp_path}/b")
    monkeypatch.setattr("sys.argv", ["report.py", "~/run"])
    with pytest.raises(SystemExit, match=str(tmp_path / "run")):
        report.main()


@pytest.mark.parametrize("argument", ["train_data_dir", "test_data_dir", "generated_image_dir", "image_dir"])
def test_a_folder_of_pictures_must_be_there(argument, tmp_path):
    with pytest.raises(ValueError, match=argument):
        check_places(argparse.Namespace(**{argument: str(tmp_path / "nowhere")}))
    check_places(argparse.Namespace(**{argument: str(tmp_path)}))


@pytest.mark.parametrize("source", ["./x", "a/b/c", "/nowhere/x", "x/", "with space"])
@pytest.mark.parametrize(
    "argument", ["dataset_name", "pretrained_model_name_or_path", "baseline", "out_of_distribution"]
)
def test_what_is_no_hub_id_is_told_without_the_hub(argument, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "unused")
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


@pytest.mark.parametrize("script", ["train_ecvae", "train_flow", "calibrate_decoder"])
def test_training_scripts_look_before_they_load(script, tmp_path):
    parse, given = SCRIPTS[script]
    write_images(tmp_path / "data", count=1)
    for argument, others in (
        ("train_data_dir", []),
        ("pretrained_model_name_or_path", ["--train_data_dir", tmp_path / "data"]),
    ):
        args = parse([*given, *others, f"--{argument}", str(tmp_path / "imgaes")])
        with pytest.raises(SystemExit, match=argument):
            run_script(script, args, importlib.import_module(script).main)
        assert not Path("x").exists()


def test_names_of_folders_are_text(tmp_path):
    """Under an ASCII locale as well, where Python keeps what is no ASCII as surrogates."""
    for name, text in (("Größe".encode(), "Größe"), (b"\xff", "\\xff")):
        folder = os.fsencode(tmp_path) + b"/" + name
        os.mkdir(folder)
        assert name_as_text(os.fsdecode(folder)) == text
    assert name_as_text("user/name") == "user/name"


def test_text_files_name_their_encoding():
    """Otherwise reading and writing would depend on the locale, which is ASCII in many containers."""
    found = []
    for path in (
        path for name in ("src", "training", "benchmarks", "pipelines") for path in (ROOT / name).rglob("*.py")
    ):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or any(keyword.arg == "encoding" for keyword in call.keywords):
                continue
            is_method = isinstance(call.func, ast.Attribute)
            name = call.func.attr if is_method else getattr(call.func, "id", None)
            owner = ast.unparse(call.func.value) if is_method else ""
            opens = name == "open" and not owner.startswith(("PIL", "Image", "os", "wave", "webbrowser"))
            modes = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] + call.args[not is_method :][
                :1
            ]
            is_binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
            if (is_method and name in ("read_text", "write_text")) or (opens and not is_binary):
                found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert not found, "\n".join(found)
