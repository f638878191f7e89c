# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lay a training run out as one HTML file, to see whether its calibration is healthy: `training/report.py my_model`.

The file needs nothing besides itself, neither the network nor a script. What a run lacks (calibration, evaluations,
pictures) is left out.
"""

import argparse
import math
import re
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from ecvae_diffusers.atomic import write_text
from ecvae_diffusers.report.charts import calibration_charts, evaluation_charts, training_charts
from ecvae_diffusers.report.drawing import FEW_POINTS, drawn, histograms
from ecvae_diffusers.report.read import Picture, Run, number, spread_over
from ecvae_diffusers.report.verdict import findings
from ecvae_diffusers.training.run.command import ArgumentParser, fail, local_path, printable


# Tells a report of ours, which may be replaced, from other files.
MARKER = "<!-- ecvae-diffusers training report -->"
CHAIN_NOTE = (
    "One row per image. From left to right: the sample, each step of the chain, and where it moved (end minus "
    "start, magnified, grey = nowhere). Healthy: changes too small to see. The last column is what the energy model "
    "still objects to: once a run has settled it has little form, and while it learns that of strokes and outlines."
)
# Of a run with `--use_ema`.
AVERAGE_NOTE = (
    " The chain starts at samples of the network as it is trained; the pictures under Samples are of the average of "
    "its weights, which is what is saved. Early in a run the two differ, in colours too."
)
ENERGIES_NOTE = (
    "Data (filled), samples and calibrated samples (lines), relative to the data's mean. Healthy: the three come to "
    "lie on one another."
)
# By `Task.component` and `--calibration`.
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


def render(run: Run) -> str:
    """Return the page."""
    # Folders of before the component was written down are of autoencoders.
    component, arguments = run.arguments.get("component", "vae"), run.arguments
    intro = KINDS.get(component, {}).get(arguments.get("calibration"), "Training run")
    intro += ". Green: the healthy range, where there is one"
    intro += ". Dotted vertical lines are events of the guard." if run.events else "."
    if len(run.metrics) > FEW_POINTS:
        intro += " Axes that are not logarithmic leave out what the first tenth of the run alone would need."
    judged = (
        f"On the last part of the run, steps {run.judged[0]['step']} to {run.judged[-1]['step']} ({len(run.judged)} "
        "logged). A run that has only just begun is not yet in its healthy range."
    )
    samples, chain = SAMPLES_NOTES.get(component, SAMPLES_NOTES["vae"]), CHAIN_NOTE
    if arguments.get("use_ema"):
        chain += AVERAGE_NOTE
    pairs = "Rows in pairs: data above its reconstruction."
    neighbours = (
        "One row per sample: itself, then the training images nearest to it. A copy of one would be memorised."
    )
    # Each with what it shows; one that has nothing to show is left out.
    sections = [
        {"heading": "Verdict", "note": judged, "findings": findings(run)},
        {"heading": "Run", "facts": facts(run), "arguments": [(f"--{k}", v) for k, v in sorted(arguments.items())]},
        {"heading": "Samples", "note": samples, "course": course(run, "samples", "Grid of samples")},
        {"heading": "Calibration", "charts": drawn(calibration_charts(run), run.metrics, run.events)},
        {"heading": "Energies", "note": ENERGIES_NOTE, "histograms": histograms(run.energies)},
        {"heading": "Chain", "note": chain, "course": course(run, "chain", "Chain from prior samples", 3, 240)},
        {"heading": "Training", "charts": drawn(training_charts(run), run.metrics, run.events)},
        {"heading": "Reconstructions", "note": pairs, "course": course(run, "reconstructions", "Reconstructions")},
        {"heading": "Evaluation", "charts": drawn(evaluation_charts(run), run.evaluations, run.events)},
        {"heading": "Nearest neighbours", "note": neighbours, "picture": nearest_neighbours(run)},
        {"heading": "Guard events", "events": run.events},
    ]
    sections = [one for one in sections if any(one[part] for part in one.keys() - {"heading", "note"})]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": prose, "anchor": lambda heading: heading.lower().replace(" ", "-")}
    files = resources.files("ecvae_diffusers.report")
    template, css = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.html.jinja", "page.css"))
    name = run.folder.resolve().name
    return environment.from_string(template).render(name=name, intro=intro, sections=sections, css=css, marker=MARKER)


def prose(text: str) -> Markup:
    """Escape text, and set command line flags apart: they must not be broken over lines."""
    return Markup(re.sub(r"--\w+", lambda match: f"<code>{match[0]}</code>", str(escape(text))))


def facts(run: Run) -> list[tuple[str, object]]:
    """
    Return what there is to know about a run at once: its last step, its best evaluation, and the arguments that
    matter.
    """
    last, planned = run.metrics[-1], run.arguments.get("max_train_steps")
    found = [("steps", f"{last['step']} of {planned}" if planned is not None else last["step"])]
    if "epoch" in last:
        found.append(("epoch", last["epoch"]))
    distances = [(number(record.get("frechet_distance")), record["step"]) for record in run.evaluations]
    if distances := [pair for pair in distances if math.isfinite(pair[0])]:
        best, step = min(distances)
        found.append(("best Frechet distance", f"{best:.4g} (step {step})"))
    return found + [(f"--{name}", value) for name in FACTS if (value := run.arguments.get(name)) is not None]


def course(run: Run, kind: str, what: str, count: int = 6, small_width: int = 150) -> list[Picture]:
    """Return pictures of at most `count` steps, the last one large."""
    *earlier, last = spread_over(run.pictures(kind), count) or [None]
    if last is None:
        return []
    small = [Picture(what, step, path, small_width, limit=800) for step, path in earlier]
    return [*small, Picture(what, *last, 640)]


def nearest_neighbours(run: Run) -> Picture | None:
    pictures = run.pictures("neighbours")
    return Picture("Samples next to their nearest training images", *pictures[-1], 480) if pictures else None


def check_output(path: Path, is_default: bool) -> None:
    """Raise `ValueError` if the report can't be written there without losing something."""
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
    printable()
    parser = ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN", help="The training script's --output_dir.")
    parser.add_argument("--output", type=local_path, help="The HTML file to write. RUN/report.html if not given.")
    args = parser.parse_args(argv)
    default = args.run / "report.html"
    output = args.output or default
    try:
        run = Run.read(args.run)
        check_output(output, is_default=output.resolve() == default.resolve())
        # An argument may hold a file name that is no text.
        write_text(output, render(run), errors="xmlcharrefreplace")
    except (ValueError, OSError) as error:
        fail(f"{prog}: error: {error}")
    print(f"Wrote {output}.")


if __name__ == "__main__":
    main()
