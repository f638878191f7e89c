# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
r"""Energy calibration of any generator, by constrained learning (Luo et al., ECCV 2024, arXiv 2311.04071).

A generator G is trained on its own samples, corrected by a short Langevin run of an energy model f:

.. math::
    \min_G \; L(G) \quad \text{subject to} \quad
    C(G) = \mathbb E_z \| G(z) - \operatorname{sg}[\tilde x(G(z))] \|^2 \le \epsilon

with the end x~ of a K-step chain (see [`LangevinScheduler`]) that starts at G(z), and the squared error SUMMED over a
sample. It is solved primal-dual, with the dual variable (the adaptive weight) lambda:

.. math::
    \text{primal:}\quad & \min_G \; L(G) + \lambda C(G) \\
    \text{dual:}\quad & \lambda \leftarrow \operatorname{clip}(\lambda + \eta \operatorname{clip}(C / \epsilon - 1, -1, 1),
    0, \lambda_{\max}) \\
    \text{energy:}\quad & \min_f \; \mathbb E f(x_{\text{data}}) - \mathbb E f(\operatorname{sg}[\tilde x])
    + \alpha \, (\mathbb E f(x_{\text{data}})^2 + \mathbb E f(\operatorname{sg}[\tilde x])^2)
    + \tfrac{\gamma}{2} \, \mathbb E \| \nabla f(x_{\text{data}}) \|^2

The dual step is taken on the relative violation C / epsilon - 1. On the absolute violation C - epsilon, as published, eta
would have to be chosen anew for every image size, and lambda would hardly move.

**The tolerance.** The chain moves a sample by its noise and by its drift. The noise moves each of the D entries, and adds
D K b^2 to C. The drift moves the sample as a whole: its length is at most K a times the slope of the energy, and the
slope is a property of the whole sample that does not grow with D. So `"auto"` is

.. math:: \epsilon = D K b^2 + \rho^2

with a length rho that is the same for every sample size.

**The gradient penalty.** Draw the same image with n times as many pixels, and let the energy see their averages: its
squared slope is n times smaller. A fixed gamma would fade with the size of the sample, so `"auto"` is

.. math:: \gamma = 0.1 \, D / 256

**A limit worth knowing.** The gradient of lambda C is 2 lambda (G(z) - x~), and for a short chain x~ - G(z) is close
to -K a grad f: the generator then receives 2 lambda K a times the gradient of f, exactly so in expectation at K = 1.
There the method is a VAE-GAN with a Wasserstein-type critic f.
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


# Length rho of the drift of a whole sample that a healthy run on images in [-1, 1] keeps: measured on digits
# (docs/results/digits/chain.md). It sets the "auto" tolerance together with the noise floor.
HEALTHY_MOVE = 0.1184
# The "auto" gradient penalty per entry of a sample: measured on digits (D = 256) and on colour up to 64 px.
GRADIENT_PENALTY = 0.1 / 256
# Rate of the adapted drift step: it forgets an error within some ten iterations, as lambda does.
DRIFT_STEP_RATE = 0.1


@dataclass
class CalibrationOutput(BaseOutput):
    """
    Output of [`EnergyCalibrator.calibrate`]. All scalars are tensors of no dimension on the samples' device, so that
    logging alone decides when to wait for them.

    Args:
        loss (`torch.Tensor`): lambda times the constraint, with gradients to the samples: add it to the primal loss.
        constraint (`torch.Tensor`): C, the squared distance between the ends of the chain, summed over a sample and
            averaged over the batch. No gradient.
        noise_floor (`torch.Tensor`): The part of C that the chain's noise accounts for.
        drift (`torch.Tensor`): Root-mean-square move per entry that is not noise (the energy's gradient, and the pull
            of a conditioned chain): sqrt(max(C - noise_floor, 0) / D).
        targets (`torch.Tensor`): The calibrated samples x~, float32 or more, no gradient. The energy step takes them as
            its negatives.
        energy_samples (`torch.Tensor` of shape `(batch_size,)`): Energies of the samples, from the chain's first step;
            `None` from `constrain` where they were not given.
        gradient_norm (`torch.Tensor`): Length of the gradient that a sample receives from lambda times its squared distance, without
            the chain's noise, which averages out: 2 lambda sqrt(max(C - noise_floor, 0)). No gradient.
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
        loss (`torch.Tensor`): What the energy model minimises.
        energy_real (`torch.Tensor` of shape `(batch_size,)`): Energies of the data. No gradient.
        energy_targets (`torch.Tensor` of shape `(num_samples,)`): Energies of the calibrated samples. No gradient.
    """

    loss: torch.Tensor
    energy_real: torch.Tensor
    energy_targets: torch.Tensor


class EnergyCalibrator:
    r"""
    Calibration of the samples of any generator with an energy model.

    Args:
        energy_model (`nn.Module` or any callable, or `None`):
            f: maps samples (B, ...) to an [`EnergyModelOutput`] or to a tensor of B energies; low = like the data. A
            module is frozen while a chain runs on it. `None` if each batch is given with an energy of its own.
        scheduler ([`LangevinScheduler`]):
            The chain: its number of steps, drift step, noise and conditioning.
        tolerance (`float` or `"auto"`, *optional*, defaults to `"auto"`):
            The bound epsilon > 0 on the constraint, a squared error summed over a sample. `"auto"` is D K b^2 + rho^2 with
            D entries per sample: it holds at every sample size, unlike a fixed number.
        drift_tolerance (`float`, *optional*):
            The root-mean-square drift per entry that `"auto"` allows beyond the noise: rho / sqrt(D). If `None`, rho is
            0.1184 at every D, in the unit of images in [-1, 1].
        initial_dual (`float`, *optional*, defaults to `30.0`): lambda at the start, from 0 to `max_dual`.
        dual_learning_rate (`float`, *optional*, defaults to `0.1`):
            eta, at least 0, on the violation of the constraint. 0 keeps lambda fixed.
        relative_dual_step (`bool`, *optional*, defaults to `True`):
            Whether the violation is C / epsilon - 1 and clipped to [-1, 1], or the published C - epsilon.
        max_dual (`float`, *optional*, defaults to `100.0`): Upper bound of lambda, above 0.
        energy_regularization (`float`, *optional*, defaults to `0.1`):
            alpha >= 0, on the mean square of energies. It keeps them near 0, and their gradients from growing without end
            where data and samples are far apart; 0 is the loss without it.
        gradient_penalty (`float` or `"auto"`, *optional*, defaults to `0.0`):
            gamma >= 0, on the mean squared norm of the energy's gradient at the data (R1, Mescheder et al. 2018, arXiv
            1801.04406). It damps the game of energy model and generator, which otherwise circle each other. `"auto"` is
            0.1 D / 256. Where it is above 0, the energy model must be differentiable twice.

    Raises:
        ValueError: if an argument is outside what is listed above.

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
            RuntimeError: if it is `"auto"` and no sample was calibrated yet, so that D is not known.
            ValueError: if it is `"auto"` and would be 0.
        """
        if self.tolerance != "auto":
            return float(self.tolerance)
        tolerance = self.known_entries() * (self.resolve_drift_tolerance() ** 2 + self.scheduler.noise_variance())
        if tolerance == 0:
            raise ValueError("The 'auto' tolerance is 0: `noise_scale` and `drift_tolerance` can't both be 0.")
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
            raise RuntimeError("The tolerance of the drift depends on the size of a sample: call `calibrate` first.")
        return self.num_entries

    def _choose(self, energy_model: Callable | None) -> Callable:
        energy_model = self.energy_model if energy_model is None else energy_model
        if energy_model is None:
            raise ValueError("`energy_model` must be given: the calibrator has none of its own.")
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
        Return the end of a chain that starts at `samples`, on the frozen energy. State and update are float32, whatever
        precision the energy model computes in.

        Args:
            samples (`torch.Tensor` of shape `(batch_size, ...)`): The start x_0.
            generator (`torch.Generator` or a list of one per sample, *optional*): Makes the noise deterministic.
            noise (`torch.Tensor` of shape `(num_steps, batch_size, ...)`, or a sequence of one per step, *optional*):
                The chain's standard normal draws. Drawn if not given.
            return_trajectory (`bool`, *optional*, defaults to `False`): Whether to return all states.
            energy_model (`Callable`, *optional*), condition (`torch.Tensor`, *optional*): As for `calibrate`.

        Returns:
            `torch.Tensor`: x~, in the shape of `samples`, float32 (float64 where they are), no gradient. With
            `return_trajectory` x_0 to x_K, of shape `(num_steps + 1, batch_size, ...)`.
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
        Correct samples by the energy, and measure how far they had to go.

        Args:
            samples (`torch.Tensor` of shape `(batch_size, ...)`): Samples of the generator, with gradients.
            generator, noise: As for `run_chain`.
            energy_model (`Callable`, *optional*):
                The energy of these samples, if it differs between batches: that of latents given images, for example. The
                calibrator's own if not given.
            distance (`Callable`, *optional*):
                What the constraint bounds the mean of, instead of the squared error: maps samples and targets (the chain's
                ends, no gradient) to one number per sample, with gradients. `noise_floor` and `drift` remain those of the
                squared error.
            condition (`torch.Tensor` of shape `(batch_size, ...)`, *optional*):
                What the energy model gets as its second argument, such as the samples' classes.

        Returns:
            [`CalibrationOutput`]

        Raises:
            ValueError: if `samples` has fewer than two dimensions or an empty batch, or the energy model or the distance does
                not give one number per sample.
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
        Return what `calibrate` returns, for samples whose chain was run before: by `run_chain`, from the same values without
        gradients.

        Args:
            samples (`torch.Tensor` of shape `(batch_size, ...)`): Samples of the generator, with gradients.
            targets (`torch.Tensor`): The chain's ends, float32 or more, no gradient.
            energy_samples (`torch.Tensor` of shape `(batch_size,)`, *optional*): Energies of the samples, to be passed on.
            distance (`Callable`, *optional*): As for `calibrate`.

        Returns:
            [`CalibrationOutput`]

        Raises:
            ValueError: if `targets` have another shape than `samples`, or the distance does not give one number per sample.
        """
        if samples.shape != targets.shape:
            raise ValueError(f"`samples` must have the shape of `targets`: {samples.shape}, {targets.shape}.")
        self.num_entries = samples[0].numel()
        self.dual = self.dual.to(samples.device)
        self.drift_scale = self.drift_scale.to(samples.device)
        constraint = squared_error = (samples.to(targets.dtype) - targets).square().flatten(1).sum(1).mean()
        if distance is not None:
            distances = distance(samples, targets)
            if distances.numel() != len(samples):
                raise ValueError(f"`distance` must give {len(samples)} numbers, but gave {tuple(distances.shape)}.")
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
        Return the loss of the energy step. Without a gradient penalty it takes one forward pass over data and calibrated
        samples together.

        Args:
            real (`torch.Tensor` of shape `(batch_size, ...)`): Data.
            targets (`torch.Tensor` of shape `(num_samples, ...)`): The calibrated samples, no gradient.
            energy_model (`nn.Module`, *optional*):
                The wrapped energy model, where training is distributed: gradients are synchronised only through it.
            condition (`torch.Tensor` of shape `(batch_size, ...)`, *optional*),
            target_condition (`torch.Tensor` of shape `(num_samples, ...)`, *optional*):
                What the energy model gets as its second argument for the data and for the calibrated samples: both or neither.

        Returns:
            [`EnergyLossOutput`]

        Raises:
            ValueError: if `real` holds integers, since the energy model gets targets in its precision, or only one of both
                conditions is given.
        """
        if not real.is_floating_point():
            raise ValueError(f"`real` must be of a floating point dtype, as samples are, but is {real.dtype}.")
        conditions = [one for one in (condition, target_condition) if one is not None]
        if len(conditions) == 1:
            raise ValueError("`condition` and `target_condition` must both be given, or neither.")
        energy_model = self._choose(energy_model)
        targets = targets.detach().to(real.dtype)
        if self.gradient_penalty == 0:
            both = torch.cat(conditions) if conditions else None
            energy = compute_energy(energy_model, torch.cat([real, targets]), both)
            return self.contrast(*energy.split([real.shape[0], targets.shape[0]]))
        # Apart, so that only the data's part is differentiated twice.
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
        """Return the loss of the energy step from the energies of data and of calibrated samples, each of any number."""
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

        Before the energy model has learned anything, C can be many times epsilon whatever the generator does: without clipping,
        lambda would rise to its bound and take the rest of a run to come down. A `distance` that can be far below 0 would let it
        fall to 0 at once. Clipping does not change where lambda rests.

        Args:
            constraint (`torch.Tensor` or `float`):
                C of this step. In distributed training its mean over the processes, so that lambda is the same in all.
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
        Lower the chain's drift step while the drift exceeds its tolerance: a <- min(a (drift_tolerance / drift)^0.1, a_0),
        by at most a factor e each way before the power, where a_0 is the scheduler's. Call it after each step where the
        energy's scale is not known.

        a never rises above a_0. If it kept the drift at its tolerance, the constraint would always just hold and lambda have no
        effect: with a weak energy model, a would grow without end, and noise lead the generator.

        Args:
            constraint (`torch.Tensor` or `float`): As for `dual_step`.

        Raises:
            ValueError: if `drift_tolerance` is 0.
            RuntimeError: if no sample was calibrated yet, so that D is not known.
        """
        if self.drift_tolerance == 0:
            raise ValueError("`drift_tolerance` must be above 0 for the drift step to be adapted, but is 0.")
        ratio = self.resolve_drift_tolerance() / self._drift(torch.as_tensor(constraint)).clamp(min=1e-8)
        self.drift_scale = (self.drift_scale * ratio.clamp(math.exp(-1), math.e) ** DRIFT_STEP_RATE).clamp(max=1.0)

    @property
    def drift_step_size(self) -> float:
        """The current a: the scheduler's, as `adapt_drift_step` has changed it."""
        return self.scheduler.config.drift_step_size * self.drift_scale.item()

    def adapted_scheduler(self) -> LangevinScheduler:
        """Return the current chain, to be saved: with the adapted a, and the same pull a w."""
        config = self.scheduler.config
        # a w is at most 1: not a rounding above it.
        largest_weight = (1 - 1e-12) / max(self.drift_step_size, 1e-12)
        return LangevinScheduler.from_config(
            config,
            drift_step_size=self.drift_step_size,
            conditioning_weight=min(config.conditioning_weight / self.drift_scale.item(), largest_weight),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint must hold next to the energy model: the dual variable and the adapted drift step."""
        return {"dual": self.dual.detach().cpu(), "drift_scale": self.drift_scale.detach().cpu()}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        self.dual = state_dict["dual"].to(self.dual).clamp(0.0, self.max_dual)
        self.drift_scale = state_dict["drift_scale"].to(self.drift_scale)
