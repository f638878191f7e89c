# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Defines the charts of a run: their curves, their healthy ranges, and how to read them."""

import math

from ecvae_diffusers.report.drawing import Chart
from ecvae_diffusers.report.read import Run
from ecvae_diffusers.report.verdict import CONSTRAINT_RANGE, DRIFT_RANGE, GAP_RANGE, MIN_ACTIVE, SPREAD_RANGE


def calibration_charts(run: Run) -> list[Chart]:
    bounds, drift_range = between(run.argument("max_dual")), scaled(DRIFT_RANGE, run.drift_tolerance)
    # Without calibration there are no samples with which to compare the spread of the data.
    spreads = {"sample_spread": "prior samples", "data_spread": "data"} if len(run.last("sample_spread")) else {}
    return [
        Chart(
            "dual variable lambda", {"dual": "lambda"},
            "Healthy between its bounds (dashed), not at one of them: then it has found the weight at which the constraint "
            "meets its tolerance. Finding it may take a large part of the run.",
            healthy=bounds, bounds=bounds or (),
        ),
        Chart(
            "constraint", {"constraint": "constraint", "tolerance": "tolerance", "noise_floor": "noise floor"},
            "Squared distance that the chain moves a sample, summed over the image. Healthy near the tolerance. The noise floor "
            "is the distance that the chain's noise alone moves it.",
            log=True, healthy=scaled(CONSTRAINT_RANGE, run.median("tolerance")),
        ),
        Chart(
            "drift per pixel", {"drift": "drift"},
            "Root-mean-square move of the chain without its noise, for images in [-1, 1]; one grey level is 0.0078. Healthy: "
            "0.5 to 2 times its tolerance.",
            log=True, healthy=drift_range if run.drift_is_judged else None,
        ),
        Chart(
            "gradients at images",
            {"calibration_gradient_norm": "calibration", "reconstruction_gradient_norm": "reconstruction"},
            "Euclidean norm of the gradient that a sample receives from calibration, and that a reconstruction receives from "
            "the generator's own loss. Calibration is off where the first is below a hundredth of the second.", log=True,
        ),
        Chart(
            "energy gap", {"energy_gap": "calibrated samples minus data"},
            "Difference of the mean energies, in their standard deviations. Healthy within one: the energy model can hardly "
            "tell calibrated samples from data.",
            healthy=GAP_RANGE,
        ),
        Chart(
            "energies",
            {
                "energy_real": "data", "energy_samples": "prior samples", "energy_targets": "calibrated samples",
                "energy_held_out": "held-out images",
            },
            "Mean and one standard deviation to each side. Images like the data have low energies. Only differences matter: "
            "curves that wander together are healthy, curves that part are not.",
        ),
        Chart(
            "overfitting of the energy model",
            {"overfitting": "overfitting", "augmentation_probability": "probability of augmentations"},
            "At 0, held-out images have the energies of training images; at 1, those of samples. With "
            "--adaptive_augmentation, augmentations become more frequent while it is above 0.5.",
        ),
        Chart(
            "spread of samples", spreads,
            "Standard deviation over a batch, averaged over pixels. Healthy: 0.5 to 1.5 times that of the data. Near 0, all "
            "samples are the same.",
            healthy=scaled(SPREAD_RANGE, run.median("data_spread")),
        ),
        Chart(
            "drift step a of the chain", varying(run, "langevin_drift_step", "a"),
            "Adapted so that the drift stays at its tolerance.", log=True,
        ),
    ]  # fmt: skip


def training_charts(run: Run) -> list[Chart]:
    units = run.argument("latent_channels")
    return [
        Chart(
            "bits per dimension", {"bits_per_dimension": "bits"},
            "Negative log-likelihood of 8-bit images under the flow, per entry. A lasting rise means that calibration weighs "
            "too much.",
        ),
        Chart(
            "reconstruction",
            {"reconstruction": "from samples of q", "refined_reconstruction": "from ends of the posterior's chains"},
            "Squared error, summed over an image. A lasting rise means that calibration weighs too much. The error from ends of "
            "the posterior's chains should be below that from samples of q, or near it.", log=True,
        ),
        Chart(
            "KL divergence", {"kl": "KL divergence"},
            "Information that the latents carry about an image, in nats. Near 0 they carry none (posterior collapse).",
        ),
        Chart("weight of the KL divergence", varying(run, "kl_weight", "weight"), "It rises over --kl_warmup_steps."),
        Chart(
            "active units", {"active_units": "active units"},
            "Latent dimensions whose posterior mean varies over the data. Healthy: at least a tenth of all.",
            healthy=None if math.isnan(units) else (max(1.0, MIN_ACTIVE * units), units),
        ),
        Chart(
            "variance of the posterior", {"posterior_variance": "variance of q"},
            "Averaged over images and latent dimensions. The prior has 1. A steady fall to 0 means that the posterior shrinks.",
            log=True,
        ),
        Chart(
            "posterior's constraint", {"posterior_constraint": "constraint"},
            "How far the posterior's chains lead away from q.",
        ),
        Chart(
            "posterior's dual variable", {"posterior_dual": "dual variable"},
            "The weight of the posterior's constraint. At its bound (dashed), the encoder does not meet the constraint.",
            bounds=between(run.argument("max_posterior_dual")) or (),
        ),
        Chart(
            "gradient norms", {"gradient_norm": "generator", "energy_gradient_norm": "energy model"},
            "Healthy in a steady band. Growth over orders of magnitude is divergence. An energy model whose norm vanishes no "
            "longer learns.",
            log=True,
        ),
        Chart(
            "learning rates", {"learning_rate": "generator", "energy_learning_rate": "energy model"},
            "As scheduled. A rollback of the guard halves a rate, which rises again while the run is healthy.", log=True,
        ),
        Chart(
            "images per second", {"images_per_second": "images per second"},
            "Training alone, since the start, the last resumption or the last rollback.",
        ),
        Chart(
            "peak memory", {"peak_memory_gib": "GiB"},
            "The most memory that the main process has used so far: that of the device, or that of the machine on a CPU.",
        ),
    ]  # fmt: skip


def evaluation_charts(run: Run) -> list[Chart]:
    last = run.evaluations[-1] if run.evaluations else {}
    overlaps = ("precision", "recall", "density", "coverage")
    return [
        Chart(
            "Frechet distance", {"frechet_distance": "Frechet distance"},
            f"Lower is better. {last.get('num_generated', '?')} samples against "
            f"{last.get('num_real', '?')} training images, features: {last.get('features', 'not known')}.",
        ),
        Chart(
            "kernel distance", {"kernel_distance": "kernel distance"},
            "Lower is better. It is unbiased, so it may be slightly below 0.",
        ),
        Chart(
            ", ".join(overlaps), dict(zip(overlaps, overlaps)),
            "Precision and density say how many samples look like data, recall and coverage how much of the data samples "
            "cover. Higher is better.",
        ),
        Chart(
            "bits per dimension of training images", {"bits_per_dimension": "bits"},
            "Negative log-likelihood of 8-bit images under the flow, per entry. Lower is better.",
        ),
        Chart(
            "PSNR of reconstructions", {"psnr": "dB"},
            "Of training images. A calibrated decoder gives up some of it for detail.",
        ),
        Chart(
            "bounds on the likelihood", {"importance_weighted": "importance-weighted", "elbo": "ELBO"},
            "Nats per image, of training images. The difference between the two shows how far q is from the posterior.",
        ),
        Chart(
            "amortisation gap", {"amortisation_gap": "amortisation gap"},
            "Nats per image by which the ELBO rises if q is optimised for each image. Lower is better.",
        ),
    ]  # fmt: skip


def varying(run: Run, name: str, label: str) -> dict[str, str]:
    """Return the curve of a logged quantity, or nothing if it is constant."""
    return {name: label} if len({record.get(name) for record in run.metrics}) > 1 else {}


def between(bound: float) -> tuple[float, float] | None:
    return None if math.isnan(bound) else (0, bound)


def scaled(factors: tuple[float, float], value: float) -> tuple[float, float] | None:
    return None if math.isnan(value) else (factors[0] * value, factors[1] * value)
