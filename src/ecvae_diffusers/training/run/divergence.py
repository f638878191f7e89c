"""Divergence guard: detect that training diverges, and roll back to a healthy state.

The guard observes every tenth step, and every logged one. Energy-based training breaks down in few ways. Each shows in the observed
scalars before it ruins the samples:

- A value is not finite.
- The energy gap, a loss, a gradient norm or the constraint is far outside its running range.
- The energy model is worse than a constant one: its loss is far above 0. This is how it breaks down before there is a running range.
- lambda stays at its bound while the constraint is far above its tolerance.
- All samples are alike.
- The energy model is dead: its gradient vanishes. This is how a model with spectral normalization fails, whose energies can't explode.
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply

from ecvae_diffusers.training.config import TrainingConfig
from ecvae_diffusers.training.run.log import record_event
from ecvae_diffusers.training.tasks.networks import Trained


# Largest number of steps from one observation to the next, so that the guard sees as much of a run that seldom logs.
INTERVAL = 10
# Observations before the guard compares values with their running range, and observations in a running range.
WARMUP, WINDOW = 20, 50
# A value is far outside its range if it differs from the running median by more than this many widths. The width is the 90th minus
# the 10th percentile, but at least half of the median's absolute value.
RANGE_FACTOR = 20.0
# The energy model is dead if its gradient norm is below this share of its running median. Samples are all alike if their spread
# over the batch is below this share of the data's spread.
MIN_GRADIENT, MIN_SPREAD = 0.1, 0.05
# Observations in a row after which a doubt becomes an alarm. Doubts are samples that are alike, an energy model that is dead or worse
# than a constant one, and clipped gradients; for fewer steps they may be chance.
LASTING = 5
# lambda at its bound is reported after at least this many steps, and this many observations, in a row: early in training it is often
# there. It is an alarm if the median of constraint over tolerance is above RUNAWAY. Otherwise the run is as healthy as with a fixed lambda.
PINNED_STEPS, PINNED_OBSERVATIONS, RUNAWAY = 500, 50, 10.0
# Calibration is off if its gradient is below this share of the reconstruction's gradient. A warning follows after this many steps.
MIN_CALIBRATION_WEIGHT, OFF_STEPS = 0.01, 100
# Number of states kept in main memory (at least 2, because the newest may already be unhealthy), and steps between them.
HEALTHY_STATES, HEALTHY_STATE_STEPS = 3, 100
# Observations without an alarm after which a state counts as healthy, because a fault shows some steps later.
CONFIRMATIONS = 2

GRADIENTS = ("gradient_norm_max", "energy_gradient_norm_max")
RANGED = ("energy_gap", *GRADIENTS, "reconstruction", "bits_per_dimension", "constraint_max")


def calibration_state(scalars: dict[str, float]) -> dict[str, int]:
    """
    Return whether calibration has an effect at an observed step.

    `calibrating` is 1 if lambda is above 0 and the constraint's gradient with respect to samples is at least a hundredth of the
    gradient of the generator's own loss with respect to reconstructions. `calibration_off` is 1 if `calibrating` is 0 although the
    energy model separates samples from data: their mean energies differ by more than the spread of the energies.
    """
    least = MIN_CALIBRATION_WEIGHT * scalars.get("reconstruction_gradient_norm", 0.0)
    calibrating = scalars["dual"] > 0 and scalars["calibration_gradient_norm"] >= least
    spread = math.hypot(scalars["energy_real_std"], scalars["energy_samples_std"]) / math.sqrt(2)
    off = not calibrating and scalars["energy_samples"] - scalars["energy_real"] > spread
    return {"calibrating": int(calibrating), "calibration_off": int(off)}


class DivergenceGuard:
    """
    A detector of divergence in the scalars of observed steps.

    Args:
        max_dual (`float`): Upper bound of lambda.
        max_grad_norm (`float`, *optional*): The norm to which gradients are clipped. Logged norms are those before clipping. A single
            outlier that clipping brings back into the range is no alarm: likelihoods of normalizing flows have such outliers.
        energy_regularization (`float`, *optional*, defaults to 0.0): Weight alpha of the mean squared energies. The energy model's loss is
            then at least -1 / (2 alpha), and that of a constant energy of 0 is 0. A loss above 1 / (2 alpha) is a doubt.
        interval (`int`, *optional*, defaults to 10): Steps from one observation to the next.
    """

    def __init__(
        self,
        max_dual: float,
        max_grad_norm: float | None = None,
        energy_regularization: float = 0.0,
        interval: int = INTERVAL,
    ):
        self.max_dual, self.max_grad_norm = max_dual, math.inf if max_grad_norm is None else max_grad_norm
        self.energy_regularization = energy_regularization
        self.max_pinned = max(PINNED_OBSERVATIONS, PINNED_STEPS // interval)
        self.max_off = max(1, OFF_STEPS // interval)
        self.history: dict[str, list[float]] = {name: [] for name in RANGED}
        # Number of observations, and numbers of observations in a row with a doubt or with calibration off.
        self.counts = dict.fromkeys(("observations", "doubtful", "off"), 0)
        # Constraint over tolerance at the latest observations in a row with lambda at its bound.
        self.pinned_ratios: list[float] = []
        # Not part of the state, so that a rollback does not reset it.
        self.has_been_pinned = False

    def count(self, name: str, is_true: bool) -> int:
        self.counts[name] = self.counts[name] + 1 if is_true else 0
        return self.counts[name]

    def observe(self, scalars: dict[str, float]) -> tuple[list[str], list[str]]:
        """Check the scalars of an observed step. Return alarms, each of which calls for a rollback, and warnings."""
        if "energy_targets" in scalars:
            scalars = {**scalars, "energy_gap": scalars["energy_targets"] - scalars["energy_real"]}
        alarms: list[str] = []
        doubts: list[str] = []
        warnings: list[str] = []
        for name in (name for name in RANGED if name in scalars):
            value, history = scalars[name], self.history[name]
            if is_far_outside(value, history):
                is_clipped = name in GRADIENTS and not is_far_outside(min(value, self.max_grad_norm), history)
                message = (
                    f"{name} {value:.4g} is far outside its running range around {statistics.median(history):.4g}"
                )
                (doubts if is_clipped else alarms).append(message)
                continue
            self.history[name] = history = [*history, value][-WINDOW:]
            if name == "energy_gradient_norm_max" and len(history) > WARMUP:
                if value < MIN_GRADIENT * (median := statistics.median(history)):
                    doubts.append(f"the energy model is dead (gradient norm {value:.4g}, running median {median:.4g})")
        if self.energy_regularization > 0 and "energy_real" in scalars:
            loss, most = energy_loss(scalars, self.energy_regularization), 0.5 / self.energy_regularization
            if loss > most:
                doubts.append(
                    f"the energy model is worse than a constant one (loss {loss:.4g}, of a constant 0, at best {-most:.4g})"
                )
        # Without calibration, training makes no samples.
        spread, data_spread = scalars.get("sample_spread", math.inf), scalars["data_spread"]
        if self.count("observations", True) > WARMUP and spread < MIN_SPREAD * data_spread:
            doubts.append(f"samples are all alike (spread over a batch {spread:.4g}, data {data_spread:.4g})")
        if self.count("doubtful", bool(doubts)) >= LASTING:
            alarms += doubts
        is_pinned = scalars.get("dual", -1.0) >= self.max_dual
        self.pinned_ratios = [*self.pinned_ratios, scalars["constraint"] / scalars["tolerance"]] if is_pinned else []
        if len(self.pinned_ratios) == self.max_pinned:
            ratio = statistics.median(self.pinned_ratios)
            message = f"lambda has been at its bound ({self.max_dual:g}) for {self.max_pinned} observations, with the constraint at {ratio:.1f} times its tolerance"
            # Only one alarm: if a lower rate does not bring lambda down, further rollbacks will not either.
            if ratio > RUNAWAY and not self.has_been_pinned:
                self.has_been_pinned = True
                alarms.append(message)
            else:
                warnings.append(f"{message}: consider a larger --max_dual or --drift_tolerance")
        if self.count("off", bool(scalars.get("calibration_off"))) == self.max_off:
            warnings.append(
                f"calibration is off (lambda {scalars['dual']:.3g}) although the energy model separates samples from data: only the "
                "generator's own loss is trained. Lower --calibration_tolerance or --drift_tolerance, or raise --langevin_drift_step"
            )
        return alarms, warnings

    def state_dict(self) -> dict:
        return {"history": dict(self.history), "pinned_ratios": self.pinned_ratios, **self.counts}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore a saved state. Counts that version 0.1 did not save start at 0."""
        self.history, self.pinned_ratios = dict(state_dict["history"]), state_dict["pinned_ratios"]
        self.counts = {name: state_dict.get(name, 0) for name in self.counts}


def energy_loss(scalars: dict[str, float], regularization: float) -> float:
    """Return the loss of [`EnergyCalibrator.contrast`] from the mean and standard deviation of energies."""
    squares = sum(scalars[name] ** 2 + scalars[f"{name}_std"] ** 2 for name in ("energy_real", "energy_targets"))
    return scalars["energy_real"] - scalars["energy_targets"] + regularization * squares


def is_far_outside(value: float, history: list[float]) -> bool:
    """Return whether a value is far outside its running range and larger in size. Vanishing gradients are convergence."""
    if len(history) < WARMUP:
        return False
    low, *_, high = statistics.quantiles(history, n=10)
    median = statistics.median(history)
    return abs(value) > abs(median) and abs(value - median) > RANGE_FACTOR * max(high - low, abs(median) / 2, 1e-8)


class Recovery:
    """
    The guard, the healthy states to roll back to, and the factor on the energy model's learning rate (on the generator's rate
    without an energy model). All processes take the same decisions, from scalars averaged over them.

    Each rollback halves the rate. Once the run is healthy again, the rate returns to the given one after the first breakdown, to
    half of it after the second one, and so on. A passing fault thus costs the rest of the run nothing, even if it needs several
    rollbacks, and a rate that is too high stays lowered.

    Args:
        config ([`TrainingConfig`]): The configuration of the run. Without `--divergence_guard` there are no rollbacks, and a value that is
            not finite ends the run.
        generator ([`Trained`]), energy ([`Trained`], *optional*), parts (`Sequence`): The parts of a state. Each has `state_dict` and
            `load_state_dict`.
    """

    NUMBERS = ("restored", "num_rollbacks", "num_breakdowns", "factor", "healthy_since")

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        generator: Trained,
        energy: Trained | None,
        parts: Sequence[Any] = (),
    ):
        self.accelerator, self.output_dir = accelerator, Path(str(config.run.output_dir))
        self.lowered = energy or generator
        self.enabled, self.max_rollbacks = config.guard.divergence_guard, config.guard.max_rollbacks
        self.interval = min(config.run.log_steps, INTERVAL)
        self.guard = DivergenceGuard(
            config.calibration.max_dual,
            config.optimizer.max_grad_norm,
            config.energy.energy_regularization,
            self.interval,
        )
        parts = [*parts, accelerator.scaler, self.guard]
        for trained in (generator, energy):
            parts += [trained.network, trained.optimizer, trained.lr_scheduler] if trained is not None else []
        self.parts = [part for part in parts if part is not None]
        # Pairs of step and state, oldest first.
        self.states: list[tuple[int, list[dict[str, Any]]]] = []
        self.restored: int | None = None
        # The largest gradient norms and constraint since the last observation. They stay on the device, so that no step waits for them.
        self.peaks: dict[str, torch.Tensor] = {}
        # The largest ones at the observations since the last logged step.
        self.logged_peaks: dict[str, float] = {}
        self.num_rollbacks = self.num_breakdowns = self.healthy_since = 0
        self.factor = 1.0

    def note_peaks(self, values: dict[str, torch.Tensor]) -> None:
        """Update the largest values since the last observation."""
        for name, value in values.items():
            self.peaks[f"{name}_max"] = torch.maximum(self.peaks.get(f"{name}_max", value), value.detach())

    def judge(self, step: int, values: dict[str, float], complete: bool = True) -> list[str]:
        """
        Return the alarms at a step, and record the guard's warnings.

        Args:
            values (`dict`): Scalars by name.
            complete (`bool`, *optional*, defaults to `True`): Whether these are all scalars of an observed step. If not, the only alarms
                are values that are not finite.

        Raises:
            FloatingPointError: if a value is not finite and the guard is not enabled.
        """
        if self.accelerator.scaler is not None:
            # Loss scaling finds its scale from gradients that overflow, and skips the update of such a step.
            values = {k: v for k, v in values.items() if "gradient_norm" not in k or math.isfinite(v)}
        if broken := [name for name, value in values.items() if not math.isfinite(value)]:
            message = f"{', '.join(broken)} not finite"
            if not self.enabled:
                way_on = "Lower the learning rates, or use --divergence_guard to roll back to a healthy state."
                raise FloatingPointError(f"training has diverged at step {step}: {message}. {way_on}")
            return [message]
        alarms, warnings = self.guard.observe(values) if complete else ([], [])
        for message in warnings:
            record_event(self.accelerator, self.output_dir, step, "warning", message)
        return alarms if self.enabled else []

    def keep_healthy(self, step: int) -> None:
        """After a step without an alarm, raise a lowered rate again and store the state, if these are due."""
        # A doubtful state is stored only if there is no other, for example after resuming a run that was in doubt.
        if not self.enabled or (self.guard.counts["doubtful"] and self.states):
            return
        ceiling = 0.5 ** max(self.num_breakdowns - 1, 0)
        if self.factor < ceiling and step - self.healthy_since >= HEALTHY_STATE_STEPS:
            self.factor = ceiling
            self.lowered.scale_learning_rate(self.factor)
            message = f"healthy again: the learning rate is {self.factor:g} times the given one"
            record_event(self.accelerator, self.output_dir, step, "recovery", message)
        if not self.states or step - self.states[-1][0] >= HEALTHY_STATE_STEPS:
            copy = partial(recursively_apply, lambda tensor: tensor.detach().to("cpu", copy=True))
            state = [copy(part.state_dict()) for part in self.parts]
            self.states = [*self.states, (step, state)][-HEALTHY_STATES:]

    def roll_back(self, step: int, alarms: list[str]) -> tuple[int, bool]:
        """Restore a healthy state. Return its step, and whether the run may continue: not after `max_rollbacks`."""
        was_healthy = self.states[-1][0] != self.restored
        # A doubt becomes an alarm only after some observations, so healthy states are those from before the first doubt.
        healthy = step - (max(self.guard.counts["doubtful"] - 1, 0) + CONFIRMATIONS) * self.interval
        # If no healthy state was stored since the last rollback, go further back.
        kept = self.states if was_healthy else self.states[:-1]
        self.states = [one for one in kept if one[0] <= healthy] or self.states[:1]
        self.restored, state = self.states[-1]
        for part, saved in zip(self.parts, state):
            # A copy, because an optimizer keeps and changes the tensors that it loads.
            part.load_state_dict(recursively_apply(torch.clone, saved))
        # Start to count again.
        self.guard.counts["doubtful"], self.guard.pinned_ratios = 0, []
        self.peaks.clear()
        self.logged_peaks.clear()
        seen, kind = "; ".join(alarms), "stopped"
        message = f"{seen}: stopped after {self.num_rollbacks} rollbacks"
        if go_on := self.num_rollbacks < self.max_rollbacks:
            self.num_rollbacks += 1
            self.num_breakdowns += was_healthy
            self.factor /= 2
            self.healthy_since = self.restored
            kind, back = (
                "rollback",
                f"rolled back to step {self.restored}, with {self.factor:g} times the given learning rate",
            )
            message = f"{seen}: {back} and the data in another order"
        self.lowered.scale_learning_rate(self.factor)
        record_event(self.accelerator, self.output_dir, step, kind, message, to_step=self.restored)
        return self.restored, go_on

    def state_dict(self) -> dict:
        peaks = {name: value.detach().cpu() for name, value in self.peaks.items()}
        guard = {"guard": self.guard.state_dict(), "has_been_pinned": self.guard.has_been_pinned}
        return {
            **guard,
            "peaks": peaks,
            "logged_peaks": self.logged_peaks,
            **{name: getattr(self, name) for name in self.NUMBERS},
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.guard.load_state_dict(state_dict["guard"])
        self.guard.has_been_pinned = state_dict["has_been_pinned"]
        self.peaks = {name: value.to(self.accelerator.device) for name, value in state_dict["peaks"].items()}
        self.logged_peaks = dict(state_dict.get("logged_peaks", {}))  # missing in checkpoints of version 0.1
        for name in self.NUMBERS:
            setattr(self, name, state_dict[name])
