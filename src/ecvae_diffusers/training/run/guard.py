"""What the guard against divergence watches, and the healthy states that a run can go back to.

Energy-based training breaks down in few ways, each of which shows in the logged scalars before the pictures are gone: a
value that is not finite; an energy gap, a gradient or a constraint far outside the range it has kept so far; a dual
variable that stays at its bound while the chain runs away; samples that have all become one; and an energy model that no
longer tells anything apart, which is how one with spectral normalization breaks, whose energies can't explode.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable

import torch


@dataclasses.dataclass(frozen=True)
class GuardLimits:
    """
    What counts as divergence. An observation is a logged step.

    Args:
        warmup: Observations before anything but finiteness is judged: a network has no range at first.
        window: Observations that a running range is taken over.
        range_factor: A value is far outside where it differs from the running median by more than so many times the
            range's width: 90th minus 10th percentile, at least half of the median's size.
        pinned: Observations in a row with lambda at its upper bound.
        runaway: Median of constraint over tolerance, over those observations, from which a pinned lambda is divergence.
            Below, it is worth a warning: the bound is too low for this data, and the run is as healthy as with a
            fixed lambda. An alarm is given once: if a lower rate does not bring lambda down, nothing that the guard does will.
        min_spread: Samples are dead where their spread over the batch is less than this share of the data's.
        min_gradient: The energy model is dead where its gradient norm is less than this share of its running median.
        off: Observations in a row with calibration off, while the energy model tells data from samples, from which it is worth a
            warning.
        lasting: Observations in a row from which dead samples, a dead energy model, or gradients that clipping brings back into
            their range, are divergence. Fewer are chance. Twice as many where they take turns.
    """

    warmup: int = 20
    window: int = 50
    range_factor: float = 20.0
    pinned: int = 50
    runaway: float = 10.0
    min_spread: float = 0.05
    min_gradient: float = 0.1
    off: int = 10
    lasting: int = 5


# Calibration is off where its gradient is below this share of the reconstruction's.
MIN_CALIBRATION_WEIGHT = 0.01


def is_calibrating(scalars: dict[str, float]) -> bool:
    """
    Return whether the constraint has a say in a logged step: lambda is above 0, and the gradient that samples receive from it is
    at least a hundredth of the one that reconstructions receive from the generator's own loss, where that is known.
    """
    reconstruction = scalars.get("reconstruction_gradient_norm", 0.0)
    return scalars["dual"] > 0 and scalars["calibration_gradient_norm"] >= MIN_CALIBRATION_WEIGHT * reconstruction


def tells_apart(scalars: dict[str, float]) -> bool:
    """Return whether the mean energies of samples and data differ by more than the energies of each spread."""
    spread = math.hypot(scalars["energy_real_std"], scalars["energy_samples_std"]) / math.sqrt(2)
    return scalars["energy_samples"] - scalars["energy_real"] > spread


def is_calibration_off(scalars: dict[str, float]) -> bool:
    """Return whether the constraint has no say in a logged step though the energy model tells samples from data."""
    return not is_calibrating(scalars) and tells_apart(scalars)


class DivergenceGuard:
    """
    Call `observe` with each logged step's scalars.

    The energy gap (calibrated samples minus data), reconstruction or bits per dimension, and the largest gradient norms and constraint since the
    last logged step are held against their own running ranges, `dual` against `max_dual`, `sample_spread` against
    `data_spread`.

    Args:
        max_dual (`float`): Upper bound of lambda.
        limits (`GuardLimits`): What counts as divergence.
        max_grad_norm (`float`, *optional*): What gradients are clipped to; the norms are those before. Where the clipped norm is within
            the range, a single one that is far outside, as likelihoods of normalizing flows have them, moves the weights no further than
            others do, and only lasting ones are divergence.
    """

    GRADIENTS = ("gradient_norm_max", "energy_gradient_norm_max")
    RANGED = (
        "energy_gap", "gradient_norm_max", "energy_gradient_norm_max", "reconstruction", "bits_per_dimension",
        "constraint_max",
    )  # fmt: skip

    SAMPLES, ENERGY_MODEL = "samples", "energy_model"

    def __init__(self, max_dual: float, limits: GuardLimits = GuardLimits(), max_grad_norm: float | None = None):
        self.max_dual = max_dual
        self.limits = limits
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.history = {name: collections.deque(maxlen=limits.window) for name in self.RANGED}
        self.observations = 0
        # Observations in a row, until now, of what is divergence if it lasts.
        self.doubts = dict.fromkeys((self.SAMPLES, self.ENERGY_MODEL, *self.GRADIENTS), 0)
        # Those with any of it: the run is not held to be healthy at them.
        self.doubtful = 0
        self.pinned_ratios: list[float] = []
        self.has_been_pinned = False
        # Observations in a row with calibration off.
        self.off = 0

    def lasts(self, name: str, seen: bool) -> bool:
        """Count one of the doubts; whether it has lasted."""
        self.doubts[name] = self.doubts[name] + 1 if seen else 0
        return self.doubts[name] >= self.limits.lasting

    def forget_doubts(self) -> None:
        """Where a run goes back, they are counted anew."""
        self.doubts, self.doubtful = dict.fromkeys(self.doubts, 0), 0

    def observe(self, scalars: dict[str, float]) -> tuple[list[str], list[str]]:
        """
        Returns:
            Alarms and warnings, each in words; alarms are reasons to go back.
        """
        broken = [name for name, value in scalars.items() if not math.isfinite(value)]
        if broken:
            return [f"{', '.join(broken)} not finite"], []
        self.observations += 1
        if "energy_targets" in scalars:
            scalars = {**scalars, "energy_gap": scalars["energy_targets"] - scalars["energy_real"]}
        alarms = []
        history, norm = self.history["energy_gradient_norm_max"], scalars.get("energy_gradient_norm_max")
        if norm is not None and len(history) >= self.limits.warmup:
            median = statistics.median(history)
            if self.lasts(self.ENERGY_MODEL, norm < self.limits.min_gradient * median):
                alarms.append(f"the energy model is dead (gradient norm {norm:.4g}, running median {median:.4g})")
        for name in self.RANGED:
            value = scalars.get(name)
            if value is None:
                continue
            said = self.outside(name, value)
            if name in self.GRADIENTS:
                is_clipped = said is not None and self.outside(name, min(value, self.max_grad_norm)) is None
                if not self.lasts(name, is_clipped) and is_clipped:
                    continue
            if said is not None:
                alarms.append(said)
            else:
                self.history[name].append(value)
        warnings = []
        if scalars.get("dual", -1.0) < self.max_dual:
            self.pinned_ratios = []
        else:
            self.pinned_ratios.append(scalars["constraint"] / scalars["tolerance"])
        if len(self.pinned_ratios) == self.limits.pinned:
            ratio = statistics.median(self.pinned_ratios)
            message = (
                f"lambda has been at its bound ({self.max_dual:g}) for {self.limits.pinned} logged steps, with a constraint "
                f"of {ratio:.1f} times its tolerance"
            )
            if ratio > self.limits.runaway and not self.has_been_pinned:
                self.has_been_pinned = True
                alarms.append(message)
            else:
                warnings.append(f"{message}: consider a larger --max_dual or --drift_tolerance")
        if "calibration_gradient_norm" in scalars:
            self.off = self.off + 1 if is_calibration_off(scalars) else 0
            if self.off == self.limits.off:
                warnings.append(
                    f"calibration is off (lambda {scalars['dual']:.3g}) while the energy model tells samples from data: this run "
                    "trains its generator alone. Lower --calibration_tolerance or --drift_tolerance, or raise "
                    "--langevin_drift_step"
                )
        # Without calibration no samples are made while training.
        spread = scalars.get("sample_spread", math.inf)
        dead = spread < self.limits.min_spread * scalars["data_spread"]
        if self.lasts(self.SAMPLES, dead and self.observations > self.limits.warmup):
            alarms.append(
                f"samples are all alike (spread over a batch {spread:.4g}, data {scalars['data_spread']:.4g})"
            )
        doubts = [name for name, count in self.doubts.items() if count]
        self.doubtful = self.doubtful + 1 if doubts else 0
        if not alarms and self.doubtful >= 2 * self.limits.lasting:
            alarms.append(
                f"something was doubtful at each of {self.doubtful} logged steps, lastly {', '.join(doubts)}"
            )
        return alarms, warnings

    def outside(self, name: str, value: float) -> str | None:
        """What to say of a value that is far outside its running range."""
        history = self.history[name]
        if len(history) < self.limits.warmup:
            return None
        deciles = statistics.quantiles(history, n=10)
        median = statistics.median(history)
        width = max(deciles[-1] - deciles[0], 0.5 * abs(median), 1e-8)
        # Only growth in size is divergence: a gradient that vanishes is convergence.
        if abs(value) <= abs(median) or abs(value - median) <= self.limits.range_factor * width:
            return None
        return f"{name} {value:.4g} is far outside its running range ({deciles[0]:.4g} to {deciles[-1]:.4g})"

    def state_dict(self) -> dict:
        return {
            "history": {name: list(values) for name, values in self.history.items()},
            "pinned_ratios": list(self.pinned_ratios),
            "observations": self.observations,
            "off": self.off,
            "doubts": dict(self.doubts),
            "doubtful": self.doubtful,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        for name, values in state_dict["history"].items():
            self.history[name] = collections.deque(values, maxlen=self.limits.window)
        self.pinned_ratios, self.observations = list(state_dict["pinned_ratios"]), state_dict["observations"]
        # Runs of before these were kept have none.
        self.off = state_dict.get("off", 0)
        self.doubts |= state_dict.get("doubts", {})
        self.doubtful = state_dict.get("doubtful", 0)


class HealthyStates:
    """
    A ring of states of a run, in main memory.

    Args:
        parts (`dict`): Name -> anything with `state_dict` and `load_state_dict`.
        limit (`int`): States kept; the oldest goes first.
        confirmation (`int`): Steps without an alarm after which a state is held to be healthy: what breaks a run shows
            some steps later.
    """

    def __init__(self, parts: dict, limit: int, confirmation: int):
        self.parts = parts
        self.limit = limit
        self.confirmation = confirmation
        self.states: list[tuple[int, dict]] = []
        self.restored: int | None = None

    def take(self, step: int) -> None:
        state = {name: map_tensors(part.state_dict(), to_main_memory) for name, part in self.parts.items()}
        self.states = [*self.states, (step, state)][-self.limit :]

    @property
    def was_healthy(self) -> bool:
        """Whether a state was taken since the last time that the run went back."""
        return self.states[-1][0] != self.restored

    def restore(self, step: int) -> int:
        """
        Go back to the newest state that was healthy at `step`, and from a state that it has gone back to before without
        a healthy one since, to the one before. Returns its step.
        """
        if len(self.states) > 1 and not self.was_healthy:
            self.states.pop()
        while len(self.states) > 1 and self.states[-1][0] > step - self.confirmation:
            self.states.pop()
        self.restored, state = self.states[-1]
        for name, part in self.parts.items():
            # A copy: an optimizer takes over the tensors that it is given, and changes them.
            part.load_state_dict(map_tensors(state[name], torch.clone))
        return self.restored


def map_tensors(tree, function: Callable[[torch.Tensor], torch.Tensor]):
    """Apply `function` to the tensors in nested dictionaries, lists and tuples, which are copied."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def to_main_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)
