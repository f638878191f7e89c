# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The charts of a run: which curves, their healthy range, and how to read them."""

import math

import numpy as np

from ecvae_diffusers.report.drawing import Chart, Curve
from ecvae_diffusers.report.read import Run, series
from ecvae_diffusers.report.verdict import (
    CONSTRAINT_RANGE,
    DRIFT_RANGE,
    GAP_RANGE,
    MIN_ACTIVE,
    SPREAD_RANGE,
    energy_gap,
)


def calibration_charts(run: Run) -> list[Chart]:
    records = run.metrics
    # Without calibration no samples are made, and the data's spread alone says nothing.
    spreads = {"sample_spread": "prior samples", "data_spread": "data"} if len(run.last("sample_spread")) else {}
    constraint = [
        *curves(records, constraint="constraint"),
        Curve("tolerance", series(records, "tolerance"), style="--"),
        Curve("noise floor", series(records, "noise_floor"), style=":"),
    ]
    energies = [
        Curve(label, series(records, name), series(records, f"{name}_std"), width=width)
        for name, label, width in (
            ("energy_real", "data", 3.4),
            ("energy_samples", "prior samples", 2.2),
            ("energy_targets", "calibrated samples", 1.0),
        )
    ]
    gap, gap_range = energy_gap(records), GAP_RANGE
    gap_note = (
        "In standard deviations of the energies. Healthy within one: the energy model can hardly tell them apart."
    )
    if not np.isfinite(gap).any():  # a run that did not log the spread of energies
        gap, gap_range = series(records, "energy_targets") - series(records, "energy_real"), None
        gap_note = "Healthy near 0: the energy model can hardly tell the two apart."
    bounds = between(run.argument("max_dual"))
    return [
        Chart(
            "dual variable λ", curves(records, dual="λ"), healthy=bounds or None, bounds=bounds,
            note="Healthy inside its bounds (dashed), at neither of them: there it has found the weight at which the "
            "constraint meets its tolerance. It may take a long part of the run to come down.",
        ),
        Chart(
            "constraint", constraint, log=True, healthy=scaled(CONSTRAINT_RANGE, run.median("tolerance")),
            note="Squared distance that the chain moves an image. Healthy near the tolerance; what lies below the "
            "noise floor is the chain's noise alone.",
        ),
        Chart(
            "drift per pixel", curves(records, drift="drift"), log=True,
            healthy=scaled(DRIFT_RANGE, run.drift_tolerance) if run.drift_is_judged else None,
            note="Root-mean-square move that is not noise, for images in [-1, 1]; 0.0078 is one grey level. Healthy: "
            "0.5 to 2 times --drift_tolerance.",
        ),
        Chart(
            "gradients at images", log=True,
            curves=curves(records, calibration_gradient_norm="calibration", reconstruction_gradient_norm="reconstruction"),
            note="Euclidean norm of the gradient that one sample receives from calibration, and one reconstruction "
            "from the generator's own loss. Calibration is off where the first is below a hundredth of the second.",
        ),
        Chart("energy gap", [Curve("calibrated samples minus data", gap)], gap_note, healthy=gap_range),
        Chart(
            "energies", energies,
            "Mean, and one standard deviation to each side (low = like the data). Only differences mean something: "
            "that the three wander together is healthy, that they part is not.",
        ),
        Chart(
            "spread of samples", curves(records, **spreads), healthy=scaled(SPREAD_RANGE, run.median("data_spread")),
            note="Standard deviation over a batch, averaged over pixels. Healthy: 0.5 to 1.5 times the data's; near 0 "
            "all samples are the same.",
        ),
        Chart(
            "drift step a of the chain", varying(curves(records, langevin_drift_step="a")), log=True,
            note="Adapted so that the drift stays at --drift_tolerance.",
        ),
    ]  # fmt: skip


def training_charts(run: Run) -> list[Chart]:
    records, units = run.metrics, run.argument("latent_channels")
    rates = [
        Curve("generator", series(records, "learning_rate"), width=3.4),
        Curve("energy model", series(records, "energy_learning_rate")),
    ]
    return [
        Chart(
            "bits per dimension", curves(records, bits_per_dimension="bits"),
            "What a flow's density makes an entry of an 8-bit image cost. It falls, ever more slowly; a lasting rise "
            "says that calibration weighs too much.",
        ),
        Chart(
            "reconstruction", log=True,
            curves=curves(records, reconstruction="squared error", refined_reconstruction="of the posterior's chains' ends"),
            note="Summed over an image. It falls, ever more slowly; a lasting rise says that calibration weighs too "
            "much. Ends of chains on the posterior should lie below samples of q, or near them.",
        ),
        Chart(
            "KL divergence", curves(records, kl="KL divergence"),
            "In nats per image: what the latents say about it. Near 0 they say nothing (posterior collapse).",
        ),
        Chart(
            "weight of the KL divergence", varying(curves(records, kl_weight="weight")), "It rises over --kl_warmup_steps.",
        ),
        Chart(
            "active units", curves(records, active_units="active units"),
            "Latent dimensions whose posterior mean varies over the data. Healthy: at least a tenth of them.",
            healthy=None if math.isnan(units) else (max(1.0, MIN_ACTIVE * units), units),
        ),
        Chart(
            "variance of the posterior", curves(records, posterior_variance="q's variance"), log=True,
            note="Averaged over images and latent dimensions. 1 is the prior's; a steady fall to 0 is a posterior "
            "that shrinks.",
        ),
        Chart(
            "posterior's constraint", curves(records, posterior_constraint="constraint"),
            "How far the chains on the images' posteriors lead away from q.",
        ),
        Chart(
            "posterior's dual variable", curves(records, posterior_dual="dual variable"),
            "The weight of the posterior's constraint. At its bound the constraint is not kept, whatever the encoder "
            "learns.",
            bounds=between(run.argument("max_posterior_dual")),
        ),
        Chart(
            "gradient norms", curves(records, gradient_norm="generator", energy_gradient_norm="energy model"), log=True,
            note="Healthy in a steady band. Growth over decades is divergence; an energy model whose norm vanishes is "
            "dead.",
        ),
        Chart(
            "learning rates", rates, log=True,
            note="As scheduled. A rollback of the guard halves one, the energy model's if there is one, and it is "
            "raised again while the run is healthy.",
        ),
        Chart(
            "images per second", curves(records, images_per_second="images per second"),
            "Since the start, the last resumption or the last rollback, without the time of evaluations, pictures and "
            "checkpoints.",
        ),
        Chart(
            "peak memory", curves(records, peak_memory_gib="GiB"),
            "The most that the main process has held, of the device or of a CPU's memory, in GiB.",
        ),
    ]  # fmt: skip


def evaluation_charts(run: Run) -> list[Chart]:
    records = run.evaluations
    if not records:
        return []
    last = records[-1]
    how = f"{last.get('num_generated', '?')} samples against {last.get('num_real', '?')} training images"
    how = f"{how}, features: {last.get('features', 'not known')}."
    kernel = Curve("kernel distance", series(records, "kernel_distance"), series(records, "kernel_distance_std"))
    return [
        Chart(
            "Frechet distance", curves(records, frechet_distance="Frechet distance"),
            f"Falls as samples become like the data. {how} To be compared within one set-up only.",
        ),
        Chart("kernel distance", [kernel], "Falls too, and is unbiased: it may be a little below 0."),
        Chart(
            "precision, recall, density, coverage",
            curves(records, precision="precision", recall="recall", density="density", coverage="coverage"),
            "Precision and density: how many samples look like data; recall and coverage: how much of the data is "
            "met.",
        ),
        Chart(
            "bits per dimension of training images", curves(records, bits_per_dimension="bits"),
            "A flow's cost of an 8-bit image, in bits per entry.",
        ),
        Chart(
            "PSNR of reconstructions", curves(records, psnr="dB"),
            "dB, of training images. What a calibrated decoder gives up for detail.",
        ),
        Chart(
            "bounds on the likelihood", curves(records, importance_weighted="importance-weighted", elbo="ELBO"),
            "Nats per image, of training images. Between the two lies what q leaves of the posterior.",
        ),
        Chart(
            "amortisation gap", curves(records, amortisation_gap="amortisation gap"),
            "Nats per image: by how much the bound rises where q is optimised for each image. 0 is an encoder that "
            "leaves nothing.",
        ),
    ]  # fmt: skip


def curves(records: list[dict], **labels: str) -> list[Curve]:
    """Return the courses of logged values, each with its label."""
    return [Curve(label, series(records, name)) for name, label in labels.items()]


def varying(curves: list[Curve]) -> list[Curve]:
    """Return the curves that are not flat lines."""
    return [curve for curve in curves if len(set(curve.values[np.isfinite(curve.values)])) > 1]


def between(bound: float) -> tuple[float, ...]:
    return () if math.isnan(bound) else (0, bound)


def scaled(factors: tuple[float, float], value: float) -> tuple[float, float] | None:
    return None if math.isnan(value) else (factors[0] * value, factors[1] * value)
