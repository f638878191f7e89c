# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Renders the page of a report."""

import io
import math
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image
from markupsafe import Markup, escape

from ecvae_diffusers.report.charts import calibration_charts, evaluation_charts, training_charts
from ecvae_diffusers.report.drawing import FEW_POINTS, drawn, histograms
from ecvae_diffusers.report.read import Run, data_uri, number, spread_over
from ecvae_diffusers.report.verdict import findings


CHAIN_NOTE = (
    "One row per image. From left to right: the sample, each step of the chain, and the whole move (end minus start, "
    "magnified; grey means none). In a healthy run, the changes are too small to see. The last column shows what the energy "
    "model still objects to: strokes and outlines while a run learns, little structure once it has settled."
)
# For a run with `--use_ema`.
AVERAGE_NOTE = (
    " The chain starts at samples of the network in training. The pictures under Samples come from the average of its "
    "weights, which is saved. Early in a run the two differ, also in colours."
)
ENERGIES_NOTE = (
    "Energies of data (filled), samples and calibrated samples (lines), relative to the mean of the data. In a healthy run, "
    "the three come to overlap."
)
NEIGHBOURS_NOTE = "One row per sample: the sample, then the training images nearest to it. A sample that equals one of them is memorised."
# By `Task.component` and `--calibration`.
KINDS = {
    "vae": {
        "none": "Plain VAE, no calibration", "energy": "Energy-calibrated", "posterior": "VAE with a calibrated posterior",
        "both": "Energy-calibrated, with a calibrated posterior",
    },
    "flow": {"none": "Plain flow, no calibration", "energy": "Energy-calibrated flow"},
    "decoder": {"none": "Decoder trained further, no calibration", "energy": "Energy-calibrated decoder"},
}  # fmt: skip
SAMPLES_NOTES = {
    "vae": "One pass through the decoder, from the same latents at each step.",
    "flow": "One pass through the flow's inverse, from the same latents at each step.",
    "decoder": "The same latents, decoded at each step. Calibration is applied to these images.",
}
FACTS = (
    "dataset_name", "train_data_dir", "resolution", "latent_channels", "train_batch_size", "seed", "calibration",
    "kl_weight", "langevin_steps", "langevin_drift_step", "langevin_noise", "calibration_tolerance", "drift_tolerance",
    "initial_dual", "max_dual", "dual_learning_rate", "energy_regularization", "learning_rate", "energy_learning_rate",
    "max_grad_norm", "mixed_precision",
)  # fmt: skip


def render(run: Run, marker: str) -> str:
    """Return the page. `marker` is an HTML comment near its top."""
    # Runs that did not record the component yet trained autoencoders.
    component, arguments = run.arguments.get("component", "vae"), run.arguments
    intro = KINDS.get(component, {}).get(arguments.get("calibration", ""), "Training run")
    intro += ". Green: the healthy range, if there is one"
    intro += ". Dotted vertical lines mark events of the guard." if run.events else "."
    if len(run.metrics) > FEW_POINTS:
        intro += " Linear axes leave out values that only the first tenth of the run reaches."
    judged = (
        f"Judged by steps {run.judged[0]['step']} to {run.judged[-1]['step']} ({len(run.judged)} logged), the last part of the "
        "run. A run that has just begun is not yet in its healthy range. The checks say whether training works, not how good the "
        "samples are: a healthy run of few steps still draws blurred pictures."
    )
    samples = SAMPLES_NOTES.get(component, SAMPLES_NOTES["vae"])
    if (best := best_distance(run)) is not None:
        samples += f" The best Frechet distance is {best} (lower is better)."
    chain = CHAIN_NOTE + (AVERAGE_NOTE if arguments.get("use_ema") else "")
    pairs = "Pairs of rows: images above their reconstructions."
    neighbours = course(run, "neighbours", "Samples next to their nearest training images")
    # Sections that have nothing to show are left out below.
    sections: list[dict[str, Any]] = [
        {"heading": "Verdict", "note": judged, "findings": findings(run)},
        {"heading": "Samples", "note": samples, "course": course(run, "samples", "Grid of samples")},
        {"heading": "Run", "facts": facts(run), "arguments": [(f"--{k}", v) for k, v in sorted(arguments.items())]},
        {"heading": "Calibration", "charts": drawn(calibration_charts(run), run.metrics, run.events)},
        {"heading": "Energies", "note": ENERGIES_NOTE, "histograms": histograms(run.energies)},
        {"heading": "Chain", "note": chain, "course": course(run, "chain", "Chain from prior samples", 3, 240)},
        {"heading": "Training", "charts": drawn(training_charts(run), run.metrics, run.events)},
        {"heading": "Reconstructions", "note": pairs, "course": course(run, "reconstructions", "Reconstructions")},
        {"heading": "Evaluation", "charts": drawn(evaluation_charts(run), run.evaluations, run.events)},
        {"heading": "Nearest neighbours", "note": NEIGHBOURS_NOTE, "course": neighbours[-1:]},
        {"heading": "Guard events", "events": run.events},
    ]
    sections = [one for one in sections if any(one[part] for part in one.keys() - {"heading", "note"})]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": prose, "anchor": lambda heading: heading.lower().replace(" ", "-")}
    files = resources.files("ecvae_diffusers.report")
    template, css = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.html.jinja", "page.css"))
    name = run.folder.resolve().name
    return environment.from_string(template).render(name=name, intro=intro, sections=sections, css=css, marker=marker)


def prose(text: str) -> Markup:
    """Escape text, and mark up command line flags, which must not be broken over lines."""
    return Markup(re.sub(r"--\w+", lambda match: f"<code>{match[0]}</code>", str(escape(text))))


def facts(run: Run) -> list[tuple[str, object]]:
    """Return a run's last step, its best evaluation, and its main arguments."""
    last, planned = run.metrics[-1], run.arguments.get("max_train_steps")
    found = [("steps", f"{last['step']} of {planned}" if planned is not None else last["step"])]
    if "epoch" in last:
        found.append(("epoch", last["epoch"]))
    if (best := best_distance(run)) is not None:
        found.append(("best Frechet distance", best))
    return found + [(f"--{name}", value) for name in FACTS if (value := run.arguments.get(name)) is not None]


def best_distance(run: Run) -> str | None:
    """Return the lowest Frechet distance of a run and its step, or `None` if none was logged."""
    distances = [(number(record.get("frechet_distance")), record["step"]) for record in run.evaluations]
    best, step = min([pair for pair in distances if math.isfinite(pair[0])], default=(math.nan, 0))
    return f"{best:.4g} (step {step})" if math.isfinite(best) else None


def course(run: Run, kind: str, what: str, count: int = 6, small_width: int = 150) -> list[dict]:
    """Return at most `count` pictures, evenly spread over the steps. The last one is large."""
    chosen = spread_over(run.pictures(kind), count)
    small = [picture(what, step, path, small_width, limit=800) for step, path in chosen[:-1]]
    return small + [picture(what, step, path, 640) for step, path in chosen[-1:]]


def picture(what: str, step: int, path: Path, width: int, limit: int = 1600) -> dict:
    """
    Return a picture as the page shows it, about `width` px wide. A smaller one is magnified by a whole number, so that
    its pixels stay squares of one size. One that is larger than `limit` px is scaled down.
    """
    found = {"what": what, "step": step, "name": path.name}
    try:
        content = path.read_bytes()
        with PIL.Image.open(io.BytesIO(content)) as image:
            image.load()
            if max(image.size) > limit:
                image.thumbnail((limit, limit), PIL.Image.Resampling.LANCZOS)
                buffer = io.BytesIO()
                image.save(buffer, format="PNG")
                content = buffer.getvalue()
            width = image.width * (width // image.width) or width
            return found | {
                "source": data_uri("image/png", content),
                "width": width,
                "magnified": width >= image.width,
            }
    except (OSError, SyntaxError) as error:  # SyntaxError: Pillow, of a broken PNG
        return found | {"error": str(error)}
