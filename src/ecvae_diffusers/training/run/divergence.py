"""Divergence of a run: what the guard looks for at each logged step, and how the run recovers from it.

Energy-based training breaks down in few ways, each of which shows in the logged scalars before the pictures are gone: a
value that is not finite; an energy gap, a loss, a gradient or the constraint far outside the range it has kept so far, or
lambda pinned at its bound while the chain runs away; samples that have all become one, or an energy model that tells
nothing apart any more, which is how one with spectral normalization breaks: its energies can't explode.
"""

import math
import statistics
from collections import deque
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply

from ecvae_diffusers.training.optimization import Trained
from ecvae_diffusers.training.run.log import record_event


# Logged steps before anything except finiteness is judged, and logged steps that a running range covers.
WARMUP, WINDOW = 20, 50
# A value is far outside its range if it differs from the running median by more than so many widths: 90th minus 10th
# percentile, at least half of the median's size.
RANGE_FACTOR = 20.0
# The energy model is dead if its gradient norm is below this share of its running median, samples are dead if their spread
# over the batch is below this share of the data's.
MIN_GRADIENT, MIN_SPREAD = 0.1, 0.05
# Logged steps in a row after which a doubt is an alarm: dead samples, a dead energy model, clipped gradients. Fewer are chance.
LASTING = 5
# Steps and logged steps in a row, at least, that lambda may be at its bound (at first it often is, while the energy model is
# ahead), and the median of constraint over tolerance at which the chain has run away. Below, the run is as healthy as
# with a fixed lambda.
PINNED_STEPS, PINNED_LOGGED, RUNAWAY = 500, 50, 10.0
# Calibration is off if its gradient is below this share of the reconstruction's. After so many steps a warning says so.
MIN_CALIBRATION_WEIGHT, OFF_STEPS = 0.01, 100
# States kept in main memory (at least 2: the newest may be sick already), and steps between them.
HEALTHY_STATES, HEALTHY_STATE_STEPS = 3, 100
# Logged steps without an alarm after which a state is healthy: what breaks a run shows some steps later.
CONFIRMATIONS = 2

GRADIENTS = ("gradient_norm_max", "energy_gradient_norm_max")
RANGED = ("energy_gap", *GRADIENTS, "reconstruction", "bits_per_dimension", "constraint_max")


def is_calibrating(scalars: dict[str, float]) -> bool:
    """
    Return whether the constraint has a say in a logged step: lambda is above 0, and the gradient that samples receive from it is
    at least a hundredth of the one that reconstructions receive from the generator's own loss, where that is known.
    """
    reconstruction = scalars.get("reconstruction_gradient_norm", 0.0)
    return scalars["dual"] > 0 and scalars["calibration_gradient_norm"] >= MIN_CALIBRATION_WEIGHT * reconstruction


def is_calibration_off(scalars: dict[str, float]) -> bool:
    """
    Return whether the constraint has no say in a logged step although the energy model tells samples from data: their mean
    energies differ by more than the energies of each spread.
    """
    spread = math.hypot(scalars["energy_real_std"], scalars["energy_samples_std"]) / math.sqrt(2)
    return not is_calibrating(scalars) and scalars["energy_samples"] - scalars["energy_real"] > spread


def not_finite(scalars: dict[str, float]) -> list[str]:
    """Return an alarm if values are not finite."""
    broken = [name for name, value in scalars.items() if not math.isfinite(value)]
    return [f"{', '.join(broken)} not finite"] if broken else []


class DivergenceGuard:
    """
    A detector of divergence in the scalars of logged steps.

    Args:
        max_dual (`float`): Upper bound of lambda.
        max_grad_norm (`float`, *optional*):
            Gradients are clipped to this norm; logged norms are those before. A single outlier that is clipped back into the
            range, as likelihoods of normalizing flows have them, moves the weights no further than others do.
        log_steps (`int`, *optional*, defaults to 10): Steps between two observations.
    """

    STATE = ("observations", "doubtful", "pinned_ratios", "off")

    def __init__(self, max_dual: float, max_grad_norm: float | None = None, log_steps: int = 10):
        self.max_dual, self.max_grad_norm = max_dual, math.inf if max_grad_norm is None else max_grad_norm
        self.max_pinned, self.max_off = max(PINNED_LOGGED, PINNED_STEPS // log_steps), max(1, OFF_STEPS // log_steps)
        self.history = {name: deque(maxlen=WINDOW) for name in RANGED}
        self.observations = 0
        # Logged steps in a row with any doubt, and with calibration off.
        self.doubtful = self.off = 0
        # Constraint over tolerance for as long as lambda is at its bound.
        self.pinned_ratios: list[float] = []
        self.has_been_pinned = False

    def observe(self, scalars: dict[str, float]) -> tuple[list[str], list[str]]:
        """Return alarms, which are reasons to go back, and warnings about a logged step."""
        if alarms := not_finite(scalars):
            return alarms, []
        self.observations += 1
        if "energy_targets" in scalars:
            scalars = {**scalars, "energy_gap": scalars["energy_targets"] - scalars["energy_real"]}
        alarms, doubts, warnings = [], [], []
        for name, value in scalars.items():
            if name not in RANGED:
                continue
            if message := self.far_outside(name, value):
                is_clipped = name in GRADIENTS and not self.far_outside(name, min(value, self.max_grad_norm))
                (doubts if is_clipped else alarms).append(message)
                continue
            history = self.history[name]
            history.append(value)
            if name == "energy_gradient_norm_max" and len(history) > WARMUP:
                if value < MIN_GRADIENT * (median := statistics.median(history)):
                    doubts.append(f"the energy model is dead (gradient norm {value:.4g}, running median {median:.4g})")
        # Without calibration no samples are made in training.
        spread, data_spread = scalars.get("sample_spread", math.inf), scalars["data_spread"]
        if self.observations > WARMUP and spread < MIN_SPREAD * data_spread:
            doubts.append(f"samples are all alike (spread over a batch {spread:.4g}, data {data_spread:.4g})")
        self.doubtful = self.doubtful + 1 if doubts else 0
        if self.doubtful >= LASTING:
            alarms += doubts

        is_pinned = scalars.get("dual", -1.0) >= self.max_dual
        self.pinned_ratios = [*self.pinned_ratios, scalars["constraint"] / scalars["tolerance"]] if is_pinned else []
        if len(self.pinned_ratios) == self.max_pinned:
            ratio = statistics.median(self.pinned_ratios)
            message = (
                f"lambda has been at its bound ({self.max_dual:g}) for {self.max_pinned} logged steps, with a constraint "
                f"of {ratio:.1f} times its tolerance"
            )
            # One alarm only: if a lower rate does not bring lambda down, nothing that the guard does will.
            if ratio > RUNAWAY and not self.has_been_pinned:
                self.has_been_pinned = True
                alarms.append(message)
            else:
                warnings.append(f"{message}: consider a larger --max_dual or --drift_tolerance")
        self.off = self.off + 1 if "calibration_gradient_norm" in scalars and is_calibration_off(scalars) else 0
        if self.off == self.max_off:
            warnings.append(
                f"calibration is off (lambda {scalars['dual']:.3g}) while the energy model tells samples from data: this run trains "
                "its generator alone. Lower --calibration_tolerance or --drift_tolerance, or raise --langevin_drift_step"
            )
        return alarms, warnings

    def far_outside(self, name: str, value: float) -> str | None:
        """Return a message if a value is far outside its running range."""
        history = self.history[name]
        if len(history) < WARMUP:
            return None
        low, *_, high = statistics.quantiles(history, n=10)
        median = statistics.median(history)
        # Only growth in size is divergence: a gradient that vanishes is convergence.
        if abs(value) <= abs(median) or abs(value - median) <= RANGE_FACTOR * max(high - low, 0.5 * abs(median), 1e-8):
            return None
        return f"{name} {value:.4g} is far outside its running range ({low:.4g} to {high:.4g})"

    def state_dict(self) -> dict:
        """Without `has_been_pinned`, which does not go back with the run."""
        history = {name: list(values) for name, values in self.history.items()}
        return {"history": history, **{name: getattr(self, name) for name in self.STATE}}

    def load_state_dict(self, state_dict: dict) -> None:
        self.history = {name: deque(state_dict["history"][name], maxlen=WINDOW) for name in RANGED}
        for name in self.STATE:
            setattr(self, name, state_dict.get(name, 0))  # checkpoints of 0.1 have no `off`


class Recovery:
    """
    The guard, the healthy states to go back to, and the factor on the energy model's learning rate (on the generator's
    without one).

    Each rollback halves the rate until there is a healthy state again. Then it is the rate given after the first
    breakdown of a healthy run, half of it after the second one, and so on. So a passing fault, which may need several
    rollbacks, costs the rest of the run nothing, and a rate that is too high is left for good.

    Args:
        accelerator ([`Accelerator`]): All processes decide the same, on scalars that were averaged over them.
        output_dir (`Path`): Folder of the events.
        generator ([`Trained`]), energy ([`Trained`], *optional*): The networks.
        parts (`Sequence`, *optional*): What else a state consists of: objects with `state_dict`, or `None`.
        enabled (`bool`, *optional*, defaults to `True`): Whether to go back. Otherwise a value that is not finite ends the run.
        max_rollbacks (`int`, *optional*, defaults to 10): The next alarm ends the run.
        max_dual, max_grad_norm, log_steps: See [`DivergenceGuard`].
    """

    NUMBERS = ("restored", "num_rollbacks", "num_breakdowns", "factor", "healthy_since")

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, generator: Trained, energy: Trained | None, parts=(), *,
        enabled: bool = True, max_rollbacks: int = 10, max_dual: float = math.inf, max_grad_norm: float | None = None,
        log_steps: int = 10,
    ):  # fmt: skip
        self.accelerator, self.output_dir, self.lowered = accelerator, output_dir, energy or generator
        self.enabled, self.max_rollbacks, self.log_steps = enabled, max_rollbacks, log_steps
        self.guard = DivergenceGuard(max_dual, max_grad_norm, log_steps)
        parts = [*parts, accelerator.scaler, self.guard]
        for trained in (generator, energy):
            parts += [trained.network, trained.optimizer, trained.lr_scheduler] if trained is not None else []
        self.parts = [part for part in parts if part is not None]
        # Step and state, the oldest first.
        self.states: list[tuple[int, list[dict]]] = []
        self.restored: int | None = None
        # The largest of each gradient norm and of the constraint since the last logged step.
        self.peaks: dict[str, torch.Tensor] = {}
        self.num_rollbacks = self.num_breakdowns = self.healthy_since = 0
        self.factor = 1.0

    def note_peaks(self, values: dict[str, torch.Tensor]) -> None:
        """Remember the largest values between two logged steps, on the device, so that nothing waits for it."""
        for name, value in values.items():
            self.peaks[f"{name}_max"] = torch.maximum(self.peaks.get(f"{name}_max", value), value.detach())

    def judge(self, step: int, logged: dict[str, float]) -> list[str]:
        """Record the guard's warnings about a logged step and return its alarms. Raises what `check_finite` does."""
        self.check_finite(step, logged)
        alarms, warnings = self.guard.observe(self.meant(logged))
        for message in warnings:
            self.record(step, "warning", message)
        return alarms if self.enabled else []

    def check_finite(self, step: int, values: dict[str, float]) -> list[str]:
        """
        Return an alarm if a value is not finite.

        Raises:
            FloatingPointError: without the guard, if there is such a value.
        """
        alarms = not_finite(self.meant(values))
        if alarms and not self.enabled:
            raise FloatingPointError(
                f"training has diverged at step {step}: {alarms[0]}. Lower the rates, or let --divergence_guard go back to a "
                "healthy state."
            )
        return alarms

    def meant(self, values: dict[str, float]) -> dict[str, float]:
        """Drop what loss scaling brings about: it finds its scale by gradients that overflow, and leaves that step out."""
        if self.accelerator.scaler is None:
            return values
        return {k: v for k, v in values.items() if "gradient_norm" not in k or math.isfinite(v)}

    def keep_healthy(self, step: int) -> None:
        """After a step without an alarm, raise a lowered rate again and keep the state, if it is time to."""
        # A state that the guard doubts is kept only if there is no other, as in a run that was resumed amid doubts.
        if not self.enabled or (self.guard.doubtful and self.states):
            return
        ceiling = 0.5 ** max(self.num_breakdowns - 1, 0)
        if self.factor < ceiling and step - self.healthy_since >= HEALTHY_STATE_STEPS:
            self.factor = ceiling
            self.lowered.scale_learning_rate(self.factor)
            self.record(step, "recovery", f"healthy again: the rate is {self.factor:g} times the one given")
        if not self.states or step - self.states[-1][0] >= HEALTHY_STATE_STEPS:
            state = [recursively_apply(to_main_memory, part.state_dict()) for part in self.parts]
            self.states = [*self.states, (step, state)][-HEALTHY_STATES:]

    def roll_back(self, step: int, alarms: list[str]) -> tuple[int, bool]:
        """Go back to a healthy state. Return its step, and whether the run may continue: not after `max_rollbacks`."""
        seen = "; ".join(alarms)
        was_healthy = self.states[-1][0] != self.restored
        # What lasts is an alarm only when it has: healthy are states from before the guard's first doubt.
        healthy = step - (max(self.guard.doubtful - 1, 0) + CONFIRMATIONS) * self.log_steps
        if not was_healthy and len(self.states) > 1:
            self.states.pop()
        while len(self.states) > 1 and self.states[-1][0] > healthy:
            self.states.pop()
        self.restored, state = self.states[-1]
        for part, saved in zip(self.parts, state):
            # A copy: an optimizer takes over the tensors that it is given, and changes them.
            part.load_state_dict(recursively_apply(torch.clone, saved))
        # What must last is counted anew.
        self.guard.doubtful, self.guard.pinned_ratios = 0, []
        self.peaks.clear()
        kind, message = "stopped", f"{seen}: stopped after {self.num_rollbacks} rollbacks"
        if go_on := self.num_rollbacks < self.max_rollbacks:
            self.num_rollbacks += 1
            self.num_breakdowns += was_healthy
            self.factor /= 2
            self.healthy_since = self.restored
            kind, back = "rollback", f"back to step {self.restored}, rate {self.factor:g} times the one given"
            message = f"{seen}: {back}, data in another order"
        self.lowered.scale_learning_rate(self.factor)
        self.record(step, kind, message, to_step=self.restored)
        return self.restored, go_on

    def record(self, step: int, kind: str, message: str, **values) -> None:
        record_event(self.accelerator, self.output_dir, step, kind, message, **values)

    def state_dict(self) -> dict:
        peaks = {name: value.detach().cpu() for name, value in self.peaks.items()}
        guard = {"guard": self.guard.state_dict(), "has_been_pinned": self.guard.has_been_pinned}
        return {**guard, "peaks": peaks, **{name: getattr(self, name) for name in self.NUMBERS}}

    def load_state_dict(self, state_dict: dict) -> None:
        self.guard.load_state_dict(state_dict["guard"])
        self.guard.has_been_pinned = state_dict["has_been_pinned"]
        self.peaks = {name: value.to(self.accelerator.device) for name, value in state_dict["peaks"].items()}
        for name in self.NUMBERS:
            setattr(self, name, state_dict[name])


def to_main_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
