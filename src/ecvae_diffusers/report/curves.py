# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Plots the curves of a run in one picture, for the demo and for model cards."""

from pathlib import Path


CALIBRATION = ("dual variable lambda", "constraint", "drift per pixel", "energy gap")
# Charts of a run without an energy model.
LOSSES = (
    "reconstruction",
    "KL divergence",
    "bits per dimension",
    "posterior's constraint",
    "posterior's dual variable",
)


def plot_curves(records: list[dict], path: Path) -> None:
    """
    Plot the dual variable, the constraint, the drift and the energy gap over the steps of a run. For a run without an energy
    model, plot its losses, and the posterior's constraint and dual variable if they were logged.

    Args:
        records (`list[dict]`): Records of `metrics.jsonl`.
        path (`Path`): PNG file to write.
    """
    from ecvae_diffusers.report.charts import calibration_charts, training_charts
    from ecvae_diffusers.report.drawing import save_drawn
    from ecvae_diffusers.report.read import Run

    run = Run(path.parent, {}, records, [], [], [])
    titles = CALIBRATION if "dual" in records[-1] else LOSSES
    charts = [*calibration_charts(run), *training_charts(run)]
    save_drawn([chart for chart in charts if chart.title in titles], run.metrics, path)
