# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Draws charts of the quantities that a run logged, and histograms of its energies."""

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ecvae_diffusers.atomic import replacing
from ecvae_diffusers.report.read import data_uri, series, spread_over


# A chart of up to this many points marks each of them, and its axes show all values.
FEW_POINTS = 40
# Points per curve. More can't be told apart at a chart's width, and would make the file of a long run many megabytes.
MAX_POINTS = 500
# Larger values overflow in matplotlib.
MAX_VALUE = 1e30
# Green is reserved for healthy ranges. Line styles tell overlapping curves apart.
COLOURS = ("#2563b0", "#d97706", "#9333a8", "#5b6470")
LINES = ("-", "--", ":", "-.")
HEALTHY_COLOUR = "#178a5b"
EVENT_COLOURS = {"warning": "#d97706", "rollback": "#c62828", "stopped": "#c62828"}
KINDS_OF_ENERGY = {"data": "data", "samples": "prior samples", "targets": "calibrated samples"}
STYLE = {
    "svg.hashsalt": "ecvae",  # the same file for the same run
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.framealpha": 0.8,
    "legend.edgecolor": "#dddddd",
    "legend.fontsize": 8,
}


@dataclass
class Chart:
    """
    A chart of logged quantities.

    Args:
        title (`str`): What the chart shows.
        curves (`dict`): The labels of logged quantities, by name. If `<name>_std` is logged too, it is drawn as a band.
        note (`str`): How to read the chart.
        log (`bool`, *optional*, defaults to `False`): Whether the axis of values is logarithmic.
        healthy (`tuple[float, float]`, *optional*): The healthy range, which is shaded.
        bounds (`tuple[float]`, *optional*): Values to mark by dashed lines.

    Attributes:
        source, labels: The picture as a `data:` URI and the labels of its curves. `drawn` sets both.
    """

    title: str
    curves: dict[str, str]
    note: str
    log: bool = False
    healthy: tuple[float, float] | None = None
    bounds: tuple[float, ...] = ()
    source: str = ""
    labels: list[str] = field(default_factory=list)


def drawn(charts: list[Chart], records: list[dict], events: list[dict]) -> list[Chart]:
    """Draw charts over the steps of `records`, with dotted lines at events. Return the charts that have values."""
    marks = sorted({(event["step"], str(event.get("kind"))) for event in events})
    for chart in charts:
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(5.6, 2.9), layout="constrained")
            chart.labels = draw(figure.subplots(), chart, records)
            for step, kind in marks:
                figure.axes[0].axvline(step, color=EVENT_COLOURS.get(kind, "#666666"), linestyle=":", linewidth=1.2)
            if chart.labels:
                chart.source = svg_source(figure)
    return [chart for chart in charts if chart.labels]


def save_drawn(charts: list[Chart], records: list[dict], path: Path) -> None:
    """Write all charts that have values into one PNG, two side by side."""
    charts = [chart for chart in charts if any(np.isfinite(series(records, name)).any() for name in chart.curves)]
    num_columns, num_rows = min(2, len(charts)), -(-len(charts) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5 * num_columns, 3 * num_rows), layout="constrained")
        for place, chart in enumerate(charts, start=1):
            axis = figure.add_subplot(num_rows, num_columns, place)
            axis.set_title(chart.title)
            draw(axis, chart, records, whole=True)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=100, format="png")


def draw(axis: Axes, chart: Chart, records: list[dict], whole: bool = False) -> list[str]:
    """
    Draw a chart's curves, and return the labels of those that have finite values. For a run of more than `FEW_POINTS`
    records, a linear axis leaves out values that only the first tenth reaches, unless `whole`.
    """
    steps = series(records, "step")
    curves = {name: drawable(series(records, name)) for name in chart.curves}
    curves = {name: values for name, values in curves.items() if np.isfinite(values).any()}
    if not curves:
        return []
    log = chart.log and any((values > 0).any() for values in curves.values())
    if chart.healthy is not None:
        axis.axhspan(*chart.healthy, color=HEALTHY_COLOUR, alpha=0.1, linewidth=0, label="healthy range")
    for bound in chart.bounds:
        axis.axhline(bound, color="#888888", linestyle="--", linewidth=1)
    x = thinned(steps)[0]
    is_shown = x >= x[0] + 0.1 * (x[-1] - x[0])
    ends = [np.array([*(chart.healthy or ()), *chart.bounds])]
    for (name, values), colour, line in zip(curves.items(), COLOURS, LINES):
        mean, low, high = thinned(np.where(values > 0, values, np.nan) if log else values)
        spread = drawable(series(records, f"{name}_std"))
        if np.isfinite(spread).any():
            low, high = mean - thinned(spread)[0], mean + thinned(spread)[0]
        marker = "." if len(x) <= FEW_POINTS else None
        axis.plot(x, mean, line, color=colour, label=chart.curves[name], linewidth=1.4, marker=marker)
        if (high > low).any():
            axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ends += [low[is_shown], high[is_shown]]
    if log:
        axis.set_yscale("log")
    elif len(steps) > FEW_POINTS and not whole:
        limits = np.concatenate(ends)
        limits = limits[np.isfinite(limits)]
        margin = 0.06 * np.ptp(limits) if len(limits) else 0
        if margin > 0:
            axis.set_ylim(limits.min() - margin, limits.max() + margin)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    axis.set_xlabel("step")
    if len(curves) > 1 or chart.healthy is not None:
        axis.legend()
    return [chart.curves[name] for name in curves]


def drawable(values: np.ndarray) -> np.ndarray:
    """Replace values that can't be drawn by NaN."""
    return np.where(np.abs(values) < MAX_VALUE, values, np.nan)


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, minimum and maximum of at most `MAX_POINTS` equal stretches of `values`."""
    stretches = np.array_split(values, min(len(values), MAX_POINTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stretch with nothing but NaN stays NaN
        mean, low, high = (np.array([f(one) for one in stretches]) for f in (np.nanmean, np.nanmin, np.nanmax))
    return mean, low, high


def histograms(records: list[dict]) -> dict | None:
    """
    Draw the energies of data, samples and calibrated samples at some steps, on shared axes and relative to the mean of the
    data. Return the picture's `source` and its `steps`, or `None` if there are no energies.
    """
    panels = spread_over([panel for record in records if (panel := energy_panel(record))], 8)
    if not panels:
        return None
    # The widest panel sets the limits, unless it is so wide that the shape of the others could not be seen.
    widths = [np.percentile(np.abs(np.concatenate(list(kinds.values()))), 99) for _, kinds in panels]
    limit = max(min(max(widths), 4 * np.median(widths)), 1e-6)
    num_columns, num_rows = min(len(panels), 4), -(-len(panels) // 4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(2.9 * num_columns, 4.5), 2.1 * num_rows + 0.5), layout="constrained")
        axes = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (step, kinds) in zip(axes.flat, panels):
            axis.set_title(f"step {step}", fontsize=9)
            axis.set_yticks([])
            for (kind, values), colour in zip(kinds.items(), COLOURS):
                # Lines over a filled shape keep all three visible where they overlap.
                style = {"histtype": "stepfilled", "alpha": 0.35} if kind == "data" else {"histtype": "step"}
                weights = np.full(len(values), 1 / len(values))
                # Values beyond the limits are counted at the edges.
                bins = np.linspace(-limit, limit, 61)
                axis.hist(values.clip(-limit, limit), bins, weights=weights, color=colour, linewidth=1.4, **style)
        handles = [Rectangle((0, 0), 1, 1, color=c, label=n) for n, c in zip(KINDS_OF_ENERGY.values(), COLOURS)]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
        figure.supxlabel("energy, minus the mean energy of the data at that step", fontsize=9)
        return {"source": svg_source(figure), "steps": [step for step, _ in panels]}


def energy_panel(record: dict) -> tuple[int, dict[str, np.ndarray]] | None:
    kinds = {}
    for kind in KINDS_OF_ENERGY:
        values = drawable(np.array(record.get(kind, []), dtype=float))
        kinds[kind] = values[np.isfinite(values)]
        if len(kinds[kind]) == 0:
            return None
    return record["step"], {kind: values - kinds["data"].mean() for kind, values in kinds.items()}


def svg_source(figure: Figure) -> str:
    """Return a figure as a `data:` URI. In separate images, the ids of two figures can't clash."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return data_uri("image/svg+xml", svg[svg.index("<svg") :].encode())
