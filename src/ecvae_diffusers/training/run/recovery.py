"""What is done about divergence: go back, lower the rate, go on with other data."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ecvae_diffusers.training.optimization import Trained
from ecvae_diffusers.training.run.folder import EVENTS_FILE, RunLog
from ecvae_diffusers.training.run.guard import DivergenceGuard, GuardLimits, HealthyStates


logger = get_logger(__name__)

# Logged steps that a state must outlive without an alarm to be gone back to.
CONFIRMATIONS = 2
# Steps, at least, that lambda may be at its bound: at first it is often, while the energy model is ahead.
PINNED_STEPS = 500
# Steps with calibration off from which the guard says so.
OFF_STEPS = 100


def record_event(accelerator: Accelerator, output_dir: Path, step: int, kind: str, message: str, **values) -> None:
    """To the log, and to `events.jsonl`."""
    logger.warning(f"Step {step}: {message}.")
    if accelerator.is_main_process:
        RunLog(output_dir / EVENTS_FILE).write(step=step, kind=kind, message=message, **values)


class Recovery:
    """
    The guard, the states to go back to, and by how much the energy model's learning rate is lowered (the autoencoder's
    where nothing is calibrated).

    Each rollback halves the rate, until there is a healthy state again. Then it is the rate given, after the first
    breakdown of a healthy run; half of it after the second one; and so on. So a passing fault, which may need several
    rollbacks, costs the rest of the run nothing, and a rate that is too high is left for good.

    Args:
        args: The command line.
        accelerator ([`Accelerator`]): All processes decide the same, on scalars that were averaged over them.
        generator, energy ([`Trained`]): The networks; `None` where there is none.
        parts (`dict`, *optional*): Name -> what else a state is made of, or `None`.
    """

    NUMBERS = ("num_rollbacks", "num_breakdowns", "factor", "healthy_since")

    def __init__(
        self, args, accelerator: Accelerator, generator: Trained, energy: Trained | None, parts: dict | None = None
    ):
        self.args, self.accelerator = args, accelerator
        self.output_dir = Path(args.output_dir)
        self.lowered = energy or generator
        pinned = max(GuardLimits.pinned, PINNED_STEPS // args.log_steps)
        limits = GuardLimits(pinned=pinned, off=max(1, OFF_STEPS // args.log_steps))
        self.guard = DivergenceGuard(args.max_dual, limits, args.max_grad_norm)
        parts = {**(parts or {}), "scaler": accelerator.scaler, "guard": self.guard}
        for name, trained in (("generator", generator), ("energy", energy)):
            if trained is not None:
                parts |= {
                    f"{name}.{part}": getattr(trained, part) for part in ("network", "optimizer", "lr_scheduler")
                }
        self.healthy = HealthyStates(
            {name: part for name, part in parts.items() if part is not None},
            args.healthy_states,
            confirmation=CONFIRMATIONS * args.log_steps,
        )
        # The largest of each gradient norm and of the constraint since the last logged step.
        self.peaks: dict[str, torch.Tensor] = {}
        self.num_rollbacks = self.num_breakdowns = 0
        self.factor = 1.0
        self.healthy_since = 0

    def note_peaks(self, values: dict[str, torch.Tensor]) -> None:
        """What happens between two logged steps must not be missed; on the device, so that nothing waits for it."""
        for name, value in values.items():
            self.peaks[f"{name}_max"] = torch.maximum(self.peaks.get(f"{name}_max", value), value.detach())

    def judge(self, step: int, logged: dict[str, float]) -> list[str]:
        """
        The guard's alarms about a logged step.

        Raises:
            FloatingPointError: without the guard, if a value is not finite.
        """
        if not self.args.divergence_guard:
            self.check_finite(step, logged)
            for message in self.guard.observe(self.meant(logged))[1]:
                self.record(step, "warning", message)
            return []
        alarms, warnings = self.guard.observe(self.meant(logged))
        for message in warnings:
            self.record(step, "warning", message)
        return alarms

    def check_finite(self, step: int, values: dict[str, float]) -> list[str]:
        """
        What is not finite, in words, as an alarm.

        Raises:
            FloatingPointError: without the guard, if there is something.
        """
        broken = [name for name, value in self.meant(values).items() if not math.isfinite(value)]
        if broken and not self.args.divergence_guard:
            raise FloatingPointError(
                f"training has diverged at step {step}: {', '.join(broken)} not finite. Lower the rates, or let "
                "--divergence_guard go back to a healthy state."
            )
        return [f"{', '.join(broken)} not finite"] if broken else []

    def meant(self, values: dict[str, float]) -> dict[str, float]:
        """`values` less what loss scaling brings about: it finds its scale by overflowing, and leaves that step out."""
        if self.accelerator.scaler is None:
            return values
        return {k: v for k, v in values.items() if "gradient_norm" not in k or math.isfinite(v)}

    def keep_healthy(self, step: int) -> None:
        """No alarm: keep this state if it is time to, and raise a lowered rate again. Not while the guard doubts, but for a first one."""
        if not self.args.divergence_guard or (self.guard.doubtful and self.healthy.states):
            return
        every = self.args.healthy_state_steps
        ceiling = 0.5 ** max(self.num_breakdowns - 1, 0)
        if self.factor < ceiling and step - self.healthy_since >= every:
            self.factor = ceiling
            self.lowered.scale_learning_rate(self.factor)
            self.record(step, "recovery", f"healthy again: the rate is {self.factor:g} times the one given")
        if not self.healthy.states or step - self.healthy.states[-1][0] >= every:
            self.healthy.take(step)

    def roll_back(self, step: int, alarms: list[str]) -> tuple[int, bool]:
        """
        Go back to a healthy state.

        Returns:
            Its step, and whether the run may go on: not after `--max_rollbacks`.
        """
        seen = "; ".join(alarms)
        was_healthy = self.healthy.was_healthy
        # As of the first step that the guard doubted: what lasts is an alarm only when it has.
        to_step = self.healthy.restore(step - max(self.guard.doubtful - 1, 0) * self.args.log_steps)
        # Where lambda was at its bound already, it is to have its time again; and a run that was resumed amid doubts has no other state.
        self.guard.pinned_ratios = []
        self.guard.forget_doubts()
        self.peaks.clear()
        if self.num_rollbacks == self.args.max_rollbacks:
            self.lowered.scale_learning_rate(self.factor)
            self.record(step, "stopped", f"{seen}: stopped after {self.num_rollbacks} rollbacks", to_step=to_step)
            return to_step, False
        self.num_rollbacks += 1
        self.factor /= 2
        self.num_breakdowns += was_healthy
        self.healthy_since = to_step
        self.lowered.scale_learning_rate(self.factor)
        message = f"{seen}: back to step {to_step}, rate {self.factor:g} times the one given, data in another order"
        self.record(step, "rollback", message, to_step=to_step)
        return to_step, True

    def record(self, step: int, kind: str, message: str, **values) -> None:
        record_event(self.accelerator, self.output_dir, step, kind, message, **values)

    def state_dict(self) -> dict:
        return {
            "guard": self.guard.state_dict(),
            # Not of the guard's own state, which goes back with the run.
            "has_been_pinned": self.guard.has_been_pinned,
            "peaks": {name: value.detach().cpu() for name, value in self.peaks.items()},
            "restored": self.healthy.restored,
            **{name: getattr(self, name) for name in self.NUMBERS},
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self.guard.load_state_dict(state_dict["guard"])
        self.guard.has_been_pinned = state_dict["has_been_pinned"]
        self.peaks = {name: value.to(self.accelerator.device) for name, value in state_dict["peaks"].items()}
        self.healthy.restored = state_dict["restored"]
        for name in self.NUMBERS:
            setattr(self, name, state_dict[name])
