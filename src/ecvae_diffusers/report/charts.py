# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The charts of a run: which curves, their healthy range, and how to read them."""

import math

from ecvae_diffusers.report.drawing import Chart
from ecvae_diffusers.report.read import Run
from ecvae_diffusers.report.verdict import CONSTRAINT_RANGE, DRIFT_RANGE, GAP_RANGE, MIN_ACTIVE, SPREAD_RANGE


def calibration_charts(run: Run) -> list[Chart]:
    bounds, drift_range = between(run.argument("max_dual")), scaled(DRIFT_RANGE, run.drift_tolerance)
    # Without calibration no samples are made, and the data's spread alone says nothing.
    spreads = {"sample_spread": "prior samples", "data_spread": "data"} if len(run.last("sample_spread")) else {}
    return [
        Chart(
            "dual variable λ", {"dual": "λ"},
            "Healthy inside its bounds (dashed), at neither of them: there it has found the weight at which the "
            "constraint meets its tolerance. It may take a long part of the run to come down.",
            healthy=bounds, bounds=bounds or (),
        ),
        Chart(
            "constraint", {"constraint": "constraint", "tolerance": "tolerance", "noise_floor": "noise floor"},
            "Squared distance that the chain moves an image. Healthy near the tolerance; what lies below the noise floor "
            "is the chain's noise alone.",
            log=True, healthy=scaled(CONSTRAINT_RANGE, run.median("tolerance")),
        ),
        Chart(
            "drift per pixel", {"drift": "drift"},
            "Root-mean-square move that is not noise, for images in [-1, 1]; 0.0078 is one grey level. Healthy: 0.5 to 2 "
            "times --drift_tolerance.",
            log=True, healthy=drift_range if run.drift_is_judged else None,
        ),
        Chart(
            "gradients at images",
            {"calibration_gradient_norm": "calibration", "reconstruction_gradient_norm": "reconstruction"},
            "Euclidean norm of the gradient that one sample receives from calibration, and one reconstruction from the "
            "generator's own loss. Calibration is off where the first is below a hundredth of the second.", log=True,
        ),
        Chart(
            "energy gap", {"energy_gap": "calibrated samples minus data"},
            "In standard deviations of the energies. Healthy within one: the energy model can hardly tell them apart.",
            healthy=GAP_RANGE,
        ),
        Chart(
            "energies",
            {
                "energy_real": "data", "energy_samples": "prior samples", "energy_targets": "calibrated samples",
                "energy_held_out": "held-out images",
            },
            "Mean, and one standard deviation to each side (low = like the data). Only differences mean something: that "
            "the three wander together is healthy, that they part is not.",
        ),
        Chart(
            "overfitting of the energy model",
            {"overfitting": "overfitting", "augmentation_probability": "probability of augmentations"},
            "0: held-out images have the energies of training images; 1: those of samples. Augmentations become more frequent "
            "while it is above 0.5, with --adaptive_augmentation.",
        ),
        Chart(
            "spread of samples", spreads,
            "Standard deviation over a batch, averaged over pixels. Healthy: 0.5 to 1.5 times the data's; near 0 all "
            "samples are the same.",
            healthy=scaled(SPREAD_RANGE, run.median("data_spread")),
        ),
        Chart(
            "drift step a of the chain", varying(run, "langevin_drift_step", "a"),
            "Adapted so that the drift stays at --drift_tolerance.", log=True,
        ),
    ]  # fmt: skip


def training_charts(run: Run) -> list[Chart]:
    units = run.argument("latent_channels")
    return [
        Chart(
            "bits per dimension", {"bits_per_dimension": "bits"},
            "What a flow's density makes an entry of an 8-bit image cost. A lasting rise says that calibration weighs too "
            "much.",
        ),
        Chart(
            "reconstruction",
            {"reconstruction": "squared error", "refined_reconstruction": "of the posterior's chains' ends"},
            "Summed over an image. A lasting rise says that calibration weighs too much. Ends of chains on the posterior "
            "should lie below samples of q, or near them.", log=True,
        ),
        Chart(
            "KL divergence", {"kl": "KL divergence"},
            "In nats per image: what the latents say about it. Near 0 they say nothing (posterior collapse).",
        ),
        Chart("weight of the KL divergence", varying(run, "kl_weight", "weight"), "It rises over --kl_warmup_steps."),
        Chart(
            "active units", {"active_units": "active units"},
            "Latent dimensions whose posterior mean varies over the data. Healthy: at least a tenth of them.",
            healthy=None if math.isnan(units) else (max(1.0, MIN_ACTIVE * units), units),
        ),
        Chart(
            "variance of the posterior", {"posterior_variance": "q's variance"},
            "Averaged over images and latent dimensions. 1 is the prior's; a steady fall to 0 is a posterior that shrinks.",
            log=True,
        ),
        Chart(
            "posterior's constraint", {"posterior_constraint": "constraint"},
            "How far the chains on the images' posteriors lead away from q.",
        ),
        Chart(
            "posterior's dual variable", {"posterior_dual": "dual variable"},
            "The weight of the posterior's constraint. At its bound the constraint is not kept, whatever the encoder learns.",
            bounds=between(run.argument("max_posterior_dual")) or (),
        ),
        Chart(
            "gradient norms", {"gradient_norm": "generator", "energy_gradient_norm": "energy model"},
            "Healthy in a steady band. Growth over decades is divergence; an energy model whose norm vanishes is dead.",
            log=True,
        ),
        Chart(
            "learning rates", {"learning_rate": "generator", "energy_learning_rate": "energy model"},
            "As scheduled. A rollback of the guard halves one, and raises it again while the run is healthy.", log=True,
        ),
        Chart(
            "images per second", {"images_per_second": "images per second"},
            "Since the start, the last resumption or the last rollback, of training alone.",
        ),
        Chart(
            "peak memory", {"peak_memory_gib": "GiB"},
            "The most that the main process has held, of the device or of a CPU's memory, in GiB.",
        ),
    ]  # fmt: skip


def evaluation_charts(run: Run) -> list[Chart]:
    last = run.evaluations[-1] if run.evaluations else {}
    overlaps = ("precision", "recall", "density", "coverage")
    return [
        Chart(
            "Frechet distance", {"frechet_distance": "Frechet distance"},
            f"Falls as samples become like the data. {last.get('num_generated', '?')} samples against "
            f"{last.get('num_real', '?')} training images, features: {last.get('features', 'not known')}.",
        ),
        Chart(
            "kernel distance", {"kernel_distance": "kernel distance"},
            "Falls too, and is unbiased: it may be a little below 0.",
        ),
        Chart(
            ", ".join(overlaps), dict(zip(overlaps, overlaps)),
            "Precision and density: how many samples look like data; recall and coverage: how much of the data is met.",
        ),
        Chart(
            "bits per dimension of training images", {"bits_per_dimension": "bits"},
            "A flow's cost of an 8-bit image, in bits per entry.",
        ),
        Chart(
            "PSNR of reconstructions", {"psnr": "dB"},
            "dB, of training images. What a calibrated decoder gives up for detail.",
        ),
        Chart(
            "bounds on the likelihood", {"importance_weighted": "importance-weighted", "elbo": "ELBO"},
            "Nats per image, of training images. Between the two lies what q leaves of the posterior.",
        ),
        Chart(
            "amortisation gap", {"amortisation_gap": "amortisation gap"},
            "Nats per image by which the bound rises where q is optimised for each image.",
        ),
    ]  # fmt: skip


def varying(run: Run, name: str, label: str) -> dict[str, str]:
    """Return the curve of a logged value, unless it is a flat line."""
    return {name: label} if len({record.get(name) for record in run.metrics}) > 1 else {}


def between(bound: float) -> tuple[float, float] | None:
    return None if math.isnan(bound) else (0, bound)


def scaled(factors: tuple[float, float], value: float) -> tuple[float, float] | None:
    return None if math.isnan(value) else (factors[0] * value, factors[1] * value)
