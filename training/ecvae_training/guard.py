"""Watches a run for divergence, and says what it saw. What is then done about it is `Trainer`'s business.

Energy-based training explodes in few ways, each of which shows in the logged scalars before the pictures are gone: a
value that is not finite, an energy gap or a gradient far outside the range it has kept so far, a dual variable that
stays at its bound, samples that have all become one.
"""

import collections
import dataclasses
import math
import statistics


@dataclasses.dataclass(frozen=True)
class GuardLimits:
    """
    What counts as divergence.

    Args:
        warmup: Observations before ranges are judged (non-finite values always are).
        window: Observations that the running range is taken over.
        range_factor: A value is far outside where it differs from the running median by more than so many times the
            range's width (90th minus 10th percentile, at least a tenth of the median's size).
        pinned: Observations in a row with lambda at its upper bound.
        min_spread: Samples are dead where their spread over the batch is less than this share of the data's.
        dead: Observations in a row with dead samples.
    """

    warmup: int = 20
    window: int = 50
    range_factor: float = 20.0
    pinned: int = 50
    min_spread: float = 0.05
    dead: int = 5


class DivergenceGuard:
    """
    Call `observe` with each logged step's scalars; it returns what is wrong, in words, or an empty list.

    Ranged are the names in `RANGED` that are present; `dual` is held against `max_dual`, `sample_spread` against
    `data_spread` (standard deviation over the batch, averaged over pixels).
    """

    RANGED = ("energy_gap", "gradient_norm", "energy_gradient_norm", "reconstruction", "drift")

    def __init__(self, max_dual: float, limits: GuardLimits = GuardLimits()):
        self.max_dual = max_dual
        self.limits = limits
        self.reset()

    def reset(self) -> None:
        """Forget the ranges: after a rollback the run is another."""
        self.history = {name: collections.deque(maxlen=self.limits.window) for name in self.RANGED}
        self.at_bound = self.spreadless = 0

    def observe(self, scalars: dict[str, float]) -> list[str]:
        broken = [name for name, value in scalars.items() if not math.isfinite(value)]
        if broken:
            return [f"{', '.join(broken)} not finite"]
        alarms = []
        for name in self.RANGED:
            if name not in scalars:
                continue
            history, value = self.history[name], scalars[name]
            if len(history) >= self.limits.warmup:
                deciles = statistics.quantiles(history, n=10)
                median = statistics.median(history)
                width = max(deciles[-1] - deciles[0], 0.1 * abs(median), 1e-8)
                # Only growth in size is divergence: a gradient that vanishes is convergence.
                if abs(value) > abs(median) and abs(value - median) > self.limits.range_factor * width:
                    alarms.append(
                        f"{name} {value:.4g} is far outside its running range ({deciles[0]:.4g} to {deciles[-1]:.4g})"
                    )
            history.append(value)
        self.at_bound = self.at_bound + 1 if scalars.get("dual", 0.0) >= self.max_dual else 0
        if self.at_bound >= self.limits.pinned:
            alarms.append(f"lambda has been at its bound ({self.max_dual:g}) for {self.at_bound} logged steps")
        if "sample_spread" in scalars:
            dead = scalars["sample_spread"] < self.limits.min_spread * scalars["data_spread"]
            self.spreadless = self.spreadless + 1 if dead else 0
            if self.spreadless >= self.limits.dead:
                alarms.append(
                    f"samples are all alike (spread {scalars['sample_spread']:.4g}, data {scalars['data_spread']:.4g})"
                )
        return alarms
