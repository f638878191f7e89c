"""The command `ecvae`: what it dispatches to, what it starts, and its own commands `sample` and `restore`."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import TINY, write_images

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline, FlowEC, cli
from ecvae_diffusers.cli import COMMANDS, main


FEW_STEPS = ["--num_restorations", 2, "--num_inference_steps", 2]


@pytest.fixture(scope="module")
def model(make_pipeline, tmp_path_factory):
    """A pipeline's folder, whose config has the error of reconstructions that training measures."""
    pipeline, folder = make_pipeline(), tmp_path_factory.mktemp("cli") / "model"
    pipeline.vae.register_to_config(reconstruction_variance=0.05)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(tmp_path):
    """A folder with `damaged.png` and `mask.png`, whose lower half is to be repainted."""
    picture = np.full((16, 16), 60, np.uint8)
    mask = np.repeat(np.uint8([0, 255]), 8)[:, None].repeat(16, axis=1)
    PIL.Image.fromarray(picture).save(tmp_path / "damaged.png")
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def refusal(capsys, *argv) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code
    error = capsys.readouterr().err or f"{ended.value.code}\n"
    assert error.count("\n") == 1
    return error


# The command itself


def test_help_lists_every_command(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed and command.summary in listed for name, command in COMMANDS.items())


@pytest.mark.parametrize("argv", ["", "sample --help", "restore --help", "evaluate --help", "report --help"])
def test_help_answers_without_torch(argv):
    check = "import sys; from ecvae_diffusers.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check, *argv.split()], check=True, capture_output=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_ends_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert not ended.value.code
    assert capsys.readouterr().out.endswith(f"example:\n  ecvae {name} {COMMANDS[name].example}\n")


def test_an_unknown_command_is_refused(capsys):
    assert "COMMAND" in refusal(capsys, "tran")


@pytest.mark.parametrize("first", ["ecvae_diffusers", "diffusers"])
def test_importing_the_package_is_cheap_and_registers_it(first, model):
    script = f"""
import sys
import {first}
assert ("torch" in sys.modules) == ({first!r} == "diffusers")
import ecvae_diffusers
from diffusers import AutoModel, DiffusionPipeline
model = AutoModel.from_pretrained(sys.argv[1], subfolder="vae")
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline) is ecvae_diffusers.ECVAEPipeline and type(model) is ecvae_diffusers.AutoencoderEC
assert ecvae_diffusers.operators.Inpainting and set(ecvae_diffusers.__all__) <= set(dir(ecvae_diffusers))
assert not hasattr(ecvae_diffusers, "nothing")
"""
    subprocess.run([sys.executable, "-c", script, model], check=True)


# What training is given, and what is started


@pytest.mark.parametrize(
    "file, argv, argument",
    [
        ("0.png", ["{}"], "--train_data_dir"),
        ("0.png", ["{}", "--streaming"], "--dataset_name"),
        ("train.parquet", ["{}"], "--dataset_name"),
        (None, ["{}"], "--train_data_dir"),
        (None, ["user/data"], "--dataset_name"),
    ],
)
def test_data_may_be_the_first_argument(file, argv, argument, tmp_path):
    folder = tmp_path / "data"
    if file is not None:
        folder.mkdir()
        (folder / file).touch()
    source, *others = [text.format(folder) for text in argv]
    assert cli.named_data([source, *others]) == [argument, source, *others]
    assert cli.named_data(["--config", "a.yaml"]) == ["--config", "a.yaml"]


@pytest.fixture
def started(monkeypatch):
    """The command lines that take the place of this process, which ends, of a machine with two GPUs."""
    lines = []

    def execv(_, line):
        lines.append(line)
        raise SystemExit

    for variable in cli.LAUNCHED:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "execv", execv)
    return lines


def test_several_gpus_get_a_process_each(started, capsys):
    with pytest.raises(SystemExit):
        cli.launch("train", ["--seed", "1"])
    (line,) = started
    assert line[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert line[line.index("--num_processes") + 1] == "2"
    assert line[-5:] == ["-m", "ecvae_diffusers.cli", "train", "--seed", "1"]
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("variable", cli.LAUNCHED)
def test_nothing_is_started_under_a_launcher(variable, started, monkeypatch, capsys):
    monkeypatch.setenv(variable, "2")
    cli.launch("train", [])
    assert not started and not capsys.readouterr().err


def test_a_cpu_gets_a_thread_per_physical_core(started, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    cli.launch("train", [])
    assert not started and 1 <= threads[0] <= os.cpu_count()
    assert "CPU" in capsys.readouterr().err
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli.launch("train", [])
    assert len(threads) == 1


def test_train_sample_restore_and_report(damaged):
    folder = damaged / "my_model"
    main(["train", write_images(damaged / "images", count=8), *TINY, "--max_train_steps", 2, "--output_dir", folder])
    main(["sample", folder, "-n", 4, "-o", damaged / "samples.png"])
    main(
        [
            "restore",
            damaged / "damaged.png",
            "--mask",
            damaged / "mask.png",
            "--model",
            folder,
            "-o",
            damaged / "restored",
            *FEW_STEPS,
        ]
    )
    main(["report", folder])
    for written in ("samples.png", "restored/restored.json", "my_model/report.html"):
        assert (damaged / written).is_file()


# Sample


def test_sample_writes_one_picture_or_a_folder(model, tmp_path, capsys):
    main(["sample", model, "-n", 3, "--seed", 1, "-o", tmp_path / "grid.png"])
    main(["sample", model, "-n", 3, "--seed", 1, "-o", tmp_path / "images", "--batch_size", 2, "--device", "cpu"])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["0.png", "1.png", "2.png"]
    grid = np.array(PIL.Image.open(tmp_path / "grid.png"))
    assert grid.shape == (33, 33)
    # The batch size changes nothing.
    assert (np.array(PIL.Image.open(tmp_path / "images" / "1.png")) == grid[:16, 17:]).all()
    pipeline = ECVAEPipeline.from_pretrained(model)
    expected = pipeline(3, generator=torch.Generator().manual_seed(1)).images[0]
    assert (np.array(expected) == grid[:16, :16]).all()


def test_sample_of_a_flow(tmp_path):
    torch.manual_seed(0)
    flow = FlowEC(sample_size=8, in_channels=3, num_levels=2, steps_per_level=1, hidden_channels=8).eval()
    ECFlowPipeline(flow=flow).save_pretrained(tmp_path / "flow")
    main(["sample", tmp_path / "flow", "-n", 2, "--temperature", 0.5, "-o", tmp_path / "samples.png"])
    assert PIL.Image.open(tmp_path / "samples.png").size == (17, 8)


def test_sample_overwrites_only_when_told(model, tmp_path, capsys):
    output = tmp_path / "samples.png"
    output.write_text("mine")
    assert "--output" in refusal(capsys, "sample", model, "-o", output)
    assert output.read_text() == "mine"
    main(["sample", model, "-n", 1, "-o", output, "--overwrite"])
    assert PIL.Image.open(output).size == (16, 16)


@pytest.mark.parametrize(
    "argument, value",
    [("num_images", 0), ("batch_size", 0), ("temperature", -1), ("device", "nonsense")],
)
def test_wrong_arguments_of_sample(argument, value, model, tmp_path, capsys):
    assert f"--{argument}" in refusal(capsys, "sample", model, f"--{argument}", value, "-o", tmp_path / "samples.png")
    assert not list(tmp_path.iterdir())


def test_sample_needs_a_pipeline(tmp_path, capsys):
    assert "nowhere" in refusal(capsys, "sample", tmp_path / "nowhere", "-o", tmp_path / "samples.png")
    (tmp_path / "empty").mkdir()
    assert "empty" in refusal(capsys, "sample", tmp_path / "empty", "-o", tmp_path / "samples.png")


# Restore


def test_restore_by_a_mask(model, damaged):
    output = damaged / "restored"
    main(
        [
            "restore",
            damaged / "damaged.png",
            "--mask",
            damaged / "mask.png",
            "--model",
            model,
            "-o",
            output,
            *FEW_STEPS,
        ]
    )
    record = json.loads((output / "restored.json").read_text())
    (restoration,) = record["restorations"]
    names = [*restoration["answers"], restoration["mean"], restoration["uncertainty"]]
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "restored.json"])
    assert (
        record["arguments"]["seed"] == 0 and len(restoration["answers"]) == len(restoration["relative_residuals"]) == 2
    )
    answers = [np.array(PIL.Image.open(output / name)) for name in restoration["answers"]]
    # The upper half was kept, to rounding, and the lower one was not.
    assert all(np.abs(answer[:8].astype(int) - 60).max() <= 2 for answer in answers)
    assert (answers[0][8:] != answers[1][8:]).any()
    uncertainty = np.array(PIL.Image.open(output / restoration["uncertainty"]))
    assert uncertainty[8:].mean() > uncertainty[:8].mean()


@pytest.mark.parametrize(
    "task, size", [("super_resolution_x2", 16), ("super_resolution_x4", 16), ("deblurring", 16), ("denoising", 16)]
)
def test_restore_by_a_task(task, size, model, damaged):
    options = {"deblurring": ["--blur_std", 1], "denoising": ["--noise_std", 0.2]}.get(task, [])
    folder = damaged / "pictures"
    folder.mkdir()
    os.replace(damaged / "damaged.png", folder / "damaged.png")
    main(["restore", folder, "--task", task, *options, "--model", model, "-o", damaged / "restored", *FEW_STEPS])
    scale = int(task[-1]) if task[-1].isdigit() else 1
    assert PIL.Image.open(damaged / "restored" / "damaged-mean.png").size == (size * scale, size * scale)


def test_restore_colours(make_pipeline, damaged):
    pipeline = make_pipeline(in_channels=3)
    pipeline.vae.register_to_config(reconstruction_variance=0.05)
    pipeline.save_pretrained(damaged / "model")
    PIL.Image.open(damaged / "damaged.png").convert("RGB").save(damaged / "gray.png")
    main(
        [
            "restore",
            damaged / "gray.png",
            "--task",
            "colorization",
            "--model",
            damaged / "model",
            "-o",
            damaged / "out",
            *FEW_STEPS,
        ]
    )
    assert PIL.Image.open(damaged / "out" / "gray-0.png").mode == "RGB"


@pytest.mark.parametrize(
    "argv, named",
    [
        (["damaged.png"], "--mask"),
        (["damaged.png", "--mask", "mask.png", "--task", "denoising"], "--task"),
        (["damaged.png", "--task", "denoising"], "--noise_std"),
        (["damaged.png", "--task", "deblurring"], "--blur_std"),
        (["damaged.png", "--mask", "mask.png", "--blur_std", "1"], "--blur_std"),
        (["damaged.png", "--task", "deblurring", "--blur_std", "0"], "--blur_std"),
        (["damaged.png", "--mask", "mask.png", "--noise_std", "3"], "--noise_std"),
        (["damaged.png", "--mask", "mask.png", "--num_restorations", "0"], "--num_restorations"),
        (["damaged.png", "--mask", "nowhere.png"], "--mask"),
        (["damaged.png", "--mask", "broken.png"], "--mask"),
        (["damaged.png", "--mask", "small.png"], "--mask"),
        (["broken.png", "--mask", "mask.png"], "picture"),
        (["nowhere.png", "--mask", "mask.png"], "picture"),
        (["damaged.png", "copy/damaged.png", "--mask", "mask.png"], "pictures"),
        (["damaged.png", "--mask", "mask.png", "--output_dir", "copy"], "--output_dir"),
    ],
)  # fmt: skip
def test_restore_refuses_before_a_model_is_loaded(argv, named, damaged, monkeypatch, capsys):
    monkeypatch.chdir(damaged)
    (damaged / "copy").mkdir()
    PIL.Image.open("damaged.png").save("copy/damaged.png")
    PIL.Image.open("mask.png").crop((0, 0, 16, 12)).save("small.png")
    (damaged / "broken.png").write_bytes((damaged / "damaged.png").read_bytes()[:50])
    before = sorted(damaged.rglob("*"))
    assert named in refusal(
        capsys, "restore", *argv, "--model", "no/model", *([] if "--output_dir" in argv else ["-o", "restored"])
    )
    assert sorted(damaged.rglob("*")) == before
