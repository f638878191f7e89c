"""How `report.py` draws and lays out: charts, pictures and tables, as one HTML file that needs nothing beside itself."""

import base64
import html
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: E402


# What makes a file known as a report of ours, which may be replaced.
MARKER = "<!-- ecvae-diffusers training report -->"
# Up to so many points each is marked, and all are on the axes: of a short run nothing is left out.
FEW_POINTS = 40
# Points a curve: more can't be told apart at a chart's width, and a long run's file would be many megabytes.
MAX_POINTS = 500
MAX_PICTURE_SIZE = 1600
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
    Values over a chart's steps, with a band of `spread` to each side where it is given. Of curves that lie on one
    another, the first is to have the greatest width.
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
        steps: Where the values were logged.
        curves: Those without any finite value are left out; a chart without curves too.
        note: A sentence on how to read it.
        log: Whether the values' axis is logarithmic.
        healthy: Lower and upper end of the healthy range, which is shaded.
        bounds: Values to mark by a dashed line.
    """

    title: str
    steps: np.ndarray
    curves: list[Curve]
    note: str
    log: bool = False
    healthy: tuple[float, float] | None = None
    bounds: tuple[float, ...] = ()


def finite(values: np.ndarray) -> np.ndarray:
    """`values` with NaN for what can't be drawn."""
    return np.where(np.abs(values) < MAX_VALUE, values, np.nan)


def thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, minimum and maximum of at most `MAX_POINTS` equal stretches of `values`."""
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


def value_limits(chart: Chart) -> tuple[float, float] | None:
    """
    Return what the values' axis shows: the healthy range and all values, of a run of more than `FEW_POINTS` points without its
    first tenth, whose values are often many times the later ones.
    """
    first_shown = chart.steps[0] + 0.1 * (chart.steps[-1] - chart.steps[0])
    shown = chart.steps >= (first_shown if len(chart.steps) > FEW_POINTS else chart.steps[0])
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
    Make the values' axis logarithmic, with plain numbers at the ticks: 1, 2 and 5 of each decade where there are few decades, and
    equal distances where there is not even one, which may hold a single one of these.
    """
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    few_decades = LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,))
    axis.yaxis.set_major_locator(MaxNLocator(nbins=5) if high < 10 * low else few_decades)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def mark_events(axis, events: Iterable[dict]) -> None:
    for step, kind in sorted({(event["step"], str(event.get("kind"))) for event in events}):
        axis.axvline(step, color=EVENT_COLOURS.get(kind, "#666666"), linestyle=":", linewidth=1.2)


def chart_html(chart: Chart, events: Sequence[dict]) -> str:
    """A chart as a `<figure>`; nothing where it has no values."""
    for curve in chart.curves:
        curve.values = finite(curve.values)
        curve.spread = None if curve.spread is None else finite(curve.spread)
    chart.curves = [curve for curve in chart.curves if np.isfinite(curve.values).any()]
    if not chart.curves:
        return ""
    log = chart.log and any((curve.values > 0).any() for curve in chart.curves)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 2.9), layout="constrained")
        if chart.healthy is not None:
            axis.axhspan(*chart.healthy, color=HEALTHY_COLOUR, alpha=0.1, linewidth=0, label="healthy range")
        for bound in chart.bounds:
            axis.axhline(bound, color="#888888", linestyle="--", linewidth=1)
        steps = thinned(chart.steps)[0]
        for curve, colour in zip(chart.curves, COLOURS):
            if log:
                curve.values = np.where(curve.values > 0, curve.values, np.nan)
            draw_curve(axis, steps, curve, colour)
        if log:
            use_log_scale(axis)
        elif limits := value_limits(chart):
            axis.set_ylim(*limits)
        mark_events(axis, events)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
        axis.set_xlabel("step")
        if len(chart.curves) > 1 or chart.healthy is not None:
            axis.legend()
        source = svg_source(figure)
    names = ", ".join(curve.label for curve in chart.curves)
    image = f'<img src="{source}" alt="{html.escape(f"Chart of {chart.title} over the steps: {names}")}">'
    return (
        f'<figure class="chart"><h3>{html.escape(chart.title)}</h3><div class="card">{image}</div>'
        f"<figcaption>{prose_html(chart.note)}</figcaption></figure>"
    )


def histograms_html(records: list[dict]) -> str:
    """Energies of the three kinds of images at some steps, on shared axes and relative to the data's mean."""
    panels = [panel for record in records if (panel := energy_panel(record))]
    if not panels:
        return ""
    panels = spread_over(panels, 8)
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
        source = svg_source(figure)
    steps = ", ".join(str(step) for step, _ in panels)
    return f'<div class="card own-size"><img src="{source}" alt="Histograms of energies at steps {html.escape(steps)}"></div>'


def energy_panel(record: dict) -> tuple[int, dict[str, np.ndarray]] | None:
    kinds = {}
    for kind in KINDS_OF_ENERGY:
        values = finite(np.array(record.get(kind, []), dtype=float))
        kinds[kind] = values[np.isfinite(values)]
        if len(kinds[kind]) == 0:
            return None
    return record["step"], {kind: values - kinds["data"].mean() for kind, values in kinds.items()}


def svg_source(figure) -> str:
    """A figure as a `data:` URI. As an image of its own its ids can't clash with another figure's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    svg = buffer.getvalue()
    return data_uri("image/svg+xml", svg[svg.index("<svg") :].encode())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def spread_over(items: Sequence, count: int) -> list:
    """At most `count` of `items` at even distances, the first and the last among them."""
    places = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[place] for place in sorted({round(place) for place in places})]


def step_pictures(folder: Path) -> list[tuple[int, Path]]:
    """The pictures of a folder with their steps, in order."""
    found = [(re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in folder.glob("step-*.png")]
    return sorted((int(match[1]), path) for match, path in found if match)


def picture_html(path: Path, what: str, step: int, width: int, limit: int = MAX_PICTURE_SIZE) -> str:
    """
    A picture as a `<figure>` of about `width` px. A smaller one is magnified by a whole number, so that its pixels stay
    squares of one size; one of more than `limit` px is scaled down before it is embedded.
    """
    caption = f"step {step}"
    try:
        content = path.read_bytes()
        with PIL.Image.open(io.BytesIO(content)) as image:
            image.load()
            if max(image.size) > limit:
                image.thumbnail((limit, limit), PIL.Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, format="PNG")
                content = buffer.getvalue()
            shown = image.width * (width // image.width) or width
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow, of a broken PNG
        return f"<p>{html.escape(path.name)} can't be read: {html.escape(str(error))}</p>"
    style = ' class="pixels"' if shown >= image.width else ""
    alt = html.escape(f"{what} at {caption}")
    source = data_uri("image/png", content)
    return (
        f'<figure class="picture"><img{style} src="{source}" width="{shown}" alt="{alt}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def pictures_html(figures: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    return f'<div class="pictures">{"".join(figures)}</div>'


def prose_html(text: str) -> str:
    """Escaped text, with command line flags set apart: they shall not be broken over lines."""
    return re.sub(r"--\w+", lambda match: f"<code>{match[0]}</code>", html.escape(text))


def table_html(rows: Iterable[Sequence], header: Sequence[str] = ()) -> str:
    """A table of text, all of it escaped. Without a header the first column is one."""

    def line(cells: Sequence, tags: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for tag, cell in zip(tags, cells))}</tr>"

    head = f"<thead>{line(header, ['th'] * len(header))}</thead>" if header else ""
    first = "td" if header else "th"
    body = "".join(line(row, [first] + ["td"] * (len(row) - 1)) for row in rows)
    records = " records" if header else ""
    return f'<div class="table{records}"><table>{head}<tbody>{body}</tbody></table></div>'


def page_html(title: str, intro: str, sections: dict[str, str]) -> str:
    """The page, of sections by their headings, those without content left out."""
    sections = {heading: content for heading, content in sections.items() if content}
    anchors = {heading: re.sub(r"\W+", "-", heading.lower()).strip("-") for heading in sections}
    contents = "".join(f'<li><a href="#{anchor}">{html.escape(name)}</a></li>' for name, anchor in anchors.items())
    body = "\n".join(
        f'<section id="{anchors[heading]}"><h2>{html.escape(heading)}</h2>\n{content}</section>'
        for heading, content in sections.items()
    )
    return f"""<!DOCTYPE html>
{MARKER}
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>
<h1>{html.escape(title)}</h1>
{intro}
{body}
</main>
</body>
</html>
"""


CSS = """
:root { --ink: #1c2430; --soft: #5a6472; --back: #f5f6f8; --card: #fff; --line: #d9dee5; --link: #1d5fae;
  --good: #12693f; --good-back: #e3f4ea; --bad: #8f4700; --bad-back: #fdeeda; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adba; --back: #14181e; --card: #1d232b;
  --line: #343d49; --link: #7db4f2; --good: #86dcab; --good-back: #163524; --bad: #ffc078; --bad-back: #43290b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 24px 60px; overflow-wrap: anywhere; }
nav { padding: 16px 24px 0; }
nav ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 8px; padding-top: 8px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 0 0 6px; }
p { max-width: 78ch; margin: 6px 0 12px; }
p, figcaption { color: var(--soft); }
code { font-size: 0.92em; white-space: nowrap; }
figure { margin: 0; }
figcaption { font-size: 13px; margin-top: 4px; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 6px; }
.card img { display: block; width: 100%; height: auto; }
.own-size img { width: auto; max-width: 100%; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 24px 20px; }
.pictures { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-end; margin-bottom: 14px; }
.course { display: flex; flex-wrap: wrap; gap: 14px 20px; align-items: flex-start; }
.course > .pictures { flex: 1 1 300px; align-items: flex-start; }
.picture { max-width: 100%; }
.picture img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); }
.pixels { image-rendering: pixelated; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.records th, .records td { white-space: nowrap; }
.records td:nth-child(3) { white-space: normal; min-width: 280px; }
.facts { columns: 2 340px; column-gap: 32px; }
.facts .table { break-inside: avoid; }
.facts table { width: 100%; }
.facts th { width: 44%; font-weight: 500; color: var(--soft); }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--link); }
.findings { list-style: none; margin: 0; padding: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.findings li { display: grid; grid-template-columns: 118px minmax(0, 1fr); gap: 14px; padding: 10px 14px;
  border-bottom: 1px solid var(--line); }
.findings li:last-child { border-bottom: 0; }
.findings p { margin: 2px 0 0; max-width: 90ch; }
.badge { align-self: start; font-size: 13px; font-weight: 600; text-align: center; border-radius: 12px; padding: 2px 8px; }
.healthy { color: var(--good); background: var(--good-back); }
.look { color: var(--bad); background: var(--bad-back); }
.overall { display: inline-block; font-size: 16px; padding: 4px 14px; margin: 6px 0 10px; border-radius: 14px; }
.try { color: var(--ink) !important; }
@media (min-width: 1150px) {
  body { display: grid; grid-template-columns: 200px minmax(0, 1fr); }
  nav { padding: 26px 0 0 24px; }
  nav ul { position: sticky; top: 26px; display: block; font-size: 14px; }
  nav li { margin-bottom: 6px; }
}
@media print { nav { display: none; } }
"""
