# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Held-out images, what their energies say of overfitting, and the augmentations that follow from it."""

import math
from dataclasses import replace

import pytest
import torch
from training_runs import metrics, train_tiny, write_images

from ecvae_diffusers import EnergyCalibrator, LangevinScheduler
from ecvae_diffusers.energy import energy_and_gradient
from ecvae_diffusers.training import augmentation as module
from ecvae_diffusers.training.augmentation import AdaptiveAugmentation, Augmentation, AugmentedEnergy
from ecvae_diffusers.training.options import ConfigError
from ecvae_diffusers.training.randomness import StepNoise
from ecvae_diffusers.training.tasks.vae_config import ECVAEConfig


def draw(probability: float, count: int = 64, seed: int = 0, size: int = 16) -> Augmentation:
    noise = StepNoise(seed, 0, 0, 1, torch.device("cpu"))
    return Augmentation.draw(probability, torch.zeros(count, 3, size, size), noise)


def images(count: int = 64, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def neutral(augmentation: Augmentation) -> Augmentation:
    """Without colour and holes."""
    one, zero = torch.ones_like(augmentation.contrast), torch.zeros_like(augmentation.contrast)
    hole = torch.zeros_like(augmentation.has_hole)
    return replace(augmentation, brightness=zero, saturation=one, contrast=one, has_hole=hole)


def test_nothing_changes_at_probability_0_and_a_share_at_others():
    torch.testing.assert_close(draw(0.0)(images()), images())
    augmentation = draw(0.3, count=2000)
    for changed in (augmentation.brightness.flatten() != 0, augmentation.has_hole):
        assert changed.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert (draw(1.0, 2000).translation.abs().amax(0) == 2).all() and draw(1.0, 2000).brightness.abs().max() <= 0.5


def test_translation_moves_and_fills_with_gray():
    augmentation = neutral(draw(1.0))
    x, moved = images(), augmentation(images())
    for i in range(8):
        down, right = augmentation.translation[i].tolist()
        expected = torch.nn.functional.pad(x[i], (8, 8, 8, 8))[:, 8 - down : 24 - down, 8 - right : 24 - right]
        torch.testing.assert_close(moved[i], expected)


def test_colours_change_as_named():
    """Brightness adds; saturation keeps the gray value of each pixel; contrast keeps the mean of the image."""
    x, still = images(), neutral(replace(draw(1.0), translation=torch.zeros(64, 2, dtype=torch.long)))
    drawn = draw(1.0)
    torch.testing.assert_close(replace(still, brightness=drawn.brightness)(x), x + drawn.brightness)
    torch.testing.assert_close(replace(still, saturation=drawn.saturation)(x).mean(1), x.mean(1))
    contrast = replace(still, contrast=drawn.contrast)(x)
    torch.testing.assert_close(contrast.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(contrast.std((1, 2, 3)), x.std((1, 2, 3)) * drawn.contrast.flatten())
    holes = replace(still, has_hole=drawn.has_hole)(x)
    assert ((holes == 0).all(1).sum((1, 2)) <= 64).all() and holes.isclose(x, atol=1e-6).all(1).sum(
        (1, 2)
    ).min() >= 256 - 64


def test_the_chain_goes_where_the_augmented_energy_falls():
    """The gradient of f(T(x)) is that of finite differences, and the same T is used at each step and for the data."""

    class Quadratic(torch.nn.Module):
        def forward(self, x):
            return (x - 0.3).square().flatten(1).sum(1) / 2

    x, augmentation = images(4, 8).double(), draw(0.8, 4, size=8)
    energy = AugmentedEnergy(Quadratic(), augmentation)
    _, gradient = energy_and_gradient(energy, x)
    direction, step = torch.randn_like(x), 1e-4
    found = (energy(x + step * direction) - energy(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1).float(), found.float(), rtol=1e-4, atol=1e-4)
    chain = LangevinScheduler(3, drift_step_size=0.1, noise_scale=0.0)
    end = EnergyCalibrator(energy, chain).run_chain(x)
    assert (energy(end) < energy(x)).all()
    both = energy(torch.cat([x, end]))
    torch.testing.assert_close(both, torch.cat([energy(x), energy(end)]))


def test_the_probability_follows_overfitting():
    adaptive, measured = AdaptiveAugmentation(True), AdaptiveAugmentation(False)
    healthy, overfitted = torch.tensor([-1.0, -0.9, 1.0]), torch.tensor([-1.0, 0.8, 1.0])
    for one in (adaptive, measured):
        one.update(healthy, 1000)
        assert one.overfitting == pytest.approx(0.05) and one.probability == 0
        for _ in range(200):
            one.update(overfitted, 1000)
        assert one.overfitting == pytest.approx(0.9, abs=0.01)
    assert measured.probability == 0 and adaptive.probability == 1
    resumed = AdaptiveAugmentation(True)
    resumed.load_state_dict(adaptive.state_dict())
    for one in (adaptive, resumed):
        for _ in range(60):
            one.update(healthy, 1000)
        assert (
            one.overfitting < 0.5 and one.probability == pytest.approx(adaptive.probability) and one.probability < 0.7
        )
    # An energy model that does not tell samples from data does not overfit either.
    adaptive.averages = torch.tensor([1.0, 0.0, 0.5])
    assert adaptive.overfitting == 0


def test_a_run_holds_images_out_augments_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RAMP", 200)
    monkeypatch.setattr(module, "TARGET", -math.inf)  # p rises from the first look
    data = write_images(tmp_path / "data", 24)
    arguments = ["--validation_fraction", 0.2, "--adaptive_augmentation", "--checkpointing_steps", 12]
    whole = train_tiny(data, tmp_path / "whole", 24, *arguments)
    train_tiny(data, tmp_path / "parts", 12, *arguments)
    parts = train_tiny(data, tmp_path / "parts", 24, "--resume_from_checkpoint", "latest")
    for name in ("dual", "energy_held_out", "augmentation_probability", "overfitting", "energy_real"):
        assert [one[name] for one in whole] == [one[name] for one in parts], name
    assert [one["augmentation_probability"] for one in whole][::8] == pytest.approx([0.32, 0.64, 0.96])
    # 5 of 24 images are not trained on.
    assert len((tmp_path / "whole" / "training_images.txt").read_text().split()) == 19
    # What is only measured changes nothing but the images.
    plain = train_tiny(data, tmp_path / "plain", 8, "--validation_fraction", 0.2)
    assert plain[0]["dual"] == whole[0]["dual"] and plain[-1]["augmentation_probability"] == 0
    assert "energy_held_out" not in metrics_without(data, tmp_path)


def metrics_without(data, tmp_path) -> dict:
    train_tiny(data, tmp_path / "without", 1)
    return metrics(tmp_path / "without")[0]


@pytest.mark.parametrize(
    "extra",
    [
        {"adaptive_augmentation": True, "train_data_dir": "x"},
        {"validation_fraction": 0.1, "dataset_name": "x", "streaming": True, "in_channels": 1},
        {"validation_fraction": 1.0, "train_data_dir": "x"},
    ],
)
def test_arguments_that_do_not_fit_are_refused(extra):
    with pytest.raises(ConfigError, match="--validation_fraction"):
        ECVAEConfig.from_flat({"output_dir": "out", **extra}).resolved().check()
