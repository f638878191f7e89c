# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The tolerance of the constraint, the dual variable, and the fixed points of both."""

import math

import pytest
import torch
import torch.nn as nn
from energies import Linear, Quadratic, drift_only, randn

from ecvae_diffusers import EnergyCalibrator, LangevinScheduler
from ecvae_diffusers.calibration import HEALTHY_MOVE


@pytest.mark.parametrize("drift_tolerance", [None, 0.02])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (20,)])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_auto_tolerance_allows_a_drift_of_one_length_at_every_size(shape, weight, drift_tolerance):
    """D K b^2 + rho^2: only the noise floor grows with the number D of entries. A given tolerance is per entry."""
    scheduler = LangevinScheduler(num_steps=4, noise_scale=0.01, conditioning_weight=weight)
    energy, entries = Linear(torch.zeros(shape)), math.prod(shape)
    calibrator = EnergyCalibrator(energy, scheduler, drift_tolerance=drift_tolerance)
    with pytest.raises(RuntimeError, match="`calibrate`"):
        calibrator.dual_step(1.0)
    calibrator.calibrate(torch.zeros(2, *shape))
    drift = HEALTHY_MOVE / math.sqrt(entries) if drift_tolerance is None else drift_tolerance
    assert calibrator.resolve_drift_tolerance() == pytest.approx(drift)
    assert calibrator.resolve_tolerance() == pytest.approx(entries * (scheduler.noise_variance() + drift**2))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "is_relative, initial_dual, constraint, expected",
    [
        (True, 30.0, 0.5, 30.0),  # on the bound
        (True, 30.0, 1.0, 30.2),  # twice the bound: a relative violation of 1
        (True, 30.0, 0.25, 29.9),
        (True, 0.1, 0.0, 0.0),  # not below 0
        (True, 0.0, 1.0, 0.2),  # and back
        (True, 99.9, 2.0, 100.0),  # not above max_dual
        (True, 30.0, 1e6, 30.2),  # a larger violation than 1 counts as 1
        (True, 30.0, -1e6, 29.8),  # of a constraint that can be negative, likewise
        (False, 30.0, 0.4, 29.98),  # as published: the step is neither relative nor clipped
        (False, 30.0, 200.0, 69.9),
    ],
)
def test_dual_step(is_relative, initial_dual, constraint, expected, as_tensor):
    """lambda <- clip(lambda + eta clip(C / epsilon - 1, -1, 1), 0, lambda_max), eta = 0.2, epsilon = 0.5, lambda_max = 100."""
    values = {"tolerance": 0.5, "initial_dual": initial_dual, "dual_learning_rate": 0.2}
    calibrator = EnergyCalibrator(None, LangevinScheduler(), **values, relative_dual_step=is_relative)
    calibrator.dual_step(torch.tensor(constraint, requires_grad=True) if as_tensor else constraint)
    assert calibrator.dual.item() == pytest.approx(expected, abs=1e-5)
    assert calibrator.dual.shape == () and not calibrator.dual.requires_grad


@pytest.mark.parametrize("size, channels", [(16, 1), (64, 3)])
def test_auto_tolerance_rests_at_the_fixed_point_at_every_size(size, channels):
    r"""
    The energy f(x) = |x - m|^2 / 2 has slope |x - m|. With K = 1 and no noise, the constraint is a^2 |theta - m|^2 for a generator
    that gives theta, and the iteration of `test_active_constraint_converges_to_the_fixed_point` rests where
    lambda = (a |t - m| / rho - 1) / a: with t at the same distance from m, at the same lambda for every size. A tolerance that
    grew with the number of entries would hold from the start, and lambda would fall to 0.
    """
    shape, a, distance = (channels, size, size), 0.5, 2.0
    direction = torch.nn.functional.normalize(randn(math.prod(shape), seed=1), dim=0).view(shape)
    center = 0.1 * randn(*shape, seed=2)
    target = center + distance * direction
    calibrator = EnergyCalibrator(Quadratic(center), drift_only(1, a), initial_dual=12.0, dual_learning_rate=0.05)
    theta = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.SGD([theta], lr=0.05)
    for _ in range(800):
        calibration = calibrator.calibrate(theta[None])
        ((theta - target).square().sum() + calibration.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        calibrator.dual_step(calibration.constraint)
    expected = (a * distance / HEALTHY_MOVE - 1) / a
    assert calibrator.dual.item() == pytest.approx(expected, rel=1e-2) and expected > 10
    assert calibration.constraint.item() == pytest.approx(HEALTHY_MOVE**2, rel=1e-2)


def solve(t: torch.Tensor, m: torch.Tensor, tolerance: float, initial_dual: float) -> tuple[torch.Tensor, float]:
    """Primal-dual iteration for a generator that gives one vector theta, with primal loss |theta - t|^2."""
    theta = nn.Parameter(torch.zeros(3))
    calibrator = EnergyCalibrator(
        Quadratic(m), drift_only(4, 0.2), tolerance=tolerance, initial_dual=initial_dual, dual_learning_rate=0.2
    )
    optimizer = torch.optim.SGD([theta], lr=0.1)
    for _ in range(500):
        calibration = calibrator.calibrate(theta.expand(4, -1))
        ((theta - t).square().sum() + calibration.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        calibrator.dual_step(calibration.constraint)
    return theta.detach(), calibrator.dual.item()


T, M, SHARE = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.0, 0.5, 0.5]), 1 - (1 - 0.2) ** 4


@pytest.mark.parametrize("tolerance, initial_dual", [(0.05, 4.0), (1.0, 0.0)])
def test_active_constraint_converges_to_the_fixed_point(tolerance, initial_dual):
    r"""
    On f(x) = |x - m|^2 / 2 without noise, x~ - x = -s (x - m) with s = 1 - (1 - a)^K: the constraint is
    s^2 |theta - m|^2 <= epsilon. The target is a constant in the primal step: the gradient of lambda C that the generator receives is
    2 lambda (x - x~) = 2 lambda s (theta - m), not 2 lambda s^2 (theta - m). The iteration rests where

        2 (theta - t) + 2 lambda s (theta - m) = 0    and    s^2 |theta - m|^2 = epsilon,

    at theta - m = (t - m) / (1 + lambda s) and lambda = (s |t - m| / sqrt(epsilon) - 1) / s. This theta is the constrained minimum:
    the projection of t onto a ball around m. lambda is s times its Lagrange multiplier.
    """
    theta, dual = solve(T, M, tolerance, initial_dual)
    distance = torch.linalg.vector_norm(T - M).item()
    expected_dual = (SHARE * distance / math.sqrt(tolerance) - 1) / SHARE
    assert expected_dual > 0.1
    assert dual == pytest.approx(expected_dual, rel=1e-3)
    assert torch.allclose(theta, M + (T - M) / (1 + expected_dual * SHARE), atol=1e-3)
    projection = M + (T - M) * math.sqrt(tolerance) / (SHARE * distance)
    assert torch.allclose(theta, projection, atol=1e-3)
    # The multiplier of the Lagrangian |theta - t|^2 + mu (s^2 |theta - m|^2 - epsilon).
    multiplier = torch.linalg.vector_norm(theta - T) / (SHARE**2 * torch.linalg.vector_norm(theta - M))
    assert dual == pytest.approx(SHARE * multiplier.item(), rel=2e-3)


def test_inactive_constraint_lets_go():
    """If t itself satisfies the constraint, lambda goes to 0 and the generator to its own minimum."""
    assert SHARE**2 * (T - M).square().sum() < 4.0
    theta, dual = solve(T, M, tolerance=4.0, initial_dual=4.0)
    assert dual == 0.0
    assert torch.allclose(theta, T, atol=1e-3)
