# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lay a training run out as one HTML file, to see whether its calibration is healthy: `training/report.py my_model`.

The file needs nothing beside itself, neither the network nor a script. What a run lacks (calibration, evaluations,
pictures) is left out.
"""

import argparse
import math
import sys
from pathlib import Path

from ecvae_diffusers.atomic import write_text
from ecvae_diffusers.report.charts import calibration_charts, evaluation_charts, training_charts
from ecvae_diffusers.report.page import (
    FEW_POINTS,
    MARKER,
    Chart,
    chart_html,
    histograms_html,
    page_html,
    picture_html,
    pictures_html,
    spread_over,
    step_pictures,
    table_html,
)
from ecvae_diffusers.report.verdict import Run, number, verdict_html
from ecvae_diffusers.training.run.last_line import ArgumentParser, fail
from ecvae_diffusers.training.run.places import local_path


CHAIN_NOTE = (
    "One row an image. From left to right: the sample, each step of the chain, and where it moved (end minus "
    "start, magnified, grey = nowhere). Healthy: changes too small to see. The last column is what the energy model still "
    "objects to: once a run has settled it has little form, and while it learns that of strokes and outlines."
)
# Of a run with `--use_ema`.
AVERAGE_NOTE = (
    ". The chain starts at samples of the network as it is trained; the pictures under Samples are of the average of its weights, which is "
    "what is saved. Early in a run the two differ, in colours too."
)
AXES_NOTE = " Axes that are not logarithmic leave out what the first tenth of the run alone would need."
# Of each `Task.component` and `--calibration`.
KINDS = {
    "vae": {
        "none": "Plain VAE, no calibration", "energy": "Energy-calibrated", "posterior": "VAE with a calibrated posterior",
        "both": "Energy-calibrated, with a calibrated posterior",
    },
    "flow": {"none": "Plain flow, no calibration", "energy": "Energy-calibrated flow"},
    "decoder": {"none": "Decoder trained on, no calibration", "energy": "Energy-calibrated decoder"},
}  # fmt: skip
SAMPLES_NOTES = {
    "vae": "One pass through the decoder, from the same latents at each step.",
    "flow": "One pass through the flow's inverse, from the same latents at each step.",
    "decoder": "Decodings of the same latents at each step: what is calibrated.",
}
FACTS = (
    "dataset_name", "train_data_dir", "resolution", "latent_channels", "train_batch_size", "seed", "calibration",
    "kl_weight", "langevin_steps", "langevin_drift_step", "langevin_noise", "calibration_tolerance", "drift_tolerance",
    "initial_dual", "max_dual", "dual_learning_rate", "energy_regularization", "learning_rate", "energy_learning_rate",
    "max_grad_norm", "mixed_precision",
)  # fmt: skip


def charts_html(charts: list[Chart], events: list[dict]) -> str:
    figures = "".join(chart_html(chart, events) for chart in charts)
    return f'<div class="charts">{figures}</div>' if figures else ""


def facts_html(run: Run) -> str:
    last, arguments = run.metrics[-1], run.arguments
    planned = arguments.get("max_train_steps")
    steps = f"{last['step']} of {planned}" if planned is not None else str(last["step"])
    facts = [("steps", steps)]
    if "epoch" in last:
        facts.append(("epoch", last["epoch"]))
    if run.evaluations and len(values := finite_evaluations(run, "frechet_distance")):
        best_step, best = min(values, key=lambda pair: pair[1])
        facts.append(("best Frechet distance", f"{best:.4g} (step {best_step})"))
    shown = [name for name in FACTS if arguments.get(name) is not None]
    facts += [(f"--{name}", arguments[name]) for name in shown]
    # One table a fact, so that the columns of the page may break between them.
    tables = "".join(table_html([fact]) for fact in facts)
    everything = table_html([(f"--{name}", value) for name, value in sorted(arguments.items())])
    folded = f"<details><summary>All {len(arguments)} arguments</summary>{everything}</details>" if arguments else ""
    return f'<div class="facts">{tables}</div>{folded}'


def finite_evaluations(run: Run, name: str) -> list[tuple[int, float]]:
    pairs = [(record["step"], number(record.get(name))) for record in run.evaluations]
    return [pair for pair in pairs if math.isfinite(pair[1])]


def over_time_html(run: Run, kind: str, what: str, note: str, count: int = 6, small_width: int = 150) -> str:
    """Pictures of at most `count` steps, the last one large."""
    pictures = spread_over(step_pictures(run.folder / kind), count)
    if not pictures:
        return ""
    *earlier, (last_step, last) = pictures
    small = [picture_html(path, what, step, width=small_width, limit=800) for step, path in earlier]
    large = picture_html(last, what, last_step, width=640)
    return f'<p>{note}</p><div class="course">{large}{pictures_html(small)}</div>'


def neighbours_html(run: Run) -> str:
    pictures = step_pictures(run.folder / "neighbours")
    if not pictures:
        return ""
    step, path = pictures[-1]
    note = "One row a sample: itself, then the training images nearest to it. A copy of one would be memorised."
    figure = picture_html(path, "Samples beside their nearest training images", step, width=480)
    return f"<p>{note}</p>{pictures_html([figure])}"


def events_html(run: Run) -> str:
    if not run.events:
        return ""
    rows = [
        (event["step"], event.get("kind", ""), event.get("message", ""), event.get("to_step", ""))
        for event in run.events
    ]
    return table_html(rows, header=("step", "kind", "what happened", "back to step"))


def report_html(run: Run) -> str:
    energies = histograms_html(run.energies)
    if energies:
        energies = (
            "<p>Data (filled), samples and calibrated samples (lines), relative to the data's mean. Healthy: the "
            "three come to lie on one another.</p>" + energies
        )
    name = run.folder.resolve().name
    calibration = run.arguments.get("calibration")
    # Folders of before it was written down are of autoencoders.
    component = run.arguments.get("component", "vae")
    kind = KINDS.get(component, {}).get(calibration, "Training run")
    lines = ". Dotted vertical lines are events of the guard" if run.events else ""
    intro = (
        f"<p>{kind}. Green: the healthy range, where there is one{lines}."
        + (AXES_NOTE if len(run.metrics) > FEW_POINTS else "")
        + "</p>"
    )
    chain_note = CHAIN_NOTE + (AVERAGE_NOTE if run.arguments.get("use_ema") else "")
    sections = {
        "Verdict": verdict_html(run),
        "Run": facts_html(run),
        "Samples": over_time_html(
            run, "samples", "Grid of samples", SAMPLES_NOTES.get(component, SAMPLES_NOTES["vae"])
        ),
        "Calibration": charts_html(calibration_charts(run), run.events),
        "Energies": energies,
        "Chain": over_time_html(run, "chain", "Chain from prior samples", chain_note, count=3, small_width=240),
        "Training": charts_html(training_charts(run), run.events),
        "Reconstructions": over_time_html(
            run, "reconstructions", "Reconstructions", "Rows in pairs: data above its reconstruction."
        ),
        "Evaluation": charts_html(evaluation_charts(run), run.events),
        "Nearest neighbours": neighbours_html(run),
        "Guard events": events_html(run),
    }
    return page_html(f"Training report: {name}", intro, sections)


def check_output(path: Path, is_default: bool) -> None:
    """
    Raises:
        ValueError: if the report can't be written there without losing something.
    """
    if path.is_dir():
        raise ValueError(f"--output must be a file, but {str(path)!r} is a folder.")
    if not path.parent.is_dir():
        raise ValueError(f"--output {str(path)!r} can't be written: there is no folder {str(path.parent)!r}.")
    if path.exists() and not is_default:
        with open(path, "rb") as file:
            if MARKER.encode() not in file.read(1000):
                raise ValueError(f"--output {str(path)!r} exists and is not a report: choose another name.")


def main(argv: list[str] | None = None, prog: str = "report.py") -> None:
    """Write a report as a command line says: that of this process, or `argv`."""
    sys.stdout.reconfigure(errors="backslashreplace")  # The locale may have no letters for a name.
    parser = ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN", help="The training script's --output_dir.")
    parser.add_argument("--output", type=local_path, help="The HTML file to write. RUN/report.html if not given.")
    args = parser.parse_args(argv)
    default = args.run / "report.html"
    output = args.output or default
    try:
        run = Run.read(args.run)
        check_output(output, is_default=output.resolve() == default.resolve())
    except (ValueError, OSError) as error:
        fail(f"{prog}: error: {error}")
    text = report_html(run)
    try:
        # An argument may hold a file name that is no text.
        write_text(output, text, errors="xmlcharrefreplace")
    except OSError as error:
        fail(f"{prog}: error: {error}")
    print(f"Wrote {output}.")


if __name__ == "__main__":
    main()
