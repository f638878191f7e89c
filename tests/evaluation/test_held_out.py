# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Images are what an evaluation takes them for: held-out ones were not trained on, and gray is not colour."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from evaluation_runs import measure
from training_runs import write_images

from ecvae_diffusers.evaluation import evaluate_restoration
from ecvae_diffusers.evaluation.schema import Evaluation
from ecvae_diffusers.hub.card import evaluation_table
from ecvae_diffusers.training.data.files import trained_hashes, write_hashes
from ecvae_diffusers.training.run.folder import HASHES_FILE


def write_colour(folder: Path, first: int, count: int, mode: str = "RGB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        PIL.Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")
    return folder


def test_gray_samples_are_measured_against_colour(tmp_path):
    """
    If one set has colour all are compared in colour; if none has, in gray; and the protocol says what became of which.
    """
    colour, gray = write_colour(tmp_path / "colour", 0, 12), write_colour(tmp_path / "gray", 0, 12, "L")
    shutil.copytree(gray, tmp_path / "as_rgb")
    for path in (tmp_path / "as_rgb").iterdir():
        PIL.Image.open(path).convert("RGB").save(path)

    def measured(name: str, generated: Path, train: Path, *arguments) -> dict:
        return measure(tmp_path / name, "--generated_image_dir", generated, "--train_data_dir", train, *arguments)

    found, of_rgb = (measured(f"e_{name}", tmp_path / name, colour) for name in ("gray", "as_rgb"))
    assert found["generation"] == of_rgb["generation"]
    assert found["generation"]["measures"]["kernel_distance"]["mean"] > 0
    assert set(found) == {"model", "weights", "protocol", "generation"} and found["model"] == "gray"
    assert found["generation"]["protocol"]["num_samples"] == 12
    protocol = found["protocol"]
    assert "3 channel" in protocol["images"] and "12 of 12" in protocol["files"]["generated"]
    assert protocol["files"]["train"] == "12 of 16x16"
    of_gray = measured("e", gray, gray)["protocol"]
    assert "1 channel" in of_gray["images"] and of_gray["files"]["train"] == "12 of 16x16"
    assert "3 channel" in measured("e3", gray, gray, "--test_data_dir", colour)["protocol"]["images"]


def test_generated_images_of_several_sizes_are_refused_or_named(tmp_path):
    data, made = write_colour(tmp_path / "data", 0, 10), write_colour(tmp_path / "made", 10, 10)
    PIL.Image.new("RGB", (24, 32)).save(made / "z.png")
    given = [tmp_path / "e", "--generated_image_dir", made, "--train_data_dir", data]
    with pytest.raises(SystemExit, match="generated_image_dir.*resolution"):
        measure(*given)
    files = measure(*given, "--resolution", 16)["protocol"]["files"]
    assert "10 of 16x16" in files["generated"] and "1 of 24x32" in files["generated"]


def test_images_that_were_trained_on_are_counted(tmp_path, caplog):
    """Also those outside the reference that is drawn, and saved in another format."""
    data, test = write_colour(tmp_path / "all" / "train", 0, 24), write_colour(tmp_path / "all" / "test", 24, 8)
    made = write_colour(tmp_path / "made", 30, 10)
    other = write_colour(tmp_path / "other", 40, 4)
    for i in range(4):
        PIL.Image.open(data / f"{i}.png").save(other / f"{i}.bmp")
    for name, train_dir, test_dir, expected in (
        ("none", data, test, (0, 8)), ("all", tmp_path / "all", test, (8, 8)), ("some", data, other, (4, 8)),
    ):  # fmt: skip
        caplog.clear()
        evaluation = measure(
            tmp_path / name, "--generated_image_dir", made, "--num_reference", 10, "--train_data_dir", train_dir,
            "--test_data_dir", test_dir,
        )  # fmt: skip
        held_out = evaluation["held_out"]
        assert (held_out["measures"]["num_trained_on"], held_out["protocol"]["num_images"]) == expected
        (row,) = [
            row for row in evaluation_table(Evaluation.from_json(evaluation)).splitlines() if "trained on" in row
        ]
        assert f"| {expected[0]} |" in row
        assert ("WARNING" in caplog.text) == (expected[0] > 0)
    caplog.clear()
    measure(tmp_path / "copies", "--generated_image_dir", test, "--train_data_dir", tmp_path / "all")
    assert "WARNING" in caplog.text and "--generated_image_dir" in caplog.text


def test_a_run_knows_what_it_was_trained_on(make_pipeline, tmp_path):
    """Whatever data an evaluation is given, and from its `best/` and its checkpoints too."""
    train, test = write_images(tmp_path / "train", 12), write_colour(tmp_path / "test", 0, 12, "L")
    run, pipeline = tmp_path / "run", make_pipeline()
    pipeline.vae.register_to_config(reconstruction_variance=0.1)
    folders = (run, run / "best", run / "checkpoint-7" / "pipeline")
    for folder in folders:
        pipeline.save_pretrained(folder)
    checked = evaluate_restoration.choose_clean(str(test), 100)
    assert {evaluate_restoration.count_trained_on(checked, str(folder)) for folder in folders} == {None}
    write_hashes(set(checked.hashes[:5]), run / HASHES_FILE)
    assert {evaluate_restoration.count_trained_on(checked, str(folder)) for folder in folders} == {5}
    assert trained_hashes("user/name") is None
    hashes = (run / HASHES_FILE).read_bytes()
    for damaged in (b"no hex", b"\xff\xfe"):
        (run / HASHES_FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match=HASHES_FILE):
            trained_hashes(run / "best")
    (run / HASHES_FILE).write_bytes(hashes)
    evaluation = measure(
        tmp_path / "e", "--pretrained_model_name_or_path", run / "best", "--num_samples", 20, "--num_likelihood_images", 0,
        "--seeds", 0, "--train_data_dir", train, "--test_data_dir", test,
    )  # fmt: skip
    assert evaluation["held_out"]["measures"] == {"num_trained_on": 5}
    given = [
        "--pretrained_model_name_or_path", run, "--image_dir", test, "--output_dir", tmp_path / "r", "--tasks",
        "super_resolution_x2", "--noise_std", 0, "--num_restorations", 1, "--num_inference_steps", 2,
    ]  # fmt: skip
    evaluate_restoration.main(list(map(str, given)))
    protocol = json.loads((tmp_path / "r" / "restoration.json").read_text(encoding="utf-8"))["protocol"]
    assert (protocol["num_trained_on"], protocol["files"]) == (5, "12 of 16x16")
    assert "5 of 12" in (tmp_path / "r" / "restoration.md").read_text(encoding="utf-8")
