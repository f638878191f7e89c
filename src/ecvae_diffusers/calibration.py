# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Energy calibration of any generator, by constrained learning (Luo et al., ECCV 2024, arXiv 2311.04071).

A generator G is trained on its own samples, corrected by a short Langevin chain on an energy model f:

.. math::
    \min_G \; L(G) \quad \text{subject to} \quad
    C(G) = \mathbb E_z \| G(z) - \operatorname{sg}[\tilde x(G(z))] \|^2 \le \epsilon

Here x~ is the target: the end of a K-step chain (see [`LangevinScheduler`]) that starts at G(z). The squared error is SUMMED over
a sample. The problem is solved by primal-dual steps, where the dual variable lambda is an adaptive weight:

.. math::
    \text{primal:}\quad & \min_G \; L(G) + \lambda C(G) \\
    \text{dual:}\quad & \lambda \leftarrow \operatorname{clip}(\lambda + \eta \operatorname{clip}(C / \epsilon - 1, -1, 1),
    0, \lambda_{\max}) \\
    \text{energy:}\quad & \min_f \; \mathbb E f(x_{\text{data}}) - \mathbb E f(\operatorname{sg}[\tilde x])
    + \alpha \, (\mathbb E f(x_{\text{data}})^2 + \mathbb E f(\operatorname{sg}[\tilde x])^2)
    + \tfrac{\gamma}{2} \, \mathbb E \| \nabla f(x_{\text{data}}) \|^2

The dual step uses the relative violation C / epsilon - 1. With the published absolute violation C - epsilon, eta would need
tuning for every image size, and lambda would hardly move.

**The tolerance.** A sample has D entries. The chain takes K steps with drift step a and noise of standard deviation b (see
[`LangevinScheduler`]). Its noise adds D K b^2 to C, or less with conditioning. Its drift moves the sample as a whole, by at most
K a times the slope of the energy. That slope does not grow with D. So `"auto"` is

.. math:: \epsilon = D K b^2 + \rho^2

with the same length rho for every sample size.

**The gradient penalty.** Take the same image at n times as many pixels, and an energy of their averages: the squared norm of
its gradient is n times smaller. A fixed gamma would thus lose its effect on larger samples, so `"auto"` is

.. math:: \gamma = 0.1 \, D / 256

**The limit of short chains.** The gradient of lambda C is 2 lambda (G(z) - x~), and for a short chain x~ - G(z) is close to
-K a grad f. The generator then receives 2 lambda K a times the gradient of f; at K = 1, this is exact in expectation. In this
limit, the method is a VAE-GAN with a Wasserstein-type critic f.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
from diffusers.utils import BaseOutput

from .energy import compute_energy, energy_and_gradient, frozen
from .schedulers.scheduling_langevin import LangevinScheduler


# Length rho of the drift of a whole sample in a healthy run on images in [-1, 1], measured on digits. Its square, plus the noise
# floor, is the "auto" tolerance.
HEALTHY_MOVE = 0.1184
# The "auto" gradient penalty per entry of a sample, tuned on digits (D = 256) and on colour images up to 64 px.
GRADIENT_PENALTY = 0.1 / 256
# Rate of the adapted drift step: like lambda, it corrects an error within about ten iterations.
DRIFT_STEP_RATE = 0.1


@dataclass
class CalibrationOutput(BaseOutput):
    """
    Output of [`EnergyCalibrator.calibrate`]. All scalars are 0-dimensional tensors on the samples' device, so that only
    logging waits for the device.

    Args:
        loss (`torch.Tensor`): lambda times the constraint, with gradients to the samples. Add it to the generator's own loss.
        constraint (`torch.Tensor`): C, the squared distance between a sample and its target, summed over the sample and
            averaged over the batch. No gradient.
        noise_floor (`torch.Tensor`): The part of C that comes from the chain's noise.
        drift (`torch.Tensor`): Root-mean-square move per entry without the noise: sqrt(max(C - noise_floor, 0) / D). It comes
            from the energy's gradient, and from the pull of a conditioned chain.
        targets (`torch.Tensor`): The calibrated samples x~, float32 or higher precision, no gradient. They are the negatives of
            the energy step.
        energy_samples (`torch.Tensor` of shape `(batch_size,)`): Energies of the samples, from the chain's first step. `None` if
            `constrain` was not given them.
        gradient_norm (`torch.Tensor`): Norm of the gradient of lambda times the squared distance with respect to one sample:
            2 lambda sqrt(max(C - noise_floor, 0)). It leaves out the chain's noise, which averages out. No gradient.
    """

    loss: torch.Tensor
    constraint: torch.Tensor
    noise_floor: torch.Tensor
    drift: torch.Tensor
    targets: torch.Tensor
    energy_samples: torch.Tensor | None
    gradient_norm: torch.Tensor


@dataclass
class EnergyLossOutput(BaseOutput):
    """
    Output of [`EnergyCalibrator.energy_loss`].

    Args:
        loss (`torch.Tensor`): The loss that the energy model minimises, with gradients.
        energy_real (`torch.Tensor` of shape `(batch_size,)`): Energies of the data. No gradient.
        energy_targets (`torch.Tensor` of shape `(num_samples,)`): Energies of the calibrated samples. No gradient.
    """

    loss: torch.Tensor
    energy_real: torch.Tensor
    energy_targets: torch.Tensor


class EnergyCalibrator:
    r"""
    Energy calibration for the samples of any generator.

    Args:
        energy_model (`nn.Module` or any callable, or `None`):
            The energy f: maps samples (B, ...) to an [`EnergyModelOutput`] or to a tensor of B energies, which are low for
            samples like the data. A module is frozen while a chain runs on it. `None` if every call passes an energy model.
        scheduler ([`LangevinScheduler`]):
            The chain: its number of steps, drift step, noise and conditioning.
        tolerance (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            The bound epsilon > 0 on the constraint, a squared error summed over a sample. `"auto"` is D K b^2 + rho^2,
            for samples of D entries, a chain of K steps with noise scale b, and an allowed drift of length rho (see
            `drift_tolerance`). Unlike a fixed number, it suits every sample size.
        drift_tolerance (`float`, *optional*):
            The root-mean-square drift per entry that `"auto"` allows beyond the noise: rho / sqrt(D). If `None`, rho is
            0.1184 at every D, for images in [-1, 1].
        initial_dual (`float`, *optional*, defaults to `30.0`): lambda at the start, from 0 to `max_dual`.
        dual_learning_rate (`float`, *optional*, defaults to `0.1`):
            Rate eta of the dual step, at least 0. 0 keeps lambda fixed.
        relative_dual_step (`bool`, *optional*, defaults to `True`):
            Whether the violation is C / epsilon - 1, clipped to [-1, 1], instead of the published C - epsilon.
        max_dual (`float`, *optional*, defaults to `100.0`): Upper bound of lambda, above 0.
        energy_regularization (`float`, *optional*, defaults to `0.1`):
            Weight alpha >= 0 of the mean squared energies. It keeps energies near 0, and limits their gradients while data and
            samples are far apart.
        gradient_penalty (`float` or `"auto"`, *optional*, defaults to `0.0`):
            Weight gamma >= 0 of the mean squared norm of the energy's gradient at the data (R1, Mescheder et al. 2018, arXiv
            1801.04406). It damps oscillations between energy model and generator. `"auto"` is 0.1 D / 256. If it is above 0, the
            energy model must be twice differentiable.

    Raises:
        ValueError: if an argument is outside the range given above.

    Example (a generator of points learns where the data lies, at (2, 2)):

    ```python
    >>> import torch
    >>> from ecvae_diffusers import EnergyCalibrator, LangevinScheduler
    >>> _ = torch.manual_seed(0)
    >>> generator = torch.nn.Linear(2, 2)
    >>> energy = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))
    >>> scheduler = LangevinScheduler(num_steps=5, drift_step_size=0.1, noise_scale=0.01)
    >>> calibrator = EnergyCalibrator(energy, scheduler, tolerance=0.1, initial_dual=1.0)
    >>> generator_optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
    >>> energy_optimizer = torch.optim.Adam(energy.parameters(), lr=1e-2)
    >>> for _ in range(300):
    ...     data = 2 + 0.5 * torch.randn(64, 2)
    ...     calibration = calibrator.calibrate(generator(torch.randn(64, 2)))
    ...     calibration.loss.backward()  # add your generator's own loss here, if it has one
    ...     generator_optimizer.step()
    ...     generator_optimizer.zero_grad()
    ...     calibrator.energy_loss(data, calibration.targets).loss.backward()
    ...     energy_optimizer.step()
    ...     energy_optimizer.zero_grad()
    ...     calibrator.dual_step(calibration.constraint)
    >>> bool((generator(torch.randn(1000, 2)).mean(0) - 2).abs().max() < 0.5)
    True

    ```
    """

    def __init__(
        self,
        energy_model: Callable | None,
        scheduler: LangevinScheduler,
        tolerance: float | str = "auto",
        drift_tolerance: float | None = None,
        initial_dual: float = 30.0,
        dual_learning_rate: float = 0.1,
        max_dual: float = 100.0,
        energy_regularization: float = 0.1,
        relative_dual_step: bool = True,
        gradient_penalty: float | str = 0.0,
    ):
        if tolerance != "auto" and not (isinstance(tolerance, (int, float)) and 0 < tolerance < float("inf")):
            raise ValueError(f"`tolerance` must be 'auto' or a finite number above 0, but is {tolerance!r}.")
        if not 0 < max_dual < float("inf"):
            raise ValueError(f"`max_dual` must be a finite number above 0, but is {max_dual}.")
        if not 0 <= initial_dual <= max_dual:
            raise ValueError(f"`initial_dual` must be from 0 to `max_dual` ({max_dual}), but is {initial_dual}.")
        self.energy_model = energy_model
        self.scheduler = scheduler
        self.tolerance = tolerance
        self.drift_tolerance = drift_tolerance
        self.dual_learning_rate = dual_learning_rate
        self.max_dual = max_dual
        self.relative_dual_step = relative_dual_step
        self.energy_regularization = energy_regularization
        self.gradient_penalty = gradient_penalty
        self.dual = torch.tensor(float(initial_dual))
        self.drift_scale = torch.tensor(1.0)
        self.num_entries: int | None = None
        for name in ("drift_tolerance", "dual_learning_rate", "energy_regularization", "gradient_penalty"):
            value = getattr(self, name)
            if value is None or (name == "gradient_penalty" and value == "auto"):
                continue
            if not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
                raise ValueError(f"`{name}` must be a finite number of at least 0, but is {value!r}.")

    def resolve_tolerance(self) -> float:
        """
        Return epsilon as a number: `tolerance`, or for `"auto"` D K b^2 + rho^2.

        Raises:
            RuntimeError: if it is `"auto"` and D is unknown, because no sample was calibrated yet.
            ValueError: if it is `"auto"` and would be 0.
        """
        if self.tolerance != "auto":
            return float(self.tolerance)
        tolerance = self.known_entries() * (self.resolve_drift_tolerance() ** 2 + self.scheduler.noise_variance())
        if tolerance == 0:
            raise ValueError("`noise_scale` and `drift_tolerance` can't both be 0 if `tolerance` is 'auto'.")
        return tolerance

    def resolve_drift_tolerance(self) -> float:
        """
        Return the root-mean-square drift per entry that is allowed beyond the noise: `drift_tolerance`, or 0.1184 / sqrt(D).

        Raises:
            RuntimeError: if it depends on the number D of entries, and no sample was calibrated yet.
        """
        healthy = HEALTHY_MOVE / math.sqrt(self.known_entries())
        return healthy if self.drift_tolerance is None else self.drift_tolerance

    def known_entries(self) -> int:
        """Return the number D of entries of a sample. Raises `RuntimeError` if no sample was calibrated yet."""
        if self.num_entries is None:
            raise RuntimeError(
                "The tolerance depends on the size of a sample, which is unknown: call `calibrate` first."
            )
        return self.num_entries

    def _choose(self, energy_model: Callable | None) -> Callable:
        energy_model = self.energy_model if energy_model is None else energy_model
        if energy_model is None:
            raise ValueError("`energy_model` must be given, because the calibrator has none.")
        return energy_model

    def _chain(
        self,
        samples: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: torch.Tensor | Sequence[torch.Tensor] | None,
        energy_model: Callable | None = None,
        condition: torch.Tensor | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the energies f(x_k) and the next state x_{k+1}, for each step k of a chain from `samples`."""
        energy_model = self._choose(energy_model)
        initial_sample = sample = samples.detach().to(torch.promote_types(samples.dtype, torch.float32))
        drift_scale = self.drift_scale.to(sample.device)
        with frozen(energy_model) if isinstance(energy_model, nn.Module) else nullcontext():
            for timestep in range(len(self.scheduler)):
                energy, gradient = energy_and_gradient(energy_model, sample, condition)
                draws = None if noise is None else noise[timestep]
                sample = self.scheduler.step(
                    gradient, timestep, sample, initial_sample, generator, draws, drift_scale, return_dict=False
                )[0]
                yield energy, sample

    def run_chain(
        self,
        samples: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | Sequence[torch.Tensor] | None = None,
        return_trajectory: bool = False,
        energy_model: Callable | None = None,
        condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Run a chain from `samples` on the frozen energy model, and return its end. The chain's state is float32 or higher
        precision, whatever the precision of the energy model.

        Args:
            samples (`torch.Tensor` of shape `(batch_size, ...)`): The start x_0.
            generator (`torch.Generator` or a list of one per sample, *optional*): Makes the noise deterministic.
            noise (`torch.Tensor` of shape `(num_steps, batch_size, ...)`, or a sequence of one per step, *optional*):
                The chain's standard normal draws. Drawn from `generator` if not given.
            return_trajectory (`bool`, *optional*, defaults to `False`): Whether to return all states of the chain.
            energy_model (`Callable`, *optional*), condition (`torch.Tensor`, *optional*): As for `calibrate`.

        Returns:
            `torch.Tensor`: x~, in the shape of `samples`, float32 (float64 if `samples` are), no gradient. With
            `return_trajectory`, the states x_0 to x_K, of shape `(num_steps + 1, batch_size, ...)`.

        Raises:
            ValueError: if neither the call nor the calibrator has an energy model.
        """
        states = [sample for _, sample in self._chain(samples, generator, noise, energy_model, condition)]
        if return_trajectory:
            return torch.stack([samples.detach().to(states[0].dtype), *states])
        return states[-1]

    def calibrate(
        self,
        samples: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | Sequence[torch.Tensor] | None = None,
        energy_model: Callable | None = None,
        distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        condition: torch.Tensor | None = None,
    ) -> CalibrationOutput:
        """
        Run a chain from the generator's samples, and return the constraint on their distance to its ends.

        Args:
            samples (`torch.Tensor` of shape `(batch_size, ...)`): Samples of the generator, with gradients.
            generator, noise: As for `run_chain`.
            energy_model (`Callable`, *optional*):
                Replaces the calibrator's energy model for this batch, for example by the energy of latents given images.
            distance (`Callable`, *optional*):
                Replaces the squared error in the constraint: maps samples and targets (the chain's ends, no gradient) to one
                number per sample, with gradients. `noise_floor` and `drift` remain those of the squared error.
            condition (`torch.Tensor` of shape `(batch_size, ...)`, *optional*):
                Second argument of the energy model, such as the samples' classes.

        Returns:
            [`CalibrationOutput`]

        Raises:
            ValueError: if `samples` has fewer than two dimensions or an empty batch, or the energy model or the distance does
                not return one number per sample.
        """
        if samples.ndim < 2 or samples.shape[0] == 0:
            raise ValueError(f"`samples` must have shape (batch_size, ...), but has {tuple(samples.shape)}.")
        energy_samples = None
        for energy, targets in self._chain(samples, generator, noise, energy_model, condition):
            energy_samples = energy if energy_samples is None else energy_samples
        return self.constrain(samples, targets, energy_samples, distance)

    def constrain(
        self,
        samples: torch.Tensor,
        targets: torch.Tensor,
        energy_samples: torch.Tensor | None = None,
        distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> CalibrationOutput:
        """
        Compute the output of `calibrate` for a chain that has already run: by `run_chain`, from the same samples without
        gradients.

        Args:
            samples (`torch.Tensor` of shape `(batch_size, ...)`): Samples of the generator, with gradients.
            targets (`torch.Tensor`): The chain's ends, float32 or more, no gradient.
            energy_samples (`torch.Tensor` of shape `(batch_size,)`, *optional*): Energies of the samples, for the output.
            distance (`Callable`, *optional*): As for `calibrate`.

        Returns:
            [`CalibrationOutput`]

        Raises:
            ValueError: if `samples` and `targets` differ in shape, or the distance does not return one number per sample.
        """
        if samples.shape != targets.shape:
            raise ValueError(
                f"`samples` must have the shape of `targets`, {tuple(targets.shape)}, but has {tuple(samples.shape)}."
            )
        self.num_entries = samples[0].numel()
        self.dual = self.dual.to(samples.device)
        self.drift_scale = self.drift_scale.to(samples.device)
        constraint = squared_error = (samples.to(targets.dtype) - targets).square().flatten(1).sum(1).mean()
        if distance is not None:
            distances = distance(samples, targets)
            if distances.numel() != len(samples):
                raise ValueError(
                    f"`distance` must return {len(samples)} numbers, but returned {tuple(distances.shape)}."
                )
            constraint = distances.mean()
        noise_floor = constraint.new_tensor(self.num_entries * self.scheduler.noise_variance())
        drift = self._drift(squared_error.detach())
        return CalibrationOutput(
            loss=self.dual * constraint,
            constraint=constraint.detach(),
            noise_floor=noise_floor,
            drift=drift,
            targets=targets,
            energy_samples=energy_samples,
            gradient_norm=2 * self.dual * drift * math.sqrt(self.num_entries),
        )

    def _drift(self, constraint: torch.Tensor) -> torch.Tensor:
        """Return sqrt(max(C - noise floor, 0) / D)."""
        return (constraint / self.known_entries() - self.scheduler.noise_variance()).clamp(min=0).sqrt()

    def energy_loss(
        self,
        real: torch.Tensor,
        targets: torch.Tensor,
        energy_model: Callable | None = None,
        condition: torch.Tensor | None = None,
        target_condition: torch.Tensor | None = None,
    ) -> EnergyLossOutput:
        """
        Return the loss of the energy step. Without a gradient penalty, data and calibrated samples share one forward pass.

        Args:
            real (`torch.Tensor` of shape `(batch_size, ...)`): Data.
            targets (`torch.Tensor` of shape `(num_samples, ...)`): The calibrated samples, no gradient.
            energy_model (`nn.Module`, *optional*):
                The wrapped energy model in distributed training, where only the wrapper synchronises gradients.
            condition (`torch.Tensor` of shape `(batch_size, ...)`, *optional*),
            target_condition (`torch.Tensor` of shape `(num_samples, ...)`, *optional*):
                Second argument of the energy model for the data and for the calibrated samples. Give both or neither.

        Returns:
            [`EnergyLossOutput`]

        Raises:
            ValueError: if `real`, whose dtype the targets are converted to, holds integers, if only one of the conditions is
                given, or if neither the call nor the calibrator has an energy model.
        """
        if not real.is_floating_point():
            raise ValueError(f"`real` must have a floating-point dtype, as samples do, but has {real.dtype}.")
        conditions = [one for one in (condition, target_condition) if one is not None]
        if len(conditions) == 1:
            raise ValueError("`condition` and `target_condition` must both be given, or neither.")
        energy_model = self._choose(energy_model)
        targets = targets.detach().to(real.dtype)
        if self.gradient_penalty == 0:
            both = torch.cat(conditions) if conditions else None
            energy = compute_energy(energy_model, torch.cat([real, targets]), both)
            return self.contrast(*energy.split([real.shape[0], targets.shape[0]]))
        # Two passes, so that only that of the data is differentiated twice.
        real = real.detach().requires_grad_()
        energy_real = compute_energy(energy_model, real, condition)
        gradient = torch.autograd.grad(energy_real.sum(), real, create_graph=True)[0]
        output = self.contrast(energy_real, compute_energy(energy_model, targets, target_condition))
        penalty = gradient.float().square().flatten(1).sum(1).mean()
        gamma = (
            GRADIENT_PENALTY * gradient[0].numel() if self.gradient_penalty == "auto" else float(self.gradient_penalty)
        )
        output.loss = output.loss + gamma / 2 * penalty
        return output

    def contrast(self, energy_real: torch.Tensor, energy_targets: torch.Tensor) -> EnergyLossOutput:
        """Return the energy step's loss without the gradient penalty, from the energies of data and of calibrated samples."""
        loss = energy_real.mean() - energy_targets.mean()
        if self.energy_regularization > 0:
            squares = energy_real.square().mean() + energy_targets.square().mean()
            loss = loss + self.energy_regularization * squares
        return EnergyLossOutput(loss=loss, energy_real=energy_real.detach(), energy_targets=energy_targets.detach())

    @torch.no_grad()
    def dual_step(self, constraint: torch.Tensor | float) -> None:
        """
        Take the dual step lambda <- clip(lambda + eta v, 0, lambda_max) with the violation v = clip(C / epsilon - 1, -1, 1),
        or, without `relative_dual_step`, v = C - epsilon.

        Before the energy model has learned anything, C can be many times epsilon whatever the generator does. Without clipping,
        lambda would rise to its bound and take the rest of the run to come down. With a `distance` far below 0, it would fall to 0
        at once. Clipping does not change the value at which lambda settles.

        Args:
            constraint (`torch.Tensor` or `float`):
                C of this step. In distributed training, pass its mean over processes, so that lambda is the same in all.

        Raises:
            RuntimeError, ValueError: as `resolve_tolerance`.
        """
        tolerance = self.resolve_tolerance()
        if self.relative_dual_step:
            violation = torch.as_tensor(constraint / tolerance - 1.0).clamp(-1.0, 1.0)
        else:
            violation = torch.as_tensor(constraint - tolerance)
        dual = self.dual + self.dual_learning_rate * violation
        self.dual = dual.clamp(0.0, self.max_dual).to(self.dual.dtype)

    @torch.no_grad()
    def adapt_drift_step(self, constraint: torch.Tensor | float) -> None:
        """
        Lower the chain's drift step a while the drift exceeds its tolerance: a <- min(a (drift_tolerance / drift)^0.1, a_0). The
        ratio is clipped to [1 / e, e], and a_0 is the scheduler's drift step. Call it after each training step if the scale of the
        energy is unknown.

        a never rises above a_0. If it could, it would hold the drift at its tolerance: the constraint would always just hold, and
        lambda would have no effect. With a weak energy model, a would grow without bound, and noise would lead the generator.

        Args:
            constraint (`torch.Tensor` or `float`): As for `dual_step`.

        Raises:
            ValueError: if `drift_tolerance` is 0.
            RuntimeError: if D is unknown, because no sample was calibrated yet.
        """
        if self.drift_tolerance == 0:
            raise ValueError("`drift_tolerance` must be above 0 to adapt the drift step, but is 0.")
        ratio = self.resolve_drift_tolerance() / self._drift(torch.as_tensor(constraint)).clamp(min=1e-8)
        self.drift_scale = (self.drift_scale * ratio.clamp(math.exp(-1), math.e) ** DRIFT_STEP_RATE).clamp(max=1.0)

    @property
    def drift_step_size(self) -> float:
        """The current drift step a: that of the scheduler, as changed by `adapt_drift_step`."""
        return self.scheduler.config.drift_step_size * self.drift_scale.item()

    def adapted_scheduler(self) -> LangevinScheduler:
        """Return a scheduler of the current chain for saving: with the adapted drift step a and an unchanged pull a w."""
        config = self.scheduler.config
        # The scheduler refuses a w above 1, which rounding must not cause.
        largest_weight = (1 - 1e-12) / max(self.drift_step_size, 1e-12)
        return LangevinScheduler.from_config(
            config,
            drift_step_size=self.drift_step_size,
            conditioning_weight=min(config.conditioning_weight / self.drift_scale.item(), largest_weight),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of the calibrator for a checkpoint: the dual variable and the adapted drift step."""
        return {"dual": self.dual.detach().cpu(), "drift_scale": self.drift_scale.detach().cpu()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restore the state that `state_dict` returned."""
        self.dual = state_dict["dual"].to(self.dual).clamp(0.0, self.max_dual)
        self.drift_scale = state_dict["drift_scale"].to(self.drift_scale)
