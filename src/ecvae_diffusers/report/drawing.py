# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Draws the charts of a report as SVG images."""

import io
import warnings
from dataclasses import dataclass, field

import matplotlib
import numpy as np

from ecvae_diffusers.report.read import data_uri, series, spread_over


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402


# A chart of up to so many points marks each of them, and its axes leave nothing out.
FEW_POINTS = 40
# Points per curve: more can't be told apart at a chart's width, and a long run's file would be many megabytes.
MAX_POINTS = 500
# Beyond it matplotlib's own arithmetic overflows.
MAX_VALUE = 1e30
# Green is kept for what is healthy.
COLOURS = ("#2563b0", "#d97706", "#9333a8", "#5b6470")
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
class Curve:
    """
    Values over a chart's steps, with a band of `spread` to each side if it is given. Of curves that lie on one
    another, the first should have the greatest width.
    """

    label: str
    values: np.ndarray
    spread: np.ndarray | None = None
    style: str = "-"
    width: float = 1.4


@dataclass
class Chart:
    """
    Args:
        title: Of the figure.
        curves: Those without any finite value are left out, and so is a chart without curves.
        note: A sentence on how to read it.
        log: Whether the values' axis is logarithmic.
        healthy: Lower and upper end of the healthy range, which is shaded.
        bounds: Values to mark by a dashed line.
    """

    title: str
    curves: list[Curve]
    note: str
    log: bool = False
    healthy: tuple[float, float] | None = None
    bounds: tuple[float, ...] = ()
    source: str = ""
    labels: list[str] = field(default_factory=list)


def drawn(charts: list[Chart], records: list[dict], events: list[dict]) -> list[Chart]:
    """Draw charts over the steps of `records`, with dotted lines at events, and return those that have values."""
    steps = series(records, "step")
    marks = sorted({(event["step"], str(event.get("kind"))) for event in events})
    for chart in charts:
        draw(chart, steps, marks)
    return [chart for chart in charts if chart.source]


def draw(chart: Chart, steps: np.ndarray, marks: list[tuple[int, str]]) -> None:
    """Set a chart's `source` and `labels`."""
    for curve in chart.curves:
        curve.values = drawable(curve.values)
        curve.spread = None if curve.spread is None else drawable(curve.spread)
    curves = [curve for curve in chart.curves if np.isfinite(curve.values).any()]
    if not curves:
        return
    log = chart.log and any((curve.values > 0).any() for curve in curves)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 2.9), layout="constrained")
        if chart.healthy is not None:
            axis.axhspan(*chart.healthy, color=HEALTHY_COLOUR, alpha=0.1, linewidth=0, label="healthy range")
        for bound in chart.bounds:
            axis.axhline(bound, color="#888888", linestyle="--", linewidth=1)
        for curve, colour in zip(curves, COLOURS):
            if log:
                curve.values = np.where(curve.values > 0, curve.values, np.nan)
            draw_curve(axis, thinned(steps)[0], curve, colour)
        if log:
            use_log_scale(axis)
        elif limits := value_limits(chart, steps):
            axis.set_ylim(*limits)
        for step, kind in marks:
            axis.axvline(step, color=EVENT_COLOURS.get(kind, "#666666"), linestyle=":", linewidth=1.2)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        axis.set_xlabel("step")
        if len(curves) > 1 or chart.healthy is not None:
            axis.legend()
        chart.source, chart.labels = svg_source(figure), [curve.label for curve in curves]


def drawable(values: np.ndarray) -> np.ndarray:
    """Return `values` with NaN for what can't be drawn."""
    return np.where(np.abs(values) < MAX_VALUE, values, np.nan)


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, minimum and maximum of at most `MAX_POINTS` equal stretches of `values`."""
    stretches = np.array_split(values, min(len(values), MAX_POINTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a stretch of NaN only stays NaN
        return tuple(np.array([f(one) for one in stretches]) for f in (np.nanmean, np.nanmin, np.nanmax))


def draw_curve(axis, steps: np.ndarray, curve: Curve, colour: str) -> None:
    mean, low, high = thinned(curve.values)
    marker = "." if len(mean) <= FEW_POINTS else None
    axis.plot(steps, mean, curve.style, color=colour, label=curve.label, linewidth=curve.width, marker=marker)
    if curve.spread is not None:
        spread = thinned(curve.spread)[0]
        axis.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    elif len(curve.values) > MAX_POINTS:
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def value_limits(chart: Chart, steps: np.ndarray) -> tuple[float, float] | None:
    """
    Return what the values' axis shows: the healthy range and all values. A run of more than `FEW_POINTS` points is
    shown without its first tenth, whose values are often many times the later ones.
    """
    shown = steps >= steps[0] + (0.1 * (steps[-1] - steps[0]) if len(steps) > FEW_POINTS else 0)
    ends = [np.array([*(chart.healthy or ()), *chart.bounds])]
    for curve in chart.curves:
        spread = 0 if curve.spread is None else np.nan_to_num(curve.spread)
        ends += [(curve.values - spread)[shown], (curve.values + spread)[shown]]
    ends = np.concatenate(ends)
    ends = ends[np.isfinite(ends)]
    if len(ends) == 0 or ends.min() == ends.max():
        return None
    margin = 0.06 * (ends.max() - ends.min())
    return ends.min() - margin, ends.max() + margin


def use_log_scale(axis) -> None:
    """
    Make the values' axis logarithmic, with plain numbers at the ticks: 1, 2 and 5 of each decade if there are few
    decades, and equal distances within a decade, which may hold only one of these.
    """
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    few_decades = LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5) if high < 10 * low else few_decades)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def histograms(records: list[dict]) -> dict | None:
    """
    Draw the energies of the three kinds of images at some steps, on shared axes and relative to the data's mean.
    Return the picture's `source` and its `steps`, or `None` without energies.
    """
    panels = spread_over([panel for record in records if (panel := energy_panel(record))], 8)
    if not panels:
        return None
    # The widest panel decides, unless it is many times as wide as the others, whose shape could not be seen then.
    widths = [np.percentile(np.abs(np.concatenate(list(kinds.values()))), 99) for _, kinds in panels]
    limit = max(min(max(widths), 4 * np.median(widths)), 1e-6)
    edges = np.linspace(-limit, limit, 61)
    num_columns = min(len(panels), 4)
    num_rows = -(-len(panels) // num_columns)
    with plt.rc_context(STYLE | {"legend.fontsize": 9}):
        figure, axes = plt.subplots(
            num_rows, num_columns, figsize=(max(2.9 * num_columns, 4.5), 2.1 * num_rows + 0.5), sharex=True, sharey=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis, (step, kinds) in zip(axes.flat, panels):
            axis.set_title(f"step {step}", fontsize=9)
            for (kind, values), colour in zip(kinds.items(), COLOURS):
                # Lines over a filled shape: all three can be seen where they overlap.
                style = {"histtype": "stepfilled", "alpha": 0.35} if kind == "data" else {"histtype": "step"}
                weights = np.full(len(values), 1 / len(values))
                values = values.clip(-limit, limit)  # what lies further out is counted at the edge
                axis.hist(values, edges, weights=weights, color=colour, linewidth=1.4, **style)
            axis.set_yticks([])
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        handles = [plt.Rectangle((0, 0), 1, 1, color=c, label=n) for n, c in zip(KINDS_OF_ENERGY.values(), COLOURS)]
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


def svg_source(figure) -> str:
    """Return a figure as a `data:` URI. As an image its ids can't clash with those of another figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return data_uri("image/svg+xml", svg[svg.index("<svg") :].encode())
