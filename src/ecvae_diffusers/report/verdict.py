"""What `report.py` reads of a run, and what it says of its health."""

import html
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecvae_diffusers.report.page import prose_html
from ecvae_diffusers.training.run.log import (
    ENERGIES_FILE,
    EVALUATIONS_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    read_arguments,
    read_metrics,
)


# Healthy ranges, each relative to what stands after it.
CONSTRAINT_RANGE = (0.5, 2.0)  # the tolerance
DRIFT_RANGE = (0.5, 2.0)  # the drift tolerance
SPREAD_RANGE = (0.5, 1.5)  # the data's spread
GAP_RANGE = (-1.0, 1.0)  # the standard deviation of energies
MIN_ACTIVE = 0.1  # the number of latent dimensions
MIN_GRADIENT = 0.1  # the energy model's median gradient norm over the whole run
# Of the bound, within which lambda is held to be at it.
AT_BOUND = 0.001
# What of a run the verdict is on: its last quarter, but not less than so many logged steps.
MIN_JUDGED = 5
INCIDENTS = {"warning": "warnings", "rollback": "rollbacks", "stopped": "stopped"}


@dataclass
class Run:
    """What a training script left in `folder`. Records are those with a step."""

    folder: Path
    arguments: dict
    metrics: list[dict]
    evaluations: list[dict]
    events: list[dict]
    energies: list[dict]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """
        Raises:
            ValueError: if `folder` is no folder of a run, or its files can't be read.
        """
        if not folder.is_dir():
            raise ValueError(f"RUN must be the output folder of a training run, but {str(folder)!r} is no folder.")
        if not (folder / METRICS_FILE).is_file():
            raise ValueError(
                f"{str(folder)!r} holds no {METRICS_FILE}: it is not the output folder of a training run."
            )
        files = (METRICS_FILE, EVALUATIONS_FILE, EVENTS_FILE, ENERGIES_FILE)
        run = cls(folder, read_arguments(folder), *(read_records(folder / name) for name in files))
        if not run.metrics:
            raise ValueError(f"{str(folder / METRICS_FILE)!r} holds no logged step: has the run logged anything yet?")
        return run

    @property
    def judged(self) -> list[dict]:
        """The last part of the run, which the verdict is on."""
        return self.metrics[-max(len(self.metrics) // 4, MIN_JUDGED) :]

    def last(self, name: str) -> np.ndarray:
        """The finite values of the last part of the run."""
        values = series(self.judged, name)
        return values[np.isfinite(values)]

    def median(self, name: str) -> float:
        """Over the last part of the run; NaN where there is none."""
        return float(np.median(self.last(name))) if len(self.last(name)) else math.nan

    def argument(self, name: str) -> float:
        return number(self.arguments.get(name))

    @property
    def drift_is_judged(self) -> bool:
        """Whether `drift_tolerance` decides how far the chain may go; else a tolerance that the user set does."""
        adapted = "auto" in (
            self.arguments.get("calibration_tolerance", "auto"),
            self.arguments.get("langevin_drift_step"),
        )
        return adapted and self.drift_tolerance > 0

    @property
    def drift_tolerance(self) -> float:
        """Root-mean-square drift per pixel that is allowed; of runs that did not log it, their argument."""
        logged = self.median("drift_tolerance")
        return self.argument("drift_tolerance") if math.isnan(logged) else logged


def read_records(path: Path) -> list[dict]:
    try:
        records = read_metrics(path) if path.is_file() else []
    except OSError as error:
        raise ValueError(f"{str(path)!r} can't be read: {error}.") from error
    return [record for record in records if isinstance(record.get("step"), int)]


def number(value) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def series(records: list[dict], name: str) -> np.ndarray:
    """A value's course, NaN where it was not logged."""
    return np.array([number(record.get(name)) for record in records])


@dataclass
class Finding:
    """One line of the verdict: what was seen, what it means, and what to try where it is not healthy."""

    name: str
    healthy: bool
    seen: str
    meaning: str
    remedy: str


def judge_finite(run: Run) -> Finding:
    broken = {
        name
        for record in run.judged
        for name, value in record.items()
        # fp16's loss scaling lets gradients overflow now and then, and leaves that step out. JSON has `null` for such numbers.
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
    """Whether the constraint had a say, in most of the last part of the run."""
    off = run.last("calibration_off")
    if len(off) == 0:
        return None
    is_on = off.mean() <= 0.5
    return Finding(
        "Calibration",
        is_on,
        "on"
        if is_on
        else f"calibration is off in {off.mean():.0%} of these steps: this run trains a plain VAE (or its generator alone)",
        "Calibration is off where λ is 0, or the gradient that samples receive from it is below a hundredth of the one that "
        "reconstructions receive, while the energy model tells samples from data.",
        "A lower --calibration_tolerance or --drift_tolerance, or a larger --langevin_drift_step.",
    )


def judge_bounds(run: Run, name: str, bound: float, title: str, at_zero: str, at_bound: str) -> Finding | None:
    """Of a dual variable whether it is at 0 or at its upper bound, and what to try at each."""
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
        "λ is the weight of the calibration. It finds its own value between its bounds; at a bound it no longer steers.",
        at_bound if top > 0.5 else at_zero,
    )


def judge_dual(run: Run) -> Finding | None:
    return judge_bounds(
        run,
        "dual",
        run.argument("max_dual"),
        "Dual variable λ",
        "The constraint is kept without any weight: a larger --langevin_drift_step or a smaller --drift_tolerance.",
        "Let the chain move less (a smaller --langevin_drift_step) or allow it more "
        "(--drift_tolerance); lower --energy_learning_rate if the energy gap is wide; then raise --max_dual.",
    )


def judge_posterior_dual(run: Run) -> Finding | None:
    # Where it begins at its bound, as by default, and is there still, it is meant as a fixed weight.
    bound = run.argument("max_posterior_dual")
    if run.argument("initial_posterior_dual") == bound and run.median("posterior_dual") > 0.99 * bound:
        return None
    return judge_bounds(
        run,
        "posterior_dual",
        run.argument("max_posterior_dual"),
        "Posterior's λ",
        "The constraint is kept without any weight: a lower --posterior_tolerance.",
        "A Gaussian with independent latents is not the posterior itself, and may never keep the bound 'auto', which asks for "
        "that: then λ is a fixed weight, --max_posterior_dual. Give --posterior_tolerance a number a little below the "
        "constraint that was reached, or a smaller --posterior_drift_step.",
    )


def judge_constraint(run: Run) -> Finding | None:
    ratio = run.median("constraint") / run.median("tolerance")
    if math.isnan(ratio):
        return None
    low, high = CONSTRAINT_RANGE
    return Finding(
        "Constraint",
        low <= ratio <= high,
        f"{ratio:.2f} times its tolerance (healthy: {low:g} to {high:g})",
        "How far the chain moves a sample, squared and summed, against what it may: λ is to bring the two together.",
        "λ has not caught up, or is at its bound: raise --dual_learning_rate, or lower --energy_learning_rate."
        if ratio > high
        else "Usual while λ is still falling: train longer, or start from a lower --initial_dual. If λ stands still, a "
        "larger --langevin_drift_step.",
    )


def judge_drift(run: Run) -> Finding | None:
    ratio = run.median("drift") / run.drift_tolerance if run.drift_tolerance > 0 else math.nan
    if math.isnan(ratio) or not run.drift_is_judged:
        return None
    low, high = DRIFT_RANGE
    return Finding(
        "Drift of the chain",
        low <= ratio <= high,
        f"{run.median('drift'):.4f} a pixel, {ratio:.2f} times --drift_tolerance (healthy: {low:g} to {high:g})",
        "What the energy moves a pixel by, noise apart: too little teaches the decoder nothing, too much is no small "
        "correction any more.",
        "The energy model is far ahead of the decoder: lower --energy_learning_rate, or a smaller --langevin_drift_step."
        if ratio > high
        else "Train longer if λ is still falling; else a larger --langevin_drift_step or a higher "
        "--energy_learning_rate.",
    )


def energy_gap(records: list[dict]) -> np.ndarray:
    """Mean energy of calibrated samples minus that of data, in standard deviations of the two."""
    spread = np.hypot(series(records, "energy_real_std"), series(records, "energy_targets_std")) / math.sqrt(2)
    gap = series(records, "energy_targets") - series(records, "energy_real")
    # Where all energies of a kind are one, there is no spread to hold the gap against.
    return np.divide(gap, spread, out=np.full_like(gap, np.nan), where=spread > 0)


def judge_gap(run: Run) -> Finding | None:
    gaps = energy_gap(run.judged)
    gaps = gaps[np.isfinite(gaps)]
    if len(gaps) == 0:
        return None
    gap, (low, high) = np.median(gaps), GAP_RANGE
    return Finding(
        "Energy gap",
        low <= gap <= high,
        f"{gap:+.2f} standard deviations of the energies (healthy: {low:g} to {high:g})",
        "Calibrated samples minus data, in the eyes of the energy model: near 0 it can hardly tell them apart.",
        "It tells samples from data with ease: train longer, lower --energy_learning_rate, or give the decoder more "
        "channels."
        if gap > high
        else "Samples have a lower energy than data, so that the energy model points away from data: raise "
        "--energy_learning_rate.",
    )


def judge_energy_model(run: Run) -> Finding | None:
    course = series(run.metrics, "energy_gradient_norm")
    course = course[np.isfinite(course)]
    if len(course) == 0 or np.median(course) == 0 or len(run.last("energy_gradient_norm")) == 0:
        return None
    ratio = run.median("energy_gradient_norm") / np.median(course)
    return Finding(
        "Energy model",
        ratio >= MIN_GRADIENT,
        f"gradient norm {run.median('energy_gradient_norm'):.3g}, {ratio:.2g} times the whole run's "
        f"(healthy: at least {MIN_GRADIENT:g})",
        "A gradient that has all but vanished is an energy model that tells nothing apart any more, and teaches nothing.",
        "Lower --energy_learning_rate, and go on from the last step at which the energy model was alive.",
    )


def judge_samples(run: Run) -> Finding | None:
    ratio = run.median("sample_spread") / run.median("data_spread") if run.median("data_spread") > 0 else math.nan
    if math.isnan(ratio):
        return None
    low, high = SPREAD_RANGE
    return Finding(
        "Variety of samples",
        low <= ratio <= high,
        f"{ratio:.2f} times the data's (healthy: {low:g} to {high:g})",
        "The spread of pixels over a batch of prior samples: near 0 all samples are one and the generator is dead.",
        "The samples vary more than the data, as noise does: train longer, or lower --energy_learning_rate."
        if ratio > high
        else "Lower --energy_learning_rate and --max_dual, and look at the samples: if they are all alike, start again "
        "from before that.",
    )


def judge_active_units(run: Run) -> Finding | None:
    active, total = run.median("active_units"), run.argument("latent_channels")
    if math.isnan(active):
        return None
    least = 1.0 if math.isnan(total) else max(1.0, MIN_ACTIVE * total)
    return Finding(
        "Active units",
        active >= least,
        f"{active:g}" + ("" if math.isnan(total) else f" of {total:g} latent dimensions"),
        "Latent dimensions that carry something about the image: none is posterior collapse.",
        "Lower --kl_weight, or use --kl_warmup_steps or --free_bits; or fewer --latent_channels.",
    )


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
        "What a warning says; against rollbacks a lower --energy_learning_rate, --energy_spectral_norm, a "
        "higher --energy_regularization, --max_grad_norm, or fp32.",
    )


JUDGES = (
    judge_calibration, judge_finite, judge_dual, judge_posterior_dual, judge_constraint, judge_drift, judge_gap, judge_energy_model, judge_samples,
    judge_active_units, judge_events,
)  # fmt: skip


def verdict_html(run: Run) -> str:
    findings = [finding for judge in JUDGES if (finding := judge(run)) is not None]
    findings.sort(key=lambda finding: finding.healthy)
    bad = sum(not finding.healthy for finding in findings)
    overall = f"Look at this: {bad} of {len(findings)} checks" if bad else f"Healthy: all {len(findings)} checks"
    items = "".join(
        f'<li><span class="badge {"healthy" if finding.healthy else "look"}">'
        f"{'✓ healthy' if finding.healthy else '! look at this'}</span><div>"
        f"<strong>{html.escape(finding.name)}</strong>: {prose_html(finding.seen)}"
        f"<p>{prose_html(finding.meaning)}</p>"
        + ("" if finding.healthy else f'<p class="try"><strong>Try:</strong> {prose_html(finding.remedy)}</p>')
        + "</div></li>"
        for finding in findings
    )
    first, last = run.judged[0]["step"], run.judged[-1]["step"]
    return (
        f'<p class="badge overall {"look" if bad else "healthy"}">{overall}</p>'
        f"<p>On the last part of the run, steps {first} to {last} ({len(run.judged)} logged). A run that has only just "
        f'begun is not yet in its healthy range.</p><ul class="findings">{items}</ul>'
    )
