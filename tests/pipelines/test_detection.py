# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Anomaly scores and maps of ECVAEPipeline, and the command that measures what is normal."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from training_runs import write_images

from ecvae_diffusers import ECVAEPipeline, ECVAERestorationPipeline
from ecvae_diffusers.anomaly import local_mean
from ecvae_diffusers.cli import main
from ecvae_diffusers.evaluation.anomaly import measure_normal
from ecvae_diffusers.pipelines import detection
from ecvae_diffusers.training.data.digits import NUM_TRAIN, load_digits


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def digits() -> ECVAEPipeline:
    pipe = ECVAEPipeline.from_pretrained(ROOT / "model_cards" / "digits", anomaly_threshold=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return load_digits()[0][NUM_TRAIN:]


@pytest.fixture(scope="module")
def measured(digits, held_out) -> dict:
    return measure_normal(digits, held_out[:160], 0.1)


def test_a_map_finds_a_defect(digits, held_out, measured):
    images = held_out[160:].float() / 255
    damaged = images.clone()
    damaged[:, :, 2:5, 2:5] = 1 - damaged[:, :, 2:5, 2:5]
    pipe = digits.from_pipe(digits, anomaly_threshold=measured)
    for some in (digits, pipe):  # with and without what is normal
        clean, found = some.anomaly(images), some.anomaly(damaged)
        assert found.score.shape == (len(images),) and found.map.shape == (len(images), 16, 16)
        assert (found.score > clean.score).float().mean() > 0.95
        place = found.map.flatten(1).argmax(1)
        inside = (place // 16 >= 1) & (place // 16 <= 5) & (place % 16 >= 1) & (place % 16 <= 5)
        assert inside.float().mean() > 0.8
    assert found.is_anomalous.float().mean() > 0.9 > 0.3 > clean.is_anomalous.float().mean()
    with pytest.raises(ValueError, match="threshold"):
        digits.anomaly(images[:1]).is_anomalous


def test_half_of_the_images_choose_the_threshold(digits, held_out, measured):
    pipe = digits.from_pipe(digits, anomaly_threshold=measured)
    assert measured["count"] == 80
    alarms = pipe.anomaly(held_out[1:160:2].float() / 255).is_anomalous
    assert alarms.sum() == 80 - 73 and 0 < measured["interval"][0] < 0.1 < measured["interval"][1]
    with pytest.raises(ValueError, match="images"):
        measure_normal(digits, held_out, 0.001)


def test_parts(digits, held_out, monkeypatch):
    images = held_out[:5].float() / 255
    parts = digits.anomaly_parts(images)
    x = (2 * images - 1).requires_grad_()
    energy = digits.energy_model(x).energy
    torch.testing.assert_close(parts["energy"], energy.detach())
    gradient = torch.autograd.grad(energy.sum(), x)[0]
    torch.testing.assert_close(parts["pixel_energy"], local_mean(gradient**2)[:, 0])
    monkeypatch.setattr(detection, "DETECTED_AT_A_TIME", 2)
    for name, part in digits.anomaly_parts(images).items():
        torch.testing.assert_close(part, parts[name], rtol=1e-3, atol=1e-5)
    without = ECVAEPipeline(vae=digits.vae)
    assert set(without.anomaly_parts(images)) == {"residual", "largest", "pixel_residual"}
    torch.testing.assert_close(without.anomaly(images).score, digits.anomaly(images).score, rtol=1e-3, atol=1e-5)


def test_models_without_a_measured_error_are_refused(pipe):
    with pytest.raises(ValueError, match="reconstruction_variance"):
        pipe.anomaly(torch.rand(1, 1, 16, 16))


def test_the_command_stores_the_threshold_in_the_folder(pipe, tmp_path, capsys):
    pipe.vae.register_to_config(reconstruction_variance=0.5)
    pipe.save_pretrained(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.*")}
    data = write_images(tmp_path / "data", count=80)
    main(["calibrate-threshold", tmp_path / "model", "--data", data, "--false_alarm_rate", 0.1])
    assert "40 images" in capsys.readouterr().out
    after = {path.name: path.read_bytes() for path in (tmp_path / "model").glob("*.*")}
    assert {name for name in after if after[name] != before[name]} == {"model_index.json"}
    stored = json.loads(after["model_index.json"])["anomaly_threshold"]
    for folder in (tmp_path / "model", tmp_path / "again"):
        loaded = DiffusionPipeline.from_pretrained(folder)
        assert loaded.config.anomaly_threshold == stored
        output = loaded.anomaly(torch.rand(3, 1, 16, 16))
        assert output.threshold == stored["threshold"] and output.is_anomalous.dtype == torch.bool
        if folder.name == "model":
            loaded.save_pretrained(tmp_path / "again")
    # The restoration pipeline shares the folder, and ignores it.
    restoration = ECVAERestorationPipeline.from_pretrained(tmp_path / "model")
    for other in (restoration, ECVAERestorationPipeline.from_pipe(loaded)):
        assert not [name for name in other.config if "anomaly" in name]
    for words, arguments in (
        ("--data", ["--data", data, "--false_alarm_rate", 0.01]),
        ("--false_alarm_rate", ["--data", data, "--false_alarm_rate", 2]),
        ("--data", ["--data", tmp_path / "nowhere"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["calibrate-threshold", tmp_path / "model", *arguments])
        assert words in (capsys.readouterr().err + str(ended.value.code))
    shutil.rmtree(tmp_path / "model" / "scheduler")
    with pytest.raises(SystemExit):
        main(["calibrate-threshold", data, "--data", data])
