# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Axes of charts, and the curves of a run as one picture."""

import PIL.Image
import pytest
from matplotlib.figure import Figure

from ecvae_diffusers.report.curves import plot_curves
from ecvae_diffusers.report.drawing import FEW_POINTS, MAX_POINTS, Chart, draw


@pytest.mark.parametrize(
    "num_points, all_shown",
    [(FEW_POINTS, True), (10 * FEW_POINTS, False), (3 * MAX_POINTS, False)],
)
def test_every_point_of_a_short_run_is_on_its_axis(num_points, all_shown):
    records = [{"step": step, "kl": 1000.0 / (1 + step)} for step in range(num_points)]
    axis = Figure().subplots()
    assert draw(axis, Chart("KL", {"kl": "KL", "elbo": "ELBO"}, ""), records) == ["KL"]
    low, high = axis.get_ylim()
    assert low <= records[-1]["kl"] and (high >= 1000.0) == all_shown
    assert len(axis.lines[0].get_xdata()) <= MAX_POINTS


@pytest.mark.parametrize(
    "names, size",
    [
        (("dual", "constraint", "tolerance", "drift", "energy_real", "energy_targets", "kl"), (1000, 600)),
        (("reconstruction", "kl"), (1000, 300)),
        (("bits_per_dimension",), (500, 300)),
        (("reconstruction", "kl", "posterior_constraint", "posterior_dual"), (1000, 600)),
    ],
)
def test_curves_of_a_run(tmp_path, names, size):
    """Of calibration; of an autoencoder, a flow, a posterior calibrated alone: a panel for each loss that they log."""
    plot_curves([{"step": step, **dict.fromkeys(names, 1 / step)} for step in (1, 2, 3)], tmp_path / "curves.png")
    with PIL.Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == size
