# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Judges the health of a run: what was seen in its last part, what it means, and what to try."""

import math
from dataclasses import dataclass

import numpy as np

from ecvae_diffusers.report.read import Run, series


# Healthy ranges, each relative to what stands after it.
CONSTRAINT_RANGE = (0.5, 2.0)  # the tolerance
DRIFT_RANGE = (0.5, 2.0)  # the drift tolerance
SPREAD_RANGE = (0.5, 1.5)  # the data's spread
GAP_RANGE = (-1.0, 1.0)  # the standard deviation of energies
MIN_ACTIVE = 0.1  # the number of latent dimensions
MIN_GRADIENT = 0.1  # the energy model's median gradient norm over the whole run
# Part of the bound within which lambda counts as at it.
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
    return [finding for judge in JUDGES if (finding := judge(run)) is not None]


def in_range(
    name: str, value: float, healthy: tuple[float, float], seen: str, meaning: str, too_high: str, too_low: str
) -> Finding | None:
    """Judge a value by its healthy range, which `seen` is followed by. `None` for a value that was not logged."""
    if math.isnan(value):
        return None
    low, high = healthy
    seen = f"{seen} (healthy: {f'{low:g} to {high:g}' if high < math.inf else f'at least {low:g}'})"
    return Finding(name, low <= value <= high, seen, meaning, too_high if value > high else too_low)


def ratio(value: float, whole: float) -> float:
    return value / whole if whole > 0 else math.nan


def judge_finite(run: Run) -> Finding:
    broken = {
        name
        for record in run.judged
        for name, value in record.items()
        # fp16's loss scaling lets gradients overflow now and then, and leaves that step out. JSON has `null` for such
        # numbers.
        if (value is None or isinstance(value, float) and not math.isfinite(value)) and "gradient_norm" not in name
    }
    return Finding(
        "Numbers",
        not broken,
        f"not finite: {', '.join(sorted(broken))}" if broken else "all finite",
        "A value that is not finite means that training has broken down.",
        "Keep --divergence_guard on; lower --learning_rate and --energy_learning_rate; use --max_grad_norm, or bf16 "
        "instead of fp16.",
    )


def judge_calibration(run: Run) -> Finding | None:
    """Judge whether the constraint had a say, in most of the last part of the run."""
    off = run.last("calibration_off")
    if len(off) == 0:
        return None
    is_on = off.mean() <= 0.5
    in_words = (
        f"calibration is off in {off.mean():.0%} of these steps: this run trains a plain VAE (or its generator alone)"
    )
    return Finding(
        "Calibration",
        is_on,
        "on" if is_on else in_words,
        "Calibration is off where λ is 0, or the gradient that samples receive from it is below a hundredth of the "
        "one that reconstructions receive, while the energy model tells samples from data.",
        "A lower --calibration_tolerance or --drift_tolerance, or a larger --langevin_drift_step.",
    )


def judge_bounds(run: Run, name: str, bound: float, title: str, at_zero: str, at_bound: str) -> Finding | None:
    """Judge whether a dual variable is at 0 or at its upper bound, with what to try at each."""
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
        "λ is the weight of the calibration. It finds its own value between its bounds; at a bound it no longer "
        "steers.",
        at_bound if top > 0.5 else at_zero,
    )


def judge_dual(run: Run) -> Finding | None:
    return judge_bounds(
        run, "dual", run.argument("max_dual"), "Dual variable λ",
        "The constraint is kept without any weight: a larger --langevin_drift_step or a smaller --drift_tolerance.",
        "Let the chain move less (a smaller --langevin_drift_step) or allow it more (--drift_tolerance); lower "
        "--energy_learning_rate if the energy gap is wide; then raise --max_dual.",
    )  # fmt: skip


def judge_posterior_dual(run: Run) -> Finding | None:
    # If it begins at its bound, as by default, and is there still, it is meant as a fixed weight.
    bound = run.argument("max_posterior_dual")
    if run.arguments.get("initial_posterior_dual", bound) == bound and run.median("posterior_dual") > 0.99 * bound:
        return None
    return judge_bounds(
        run, "posterior_dual", bound, "Posterior's λ",
        "The constraint is kept without any weight: the encoder needs no calibration.",
        "A Gaussian with independent latents is not the posterior itself, and may never keep the bound, which asks for "
        "that: then λ is a fixed weight. Set it with --max_posterior_dual.",
    )  # fmt: skip


def judge_constraint(run: Run) -> Finding | None:
    value = ratio(run.median("constraint"), run.median("tolerance"))
    return in_range(
        "Constraint", value, CONSTRAINT_RANGE,
        f"{value:.2f} times its tolerance",
        "How far the chain moves a sample, squared and summed, against what it may: λ is to bring the two together.",
        "λ has not caught up, or is at its bound: raise --dual_learning_rate, or lower --energy_learning_rate.",
        "Usual while λ is still falling: train longer, or start from a lower --initial_dual. If λ stands still, a "
        "larger --langevin_drift_step.",
    )  # fmt: skip


def judge_drift(run: Run) -> Finding | None:
    if not run.drift_is_judged:
        return None
    value = ratio(run.median("drift"), run.drift_tolerance)
    return in_range(
        "Drift of the chain", value, DRIFT_RANGE,
        f"{run.median('drift'):.4f} per pixel, {value:.2f} times --drift_tolerance",
        "What the energy moves a pixel by, without noise: too little teaches the decoder nothing, too much is no "
        "small correction any more.",
        "The energy model is far ahead of the decoder: lower --energy_learning_rate, or a smaller "
        "--langevin_drift_step.",
        "Train longer if λ is still falling; else a larger --langevin_drift_step or a higher --energy_learning_rate.",
    )  # fmt: skip


def energy_gap(records: list[dict]) -> np.ndarray:
    """Return the mean energy of calibrated samples minus that of data, in standard deviations of the two."""
    spread = np.hypot(series(records, "energy_real_std"), series(records, "energy_targets_std")) / math.sqrt(2)
    gap = series(records, "energy_targets") - series(records, "energy_real")
    # If all energies of a kind are equal, there is no spread to hold the gap against.
    return np.divide(gap, spread, out=np.full_like(gap, np.nan), where=spread > 0)


def judge_gap(run: Run) -> Finding | None:
    gaps = energy_gap(run.judged)
    gaps = gaps[np.isfinite(gaps)]
    gap = np.median(gaps) if len(gaps) else math.nan
    return in_range(
        "Energy gap", gap, GAP_RANGE,
        f"{gap:+.2f} standard deviations of the energies",
        "Calibrated samples minus data, in the eyes of the energy model: near 0 it can hardly tell them apart.",
        "It tells samples from data with ease: train longer, lower --energy_learning_rate, or give the decoder more "
        "channels.",
        "Samples have a lower energy than data, so that the energy model points away from data: raise "
        "--energy_learning_rate.",
    )  # fmt: skip


def judge_energy_model(run: Run) -> Finding | None:
    course = series(run.metrics, "energy_gradient_norm")
    course = course[np.isfinite(course)]
    value = ratio(run.median("energy_gradient_norm"), np.median(course)) if len(course) else math.nan
    return in_range(
        "Energy model", value, (MIN_GRADIENT, math.inf),
        f"gradient norm {run.median('energy_gradient_norm'):.3g}, {value:.2g} times the whole run's",
        "A gradient that has all but vanished is an energy model that tells nothing apart any more, and teaches "
        "nothing.",
        "",
        "Lower --energy_learning_rate, and resume from the last step at which the energy model was alive.",
    )  # fmt: skip


def judge_samples(run: Run) -> Finding | None:
    value = ratio(run.median("sample_spread"), run.median("data_spread"))
    return in_range(
        "Variety of samples", value, SPREAD_RANGE,
        f"{value:.2f} times the data's",
        "The spread of pixels over a batch of prior samples: near 0 all samples are the same and the generator is "
        "dead.",
        "The samples vary more than the data, as noise does: train longer, or lower --energy_learning_rate.",
        "Lower --energy_learning_rate and --max_dual, and look at the samples: if they are all alike, start again "
        "from before that.",
    )  # fmt: skip


def judge_active_units(run: Run) -> Finding | None:
    active, total = run.median("active_units"), run.argument("latent_channels")
    return in_range(
        "Active units", active, (1.0 if math.isnan(total) else max(1.0, MIN_ACTIVE * total), math.inf),
        f"{active:g}" + ("" if math.isnan(total) else f" of {total:g} latent dimensions"),
        "Latent dimensions that carry something about the image: none is posterior collapse.",
        "",
        "Lower --kl_weight, or use --kl_warmup_steps, or fewer --latent_channels.",
    )  # fmt: skip


def judge_events(run: Run) -> Finding:
    incidents = [event for event in run.events if event.get("kind") in INCIDENTS]
    recent = [event for event in incidents if event["step"] >= run.judged[0]["step"] or event["kind"] == "stopped"]
    counts = {name: sum(event["kind"] == kind for event in incidents) for kind, name in INCIDENTS.items()}
    seen = ", ".join(f"{name}: {count}" for name, count in counts.items() if count) or "none"
    if incidents and not recent:
        seen = f"{seen}, none in the last part of the run"
    if recent:
        seen = f"{seen}. The last one, at step {recent[-1]['step']}: {recent[-1].get('message', '')}"
    return Finding(
        "Guard events",
        not recent,
        seen,
        "The guard goes back to a healthy state where a run diverges, and warns of what may come to that.",
        "What a warning says; against rollbacks a lower --energy_learning_rate, --energy_spectral_norm, a higher "
        "--energy_regularization, --max_grad_norm, or fp32.",
    )


JUDGES = (
    judge_calibration, judge_finite, judge_dual, judge_posterior_dual, judge_constraint, judge_drift, judge_gap, judge_energy_model,
    judge_samples, judge_active_units, judge_events,
)  # fmt: skip
