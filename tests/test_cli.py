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
from ecvae_diffusers.training.train_ecvae import parse_args


FEW_STEPS = ["--num_restorations", 2, "--num_inference_steps", 2]


@pytest.fixture(scope="module")
def model(make_pipeline, tmp_path_factory):
    """A pipeline's folder, whose config has the error of reconstructions that training measures."""
    pipeline, folder = make_pipeline(), tmp_path_factory.mktemp("cli") / "model"
    pipeline.vae.register_to_config(reconstruction_variance=0.05)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """The working folder, with `damaged.png` and `mask.png`, whose lower half is to be repainted."""
    mask = np.repeat(np.uint8([0, 255]), 8)[:, None].repeat(16, axis=1)
    PIL.Image.new("L", (16, 16), 60).save(tmp_path / "damaged.png")
    PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys, *argv) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code
    error = capsys.readouterr().err or f"{ended.value.code}\n"
    assert error.count("\n") == 1
    return error


def test_help_answers_without_torch():
    check = """
import sys
from ecvae_diffusers.cli import main
main([])
for name in ("sample", "restore", "calibrate-threshold", "evaluate", "report", "export", "page", "publish"):
    try:
        main([name, "--help"])
    except SystemExit:
        assert "torch" not in sys.modules, name
"""
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_help_lists_every_command_and_each_has_an_example(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in listed and command.summary in listed
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert not ended.value.code
        told = capsys.readouterr().out
        assert told.endswith(f"example:\n  ecvae {name} {command.example}\n")
        assert told.startswith(f"usage: ecvae {name}")
    assert "COMMAND" in refusal(capsys, "tran")


def test_importing_the_package_is_cheap_and_registers_it(model):
    """Here before diffusers; that it may come after it shows `tests/hub/test_loading.py`."""
    script = """
import sys
import ecvae_diffusers
assert "torch" not in sys.modules
from diffusers import AutoModel, DiffusionPipeline
model = AutoModel.from_pretrained(sys.argv[1], subfolder="vae")
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline) is ecvae_diffusers.ECVAEPipeline and type(model) is ecvae_diffusers.AutoencoderEC
assert ecvae_diffusers.operators.Inpainting and set(ecvae_diffusers.__all__) <= set(dir(ecvae_diffusers))
assert not hasattr(ecvae_diffusers, "nothing")
"""
    subprocess.run([sys.executable, "-c", script, model], check=True)


@pytest.mark.parametrize(
    "source, others, argument",
    [
        ("pictures", [], "train_data_dir"),
        ("pictures", ["--streaming", "--in_channels", "1"], "dataset_name"),
        ("pictures/0.png", [], "train_data_dir"),
        ("tables", [], "dataset_name"),
        ("./nowhere", [], "train_data_dir"),
        ("user/data", [], "dataset_name"),
    ],
)
def test_data_may_be_given_without_its_flag(source, others, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, file in (("pictures", "0.png"), ("tables", "train.parquet")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()
    rest = ["--output_dir", "out", "--resolution", "16", *others]
    widths = ["--block_out_channels", "16", "32"]  # the data is none of them
    for argv in ([source, *rest], [*rest, source], [*rest, *widths, source], [*widths, source, *rest]):
        config = parse_args(argv)
        assert getattr(config.data, argument) == source
    with pytest.raises(SystemExit):
        parse_args([source, *rest, "--train_data_dir", source])


@pytest.fixture
def started(monkeypatch):
    """The command lines that take the place of this process, which ends, of a machine with two GPUs."""
    lines = []

    def execv(_, line):
        lines.append(line)
        raise SystemExit

    for variable in (*cli.LAUNCHED, "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(os, "execv", execv)
    return lines


def test_several_gpus_get_a_process_each(started, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        cli.launch("train", ["--seed", "1"])
    (line,) = started
    assert line[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert line[line.index("--num_processes") + 1] == "2"
    assert line[-5:] == ["-m", "ecvae_diffusers.cli", "train", "--seed", "1"]
    assert capsys.readouterr().err.count("\n") == 1
    for variable in cli.LAUNCHED:  # under a launcher
        with monkeypatch.context() as launched:
            launched.setenv(variable, "2")
            cli.launch("train", [])
    assert len(started) == 1 and not capsys.readouterr().err


def test_a_cpu_gets_a_thread_per_physical_core(started, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    cli.launch("train", [])
    assert not started and 1 <= threads[0] <= os.cpu_count()
    assert "CPU" in capsys.readouterr().err
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli.launch("train", [])
    assert len(threads) == 1


def test_train_sample_restore_and_report(damaged):
    write_images(damaged / "images", count=8)
    main(["train", "images", *TINY, "--max_train_steps", 2, "--output_dir", "my_model"])
    main(["sample", "my_model", "-n", 4, "-o", "samples.png"])
    main(["restore", "damaged.png", "--mask", "mask.png", "--model", "my_model", "-o", "restored", *FEW_STEPS])
    main(["report", "my_model"])
    for written in ("samples.png", "restored/restored.json", "my_model/report.html"):
        assert (damaged / written).is_file()


def test_sample_writes_one_picture_or_a_folder(model, tmp_path):
    main(["sample", model, "-n", 3, "--seed", 1, "-o", tmp_path / "grid.png"])
    main(["sample", model, "-n", 3, "--seed", 1, "-o", tmp_path / "images", "--batch_size", 2, "--device", "cpu"])
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["0.png", "1.png", "2.png"]
    magnified = np.array(PIL.Image.open(tmp_path / "grid.png"))
    grid = magnified[::4, ::4]
    assert grid.shape == (33, 33) and (magnified == grid.repeat(4, 0).repeat(4, 1)).all()
    # The batch size changes nothing.
    assert (np.array(PIL.Image.open(tmp_path / "images" / "1.png")) == grid[:16, 17:]).all()
    expected = ECVAEPipeline.from_pretrained(model)(3, generator=torch.Generator().manual_seed(1)).images[0]
    assert (np.array(expected) == grid[:16, :16]).all()


def test_sample_keeps_the_lowest_energies(model, tmp_path):
    arguments = ["sample", model, "-n", 3, "--oversample", 4, "--seed", 1, "-o"]
    for batch_size in (1, 3):
        main([*arguments, tmp_path / str(batch_size), "--batch_size", batch_size])
    pipe = ECVAEPipeline.from_pretrained(model)
    draws = pipe(12, generator=torch.Generator().manual_seed(1), output_type="pt").images
    best = pipe.score(draws).view(3, 4).argmin(1)
    for i in range(3):
        expected = np.array((draws[4 * i + best[i], 0] * 255).round().to(torch.uint8))
        for batch_size in (1, 3):
            np.testing.assert_array_equal(np.array(PIL.Image.open(tmp_path / str(batch_size) / f"{i}.png")), expected)
    flow = FlowEC(sample_size=8, num_levels=2, steps_per_level=1, hidden_channels=8)
    ECFlowPipeline(flow=flow.eval()).save_pretrained(tmp_path / "flow")
    with pytest.raises(SystemExit, match="--oversample"):
        main(["sample", tmp_path / "flow", "--oversample", 2, "-o", tmp_path / "x.png"])


def test_sample_of_a_flow_overwrites_only_when_told(tmp_path, capsys):
    flow, output = FlowEC(sample_size=8, num_levels=2, steps_per_level=1, hidden_channels=8), tmp_path / "samples.png"
    ECFlowPipeline(flow=flow.eval()).save_pretrained(tmp_path / "flow")
    output.write_text("mine")
    assert "--output" in refusal(capsys, "sample", tmp_path / "flow", "-o", output)
    assert output.read_text() == "mine"
    main(["sample", tmp_path / "flow", "-n", 2, "--temperature", 0.5, "-o", output, "--overwrite"])
    assert PIL.Image.open(output).size == (8 * 17, 8 * 8)


def test_wrong_arguments_of_sample(model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for argument, value in (
        ("num_images", 0), ("batch_size", 1.5), ("temperature", -1), ("temperature", "nan"), ("device", "nonsense"), ("seed", 2**64),
    ):  # fmt: skip
        line = refusal(capsys, "sample", model, f"--{argument}", value, "-o", tmp_path / "samples.png")
        assert f"--{argument}" in line and str(value) in line
    for source in ("nowhere", "empty"):
        assert source in refusal(capsys, "sample", tmp_path / source, "-o", tmp_path / "samples.png")
    assert not (tmp_path / "samples.png").exists()


def test_restore_by_a_mask(model, damaged):
    main(["restore", "damaged.png", "--mask", "mask.png", "--model", model, "-o", "restored", *FEW_STEPS])
    output = damaged / "restored"
    record = json.loads((output / "restored.json").read_text())
    (restoration,) = record["restorations"]
    names = [*restoration["answers"], *(restoration[kind] for kind in ("mean", "uncertainty", "sheet"))]
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "restored.json"])
    assert record["arguments"]["seed"] == 0
    assert len(restoration["answers"]) == len(restoration["relative_residuals"]) == 2
    answers = [np.array(PIL.Image.open(output / name)) for name in restoration["answers"]]
    # The upper half was kept, to rounding, and the lower one was not.
    assert all(np.abs(answer[:8].astype(int) - 60).max() <= 2 for answer in answers)
    assert (answers[0][8:] != answers[1][8:]).any()
    uncertainty = np.array(PIL.Image.open(output / restoration["uncertainty"]))
    assert uncertainty[8:].mean() > uncertainty[:8].mean()
    # Damaged picture, two answers, mean, uncertainty: each 16 px and its line, magnified to 64 px.
    sheet = np.array(PIL.Image.open(output / restoration["sheet"]))
    assert sheet.shape == (4 * 16, 4 * (5 * 17 - 1))
    np.testing.assert_array_equal(sheet[::4, ::4][:, 17:33], answers[0])


def test_restore_by_a_task(make_pipeline, damaged):
    pipeline = make_pipeline(in_channels=3)
    pipeline.vae.register_to_config(reconstruction_variance=0.05)
    pipeline.save_pretrained("model")
    os.mkdir("pictures")
    PIL.Image.open("damaged.png").convert("RGB").save("pictures/gray.png")
    for task, size, *options in (
        ("super_resolution_x2", 32), ("super_resolution_x4", 64), ("deblurring", 16, "--blur_std", 1),
        ("denoising", 16, "--noise_std", 0.2), ("colorization", 16),
    ):  # fmt: skip
        main(["restore", "pictures", "--task", task, *options, "--model", "model", "-o", task, *FEW_STEPS])
        mean = PIL.Image.open(damaged / task / "gray-mean.png")
        assert mean.size == (size, size) and mean.mode == "RGB"
        assert PIL.Image.open(damaged / task / "gray-sheet.png").height == 64


@pytest.mark.parametrize(
    "argv, named",
    [
        ("damaged.png", "--mask"),
        ("damaged.png --mask mask.png --task denoising", "--task"),
        ("damaged.png --task denoising", "--noise_std"),
        ("damaged.png --task deblurring", "--blur_std"),
        ("damaged.png --mask mask.png --blur_std 1", "--blur_std"),
        ("damaged.png --mask mask.png --noise_std 3", "--noise_std"),
        ("damaged.png --mask mask.png --num_restorations 2.5", "--num_restorations"),
        ("damaged.png --mask mask.png --seed 99999999999999999999", "--seed"),
        ("damaged.png --mask nowhere.png", "--mask"),
        ("damaged.png --mask small.png", "--mask"),
        ("broken.png --mask mask.png", "picture"),
        ("damaged.png copy/damaged.png --mask mask.png", "pictures"),
        ("damaged.png --mask mask.png --output_dir copy", "--output_dir"),
    ],
)
def test_restore_refuses_before_a_model_is_loaded(argv, named, damaged, capsys):
    (damaged / "copy").mkdir()
    PIL.Image.open("damaged.png").save("copy/damaged.png")
    PIL.Image.open("mask.png").crop((0, 0, 16, 12)).save("small.png")
    (damaged / "broken.png").write_bytes((damaged / "damaged.png").read_bytes()[:50])
    before = sorted(damaged.rglob("*"))
    assert named in refusal(capsys, "restore", "-o", "restored", *argv.split(), "--model", "no/model")
    assert sorted(damaged.rglob("*")) == before
