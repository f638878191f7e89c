# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Evaluations of restorations, and what their measures are worth."""

import json
import math
from pathlib import Path

import PIL.Image
import pytest
import torch

from ecvae_diffusers.evaluation import evaluate_restoration
from ecvae_diffusers.evaluation.evaluate_restoration import TASKS, task_names
from ecvae_diffusers.evaluation.restoration import Answers, Task, as_answers, classical, coverage, unknown_pixels
from ecvae_diffusers.training.data.digits import load_digits
from ecvae_diffusers.training.data.transforms import to_range


NUM_IMAGES = 8


def digits() -> torch.Tensor:
    return to_range(load_digits()[0][-NUM_IMAGES:])


@pytest.fixture(scope="module")
def run(make_pipeline, tmp_path_factory) -> Path:
    """A run over a folder of digits with a random model."""
    folder = tmp_path_factory.mktemp("restoration")
    pipe = make_pipeline()
    pipe.vae.register_to_config(reconstruction_variance=0.02)
    pipe.save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for i, image in enumerate(load_digits()[0][-NUM_IMAGES:]):
        PIL.Image.fromarray(image[0].numpy()).save(folder / "images" / f"{i}.png")
    given = [
        "--pretrained_model_name_or_path", folder / "model", "--baseline", folder / "model", "--image_dir", folder / "images",
        "--output_dir", folder / "out", "--tasks", "box_inpainting", "--num_restorations", 2,
        "--num_inference_steps", 2, 6, "--classical", "--batch_size", 3, "--device", "cpu",
    ]  # fmt: skip
    evaluate_restoration.main(list(map(str, given)))
    return folder


def test_table_protocol_and_pictures(run):
    found = json.loads((run / "out" / "restoration.json").read_text())
    assert found["protocol"]["num_images"] == NUM_IMAGES and "EfficientNet" in found["protocol"]["features"]
    rows = {(row["noise_std"], row["task"], row["method"]): row for row in found["rows"]}
    ours = ("ours, 2 steps", "ours, 6 steps", "baseline, 2 steps", "baseline, 6 steps")
    assert set(rows) == {
        *((0.0, "box_inpainting", method) for method in ("A^+ y", "biharmonic", *ours)),
        *((0.05, "box_inpainting", method) for method in ("A^+ y", "A_s y", "biharmonic + TV", *ours)),
    }
    for (noise, _, method), row in rows.items():
        if method in ours:
            assert (row["largest_relative_residual"] < 1e-5) == (noise == 0)
            assert row["num_network_calls"] == int(method.split()[1]) + 3 and row["seconds"] > 0
    # The same algorithm and seed, and the same weights.
    same, other = (rows[0.0, "box_inpainting", f"{method}, 6 steps"] for method in ("ours", "baseline"))
    assert same["psnr"] == other["psnr"] and same["kernel_distance"] == other["kernel_distance"]
    # Of fewer images than features there is none.
    assert all(row["frechet_distance"] is None for row in rows.values())
    task = Task("box_inpainting", digits(), 0.0)
    error = ((task.linear_answers()["A^+ y"] - task.clean) / 2).square().flatten(1).mean(1)
    expected = (-10 * error.log10()).mean().item()
    assert rows[0.0, "box_inpainting", "A^+ y"]["psnr"] == pytest.approx(expected, abs=1e-3)
    # Eight images, in rows of four: clean, measured, A^+ y, restored, uncertainty; twice as large.
    sizes = {PIL.Image.open(run / "out" / f"restoration_noise-{noise}.png").size for noise in ("0", "0.05")}
    assert sizes == {(2 * (20 * 17 - 1), 2 * (2 * 17 - 1))}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--image_dir", "out"], "--image_dir"),  # what an evaluation wrote
        (["--tasks", "colorization"], "--tasks colorization"),
        (["--noise_std", "0", "nan"], "--noise_std"),
        (["--noise_std", "25"], "--noise_std"),
        (["--device", "nonsense"], "--device"),
        (["--output_dir", "out"], "--output_dir"),
    ],
)
def test_wrong_input(run, arguments, named, capsys, monkeypatch):
    monkeypatch.chdir(run)
    given = ["--pretrained_model_name_or_path", "model", "--output_dir", "new", "--image_dir", "images"]
    with pytest.raises(SystemExit) as raised:
        evaluate_restoration.main([*given, *arguments])
    # One line, of the parser or of what came after it.
    line = raised.value.code if isinstance(raised.value.code, str) else capsys.readouterr().err.splitlines()[0]
    assert named in line and "\n" not in line


@pytest.mark.parametrize("name", [name for name in TASKS if name != "colorization"])
def test_tasks(name):
    task, noisy, again = (Task(name, digits(), noise_std) for noise_std in (0.0, 0.1, 0.1))
    assert torch.equal(task.measured, task.operator.A(task.clean)) and torch.equal(noisy.measured, again.measured)
    assert (noisy.measured - task.measured).std().item() == pytest.approx(0.1, rel=0.15)
    assert task.shown().shape == task.clean.shape
    (inverse,), (noisy_inverse, damped) = task.linear_answers().values(), noisy.linear_answers().values()
    torch.testing.assert_close(inverse, task.operator.A_dagger(task.measured).clamp(-1, 1))
    if name == "deblurring":  # where A^+ blows noise up
        errors = [(images - task.clean).square().mean() for images in (noisy_inverse, damped)]
        assert errors[1] < 0.5 * errors[0]
    for one in (task, noisy):
        assert unknown_pixels(one).any() == (name != "denoising" or one is noisy)
        if name == "box_inpainting":  # with noise too: the missing ones alone
            assert unknown_pixels(one)[0].nonzero().min() >= 4 and unknown_pixels(one)[0].nonzero().max() < 12


def test_tasks_that_fit():
    gray = [name for name in TASKS if name not in ("colorization", "denoising")]
    assert task_names(None, (1, 16, 16), 0.0) == gray
    assert task_names(None, (3, 16, 16), 0.1) == list(TASKS)
    assert task_names(None, (1, 28, 28), 0.0) == [name for name in gray if name != "compressed_sensing"]


def test_coverage_of_normal_errors():
    """Errors drawn with the stated deviation lie within as many of them as those of a normal distribution do."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(200, 1, 16, 16, generator=generator) * 2 - 1
    task = Task("box_inpainting", clean, 0.0)
    std = torch.rand(clean.shape, generator=generator) + 0.1
    mean = clean + std * torch.randn(clean.shape, generator=generator)
    found = coverage(task, Answers(single=mean, mean=mean, std=std), (0.5, 1.0, 2.0))
    assert found == pytest.approx([math.erf(factor / 2**0.5) for factor in (0.5, 1.0, 2.0)], abs=0.01)
    # No pixel varies over one image: it has no coverage.
    assert not unknown_pixels(Task("box_inpainting", digits()[:1], 0.0)).any()


@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_classical_peers_are_worth_beating(noise_std):
    """Each is nearer to the clean images than A^+ y: it is not a straw man."""
    for name in ("box_inpainting", "random_inpainting", "super_resolution_x4", "deblurring", "denoising"):
        task = Task(name, digits(), noise_std)
        if (found := classical(task)) is None:
            assert name == "denoising" and noise_std == 0
            continue
        error, inverse = (
            (answers.mean - task.clean).square().mean()
            for answers in (found[1], as_answers(list(task.linear_answers().values())[-1]))
        )
        # A blur without noise is undone by linear algebra alone, borders and all, which Wiener's filter does not know.
        assert error < inverse or (name == "deblurring" and noise_std == 0), name
    assert classical(Task("compressed_sensing", digits(), noise_std)) is None
