# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Judges the health of a run: what was seen in its last part, what it means, and what to try."""

import math
from dataclasses import dataclass

import numpy as np

from ecvae_diffusers.report.read import Run, series


# Healthy ranges. Each is relative to the quantity in its comment.
CONSTRAINT_RANGE = (0.5, 2.0)  # the tolerance
DRIFT_RANGE = (0.5, 2.0)  # the drift tolerance
SPREAD_RANGE = (0.5, 1.5)  # the data's spread
GAP_RANGE = (-1.0, 1.0)  # the standard deviation of energies
MIN_ACTIVE = 0.1  # the number of latent dimensions
MIN_GRADIENT = 0.1  # the energy model's median gradient norm over the whole run
# Lambda counts as at a bound if it is this close to it, as a share of the upper bound.
AT_BOUND = 0.001
INCIDENTS = {"warning": "warnings", "rollback": "rollbacks", "stopped": "stopped"}


@dataclass
class Finding:
    """One line of the verdict: what was seen, what it means, and what to try if it is not healthy."""

    name: str
    healthy: bool
    seen: str
    meaning: str
    remedy: str


def findings(run: Run) -> list[Finding]:
    """Return all findings about a run, beginning with whether calibration is on."""
    constraint = ratio(run.median("constraint"), run.median("tolerance"))
    drift = ratio(run.median("drift"), run.drift_tolerance) if run.drift_is_judged else math.nan
    gap, spread = run.median("energy_gap"), ratio(run.median("sample_spread"), run.median("data_spread"))
    norms = series(run.metrics, "energy_gradient_norm")
    norm, norms = run.median("energy_gradient_norm"), norms[np.isfinite(norms)]
    alive = ratio(norm, float(np.median(norms))) if len(norms) else math.nan
    active, total = run.median("active_units"), run.argument("latent_channels")
    found = [
        judge_calibration(run),
        judge_finite(run),
        judge_bounds(
            run, "dual", run.argument("max_dual"), "Dual variable lambda",
            "The constraint is met without any weight: use a larger --langevin_drift_step or a smaller --drift_tolerance.",
            "Let the chain move less (a smaller --langevin_drift_step), or allow it to move more (a larger "
            "--drift_tolerance). Lower --energy_learning_rate if the energy gap is wide. Then raise --max_dual.",
        ),
        judge_posterior_dual(run),
        in_range(
            "Constraint", constraint, CONSTRAINT_RANGE, f"{constraint:.2f} times its tolerance",
            "The squared distance that the chain moves a sample, relative to what is allowed. Lambda adapts to bring the two "
            "together.",
            "Lambda has not caught up, or is at its bound: raise --dual_learning_rate, or lower --energy_learning_rate.",
            "This is usual while lambda is still falling: train longer, or start from a lower --initial_dual. If lambda no longer "
            "changes, use a larger --langevin_drift_step.",
        ),
        in_range(
            "Drift of the chain", drift, DRIFT_RANGE,
            f"{run.median('drift'):.4f} per pixel, {drift:.2f} times its tolerance",
            "How far the chain moves a pixel, without its noise. Too little teaches the decoder nothing; too much is no "
            "longer a small correction.",
            "The energy model is far ahead of the decoder: lower --energy_learning_rate or --langevin_drift_step.",
            "Train longer if lambda is still falling. Otherwise raise --langevin_drift_step or --energy_learning_rate.",
        ),
        in_range(
            "Energy gap", gap, GAP_RANGE, f"{gap:+.2f} standard deviations of the energies",
            "The mean energy of calibrated samples minus that of data. Near 0, the energy model can hardly tell them apart.",
            "The energy model easily tells samples from data: train longer, lower --energy_learning_rate, or give the "
            "decoder more channels.",
            "Samples have a lower energy than data, so the energy model leads away from data: raise "
            "--energy_learning_rate.",
        ),
        in_range(
            "Energy model", alive, (MIN_GRADIENT, math.inf), f"gradient norm {norm:.3g}, {alive:.2g} times that of the whole run",
            "An energy model whose gradient has almost vanished tells nothing apart and teaches the generator nothing.",
            "",
            "Lower --energy_learning_rate, and resume from the last checkpoint before the gradient vanished.",
        ),
        in_range(
            "Variety of samples", spread, SPREAD_RANGE, f"{spread:.2f} times that of the data",
            "The spread of pixels over a batch of prior samples. Near 0, all samples are the same.",
            "Samples vary more than the data, as noise does: train longer, or lower --energy_learning_rate.",
            "Lower --energy_learning_rate and --max_dual. If all samples look alike, resume from a checkpoint before they "
            "did.",
        ),
        in_range(
            "Active units", active, (1.0 if math.isnan(total) else max(1.0, MIN_ACTIVE * total), math.inf),
            f"{active:g}" + ("" if math.isnan(total) else f" of {total:g} latent dimensions"),
            "Latent dimensions that carry information about the image. None means posterior collapse.",
            "",
            "Lower --kl_weight, or use --kl_warmup_steps or fewer --latent_channels.",
        ),
        judge_events(run),
    ]  # fmt: skip
    return [finding for finding in found if finding is not None]


def in_range(
    name: str, value: float, healthy: tuple[float, float], seen: str, meaning: str, too_high: str, too_low: str
) -> Finding | None:
    """Judge a value by its healthy range, which is added to `seen`. Return `None` for a value that was not logged."""
    if math.isnan(value):
        return None
    low, high = healthy
    seen = f"{seen} (healthy: {f'{low:g} to {high:g}' if high < math.inf else f'at least {low:g}'})"
    return Finding(name, low <= value <= high, seen, meaning, too_high if value > high else too_low)


def ratio(value: float, whole: float) -> float:
    return value / whole if whole > 0 else math.nan


def judge_calibration(run: Run) -> Finding | None:
    """Judge whether calibration was on in most of the last part of the run."""
    off = run.last("calibration_off")
    if len(off) == 0:
        return None
    is_on = off.mean() <= 0.5
    return Finding(
        "Calibration",
        is_on,
        "on" if is_on else f"calibration is off in {off.mean():.0%} of these steps: this run trains a plain generator",
        "Calibration is off if the energy model tells samples from data, but lambda is 0, or samples receive less than a "
        "hundredth of the gradient that reconstructions receive.",
        "Use a lower --calibration_tolerance or --drift_tolerance, or a larger --langevin_drift_step.",
    )


def judge_finite(run: Run) -> Finding:
    broken = sorted(
        {
            name
            for record in run.judged
            for name, value in record.items()
            # With fp16, gradients overflow now and then, and loss scaling skips that step. JSON has `null` for such
            # numbers.
            if (value is None or isinstance(value, float) and not math.isfinite(value)) and "gradient_norm" not in name
        }
    )
    return Finding(
        "Numbers",
        not broken,
        f"not finite: {', '.join(broken)}" if broken else "all finite",
        "A value that is not finite means that training has broken down.",
        "Keep --divergence_guard on; lower --learning_rate and --energy_learning_rate; use --max_grad_norm, or "
        "--mixed_precision bf16 instead of fp16.",
    )


def judge_bounds(run: Run, name: str, bound: float, title: str, at_zero: str, at_bound: str) -> Finding | None:
    """Judge whether a dual variable is at 0 or at its upper bound. `at_zero` and `at_bound` say what to try."""
    dual = run.last(name)
    if len(dual) == 0 or run.argument("dual_learning_rate") == 0:  # then lambda is a weight that the user chose
        return None
    top, zero = (dual >= (1 - AT_BOUND) * bound).mean(), (dual <= AT_BOUND).mean()
    seen = f"{dual[-1]:.4g}, inside its bounds 0 and {bound:g}"
    if zero > 0.5:
        seen = f"at 0 in {zero:.0%} of these steps"
    if top > 0.5:
        seen = f"at its upper bound ({bound:g}) in {top:.0%} of these steps"
    return Finding(
        title,
        max(top, zero) <= 0.5,
        seen,
        "Lambda is the weight of calibration. It adapts between its bounds; at a bound it can't.",
        at_bound if top > 0.5 else at_zero,
    )


def judge_posterior_dual(run: Run) -> Finding | None:
    # If it starts at its bound, as by default, and is still there, it is meant as a fixed weight.
    bound = run.argument("max_posterior_dual")
    if run.arguments.get("initial_posterior_dual", bound) == bound and run.median("posterior_dual") > 0.99 * bound:
        return None
    return judge_bounds(
        run, "posterior_dual", bound, "Posterior's lambda",
        "The constraint is met without any weight: the encoder needs no calibration.",
        "A Gaussian with independent latents can't match the posterior and may never meet the constraint. Then lambda is a fixed "
        "weight: set it with --max_posterior_dual.",
    )  # fmt: skip


def judge_events(run: Run) -> Finding:
    incidents = [event for event in run.events if event.get("kind") in INCIDENTS]
    recent = [event for event in incidents if event["step"] >= run.judged[0]["step"] or event["kind"] == "stopped"]
    counts = {name: sum(event["kind"] == kind for event in incidents) for kind, name in INCIDENTS.items()}
    seen = ", ".join(f"{name}: {count}" for name, count in counts.items() if count) or "none"
    if recent:
        seen = f"{seen}. The last one, at step {recent[-1]['step']}: {recent[-1].get('message', '')}"
    elif incidents:
        seen = f"{seen}, none in the last part of the run"
    return Finding(
        "Guard events",
        not recent,
        seen,
        "The guard returns to a healthy state if a run diverges, and warns of signs of divergence.",
        "Follow the warnings. Against rollbacks, use a lower --energy_learning_rate, --energy_spectral_norm, a higher "
        "--energy_regularization, --max_grad_norm, or --mixed_precision no.",
    )
