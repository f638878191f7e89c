# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a checkpoint is, the snippet that loads it, and the figures of its `evaluation.json`, which `evaluate.py` writes."""

import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..atomic import write_text
from ..figures import NOISE, is_above_noise


# Stands in every card that `write_card` wrote; a card without it is somebody's work.
CARD_MARKER = (
    "<!-- Written by ecvae_diffusers on saving, and again at each saving: take this line out to keep your changes. -->"
)
# What the snippets load until it is known where the model will lie.
LOCATION = "path/or/hub-id"
# Details that a card with an evaluation requires in addition to its figures, and optional ones.
REQUIRED_DETAILS = {
    "title": "what the model makes, in a few words",
    "license": "of the weights, as the Hub spells it",
    "data": "`name` and `license`, and `id` if it is on the Hub",
    "known_failures": "what was looked at and found wanting",
}
OPTIONAL_DETAILS = {"description", "intended_use", "training", "tags"}
REQUIRED_DATA, OPTIONAL_DATA = {"name", "license"}, {"id", "description"}
# All others are text.
KINDS = {
    "data": (dict, REQUIRED_DETAILS["data"]),
    "training": (dict, "names with what they were"),
    "tags": (list, "a list of texts"),
}
RESULTS = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage")
# By which other images are told from the model's own.
SCORES = {
    "energy": "energy",
    "error": "reconstruction error",
    "bits_per_dimension": "number of bits",
}
TITLES = {
    "elbo": "ELBO",
    "importance_weighted": "importance-weighted bound",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "mean_squared_error": "mean squared error",
}


def check_details(details: dict[str, Any]) -> None:
    """
    What `publish.py --details` gives: title, license, data and known failures, and more if wanted.

    Raises:
        ValueError: naming a field that is missing, empty, unknown or of another kind than it must be.
    """
    if not isinstance(details, dict):
        raise ValueError(f"the details of a card must be fields with values, but are {details!r}.")
    for name, meaning in REQUIRED_DETAILS.items():
        if not details.get(name):
            raise ValueError(f"the card's field `{name}` is missing: {meaning}.")
    unknown = details.keys() - REQUIRED_DETAILS - OPTIONAL_DETAILS
    if unknown:
        allowed = ", ".join([*REQUIRED_DETAILS, *sorted(OPTIONAL_DETAILS)])
        raise ValueError(f"the card's field `{sorted(unknown)[0]}` is unknown: it may have {allowed}.")
    for name, value in details.items():
        kind, meaning = KINDS.get(name, (str, "text"))
        if not isinstance(value, kind) or kind is list and not all(isinstance(one, str) for one in value):
            raise ValueError(f"the card's field `{name}` must be {meaning}, but is {value!r}.")
    data = details["data"]
    if data.keys() - REQUIRED_DATA - OPTIONAL_DATA:
        raise ValueError(f"the card's field `data` must be {REQUIRED_DETAILS['data']}, but is {data!r}.")
    for name in sorted(REQUIRED_DATA):
        if not data.get(name):
            raise ValueError(f"the card's field `data.{name}` is missing.")
    for name, value in data.items():
        if not isinstance(value, str):
            raise ValueError(f"the card's field `data.{name}` must be text, but is {value!r}.")


def with_location(card: str, location: str) -> str:
    """A card of ours whose snippets load from `location`, where they named no place; any other, as it is."""
    return card.replace(f'"{LOCATION}"', f'"{location}"') if CARD_MARKER in card else card


def figure(value: float | None) -> str:
    return "not given" if value is None else f"{value:.4g}"


def kernel_figure(value: float | None, std: float | None) -> str:
    """A kernel distance as a card states it."""
    return figure(value) if is_above_noise(value, std) else NOISE


def stated_mean(measures: dict, name: str) -> float | None:
    """The mean over seeds of a measure of generation; `None` where it may not be stated."""
    mean = measures[name]["mean"]
    is_noise = name == "kernel_distance" and not is_above_noise(mean, measures["kernel_distance_std"]["mean"])
    return None if is_noise else mean


def title_of(measure: str) -> str:
    name = TITLES.get(measure, measure.replace("_", " "))
    return name.replace("frechet", "Frechet")


def evaluation_table(evaluation: dict) -> str:
    """The figures of an `evaluation.json` as a table in Markdown, each with its spread and of what it is."""
    rows = [*generation_rows(evaluation), *floor_rows(evaluation), *held_out_rows(evaluation)]
    for section in ("reconstruction", "likelihood"):
        if section in evaluation:
            protocol = evaluation[section]["protocol"]
            of = f"{protocol['num_images']:,} of {protocol['data']} ({protocol['split']})"
            if section == "likelihood":
                of += f", {protocol['unit']}"
                if "variance" in protocol:  # of a VAE, whose likelihood has bounds only
                    of += f", variance {protocol['variance']}, {protocol['importance_samples']} latents"
            prefix = "reconstruction, " if section == "reconstruction" else ""
            measures = evaluation[section]["measures"]
            for name, value in measures.items():
                if name == "kernel_distance":
                    std = measures["kernel_distance_std"]
                    in_pairs = of + first_ones(protocol, protocol["num_images"])
                    rows.append(
                        (prefix + title_of(name), kernel_figure(value, std), f"{std:.2g} over subsets", in_pairs)
                    )
                elif name != "kernel_distance_std":
                    rows.append((prefix + title_of(name), figure(value), "", of))
    if "out_of_distribution" in evaluation:
        protocol = evaluation["out_of_distribution"]["protocol"]
        for name, scores in evaluation["out_of_distribution"]["measures"].items():
            of = f"{protocol['outside'][name]:,} others against {protocol['inside']['num_images']:,}"
            for score, value in scores.items():
                rows.append((f"AUROC by which the {SCORES[score]} tells {name} apart", figure(value), "", of))
    lines = [f"| {title} | {value} | {spread} | {of} |" for title, value, spread, of in rows]
    return "\n".join(["| measure | value | spread | of |", "|---|---|---|---|", *lines])


def first_ones(protocol: dict, *counts: int) -> str:
    """Of which images all measures but the Frechet distance are, where there are more than can be compared in pairs."""
    most = protocol.get("most_images_in_pairs")
    return f", the first {most:,} of each" if most is not None and max(counts) > most else ""


def generation_rows(evaluation: dict) -> list[tuple]:
    generation = evaluation["generation"]
    protocol, measures = generation["protocol"], generation["measures"]
    reference = protocol["reference"]
    of = (
        f"{protocol['num_samples']:,} samples against {reference['num_images']:,} of {reference['data']} "
        f"({reference['split']}), {evaluation['protocol']['features']}"
    )
    in_pairs = first_ones(protocol, protocol["num_samples"], reference["num_images"])
    rows = []
    for name in RESULTS:
        measure = measures[name]
        spread = [] if measure["std"] is None else [f"{measure['std']:.2g} over {len(measure['values'])} seeds"]
        value = figure(measure["mean"])
        if name == "kernel_distance":
            std = measures["kernel_distance_std"]["mean"]
            value = kernel_figure(measure["mean"], std)
            spread.append(f"{std:.2g} over subsets")
        in_full = of if name == "frechet_distance" else of + in_pairs
        rows.append((title_of(name), value, ", ".join(spread), in_full))
    if "why_no_frechet_distance" in generation:
        rows.append(("no Frechet distance", figure(None), "", generation["why_no_frechet_distance"]))
    return rows


def floor_rows(evaluation: dict) -> list[tuple]:
    """Return the row of held-out images, measured instead of samples."""
    if "floor" not in evaluation:
        return []
    protocol, measures = evaluation["floor"]["protocol"], evaluation["floor"]["measures"]
    compared = protocol["compared"]
    of = f"{compared['num_images']:,} of {compared['data']} ({compared['split']}) instead of samples"
    return [
        ("Frechet distance, floor", figure(measures["frechet_distance"]), "", of),
        (
            "kernel distance, floor",
            kernel_figure(measures["kernel_distance"], measures["kernel_distance_std"]),
            f"{measures['kernel_distance_std']:.2g} over subsets",
            of + first_ones(protocol, compared["num_images"], protocol["reference"]["num_images"]),
        ),
    ]


def held_out_rows(evaluation: dict) -> list[tuple]:
    """How many of the images that count as held out were trained on. Evaluations of before do not say."""
    if "held_out" not in evaluation:
        return []
    protocol, count = evaluation["held_out"]["protocol"], evaluation["held_out"]["measures"]["num_trained_on"]
    of = f"{protocol['num_images']:,} of {protocol['data']} ({protocol['split']}), against {protocol['compared_with']}"
    return [("held-out images that were trained on", count, "", of)]


def baseline_rows(evaluation: dict) -> list[dict]:
    """
    Distances of another model, and how many times ours they are; `publish.py --baseline` adds it to the evaluation. Next to the
    AUROC of our energy stands that of the other's own score, which a model without an energy has too.
    """
    rows = []
    for name in ("frechet_distance", "kernel_distance"):
        ours, theirs = (
            stated_mean(one["generation"]["measures"], name) for one in (evaluation, evaluation["baseline"])
        )
        ratio = theirs / ours if ours is not None and theirs is not None and min(ours, theirs) > 0 else None
        nothing = NOISE if name == "kernel_distance" else figure(None)
        rows.append(
            {
                "title": title_of(name),
                "ours": nothing if ours is None else figure(ours),
                "theirs": nothing if theirs is None else figure(theirs),
                "ratio": ratio and f"{ratio:.1f}",
            }
        )
    for name, (ours, score, theirs) in auroc_pairs(evaluation).items():
        title = f"AUROC by which {name} is told apart: by the energy here, by the {SCORES[score]} there"
        rows.append({"title": title, "ours": figure(ours), "theirs": figure(theirs), "ratio": None})
    return rows


def auroc_pairs(evaluation: dict) -> dict[str, tuple[float, str, float]]:
    """AUROC of our energy, the baseline's own score and the AUROC of that, where both tell the same sets apart."""
    ours, theirs = (one.get("out_of_distribution") for one in (evaluation, evaluation["baseline"]))
    if ours is None or theirs is None or ours["protocol"]["inside"] != theirs["protocol"]["inside"]:
        return {}
    return {
        name: (scores["energy"], *next(pair for pair in theirs["measures"][name].items() if pair[0] != "energy"))
        for name, scores in ours["measures"].items()
        if "energy" in scores
        and name in theirs["measures"]
        and ours["protocol"]["outside"][name] == theirs["protocol"]["outside"][name]
    }


def eval_results(evaluation: dict, details: dict[str, Any]) -> list[EvalResult]:
    """The figures of generation as the Hub's metadata has them."""
    generation = evaluation["generation"]
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=details["data"].get("id", details["data"]["name"]),
            dataset_name=details["data"]["name"],
            dataset_split=generation["protocol"]["reference"]["split"],
            metric_type=name,
            metric_name=f"{title_of(name)} ({evaluation['protocol']['features']})",
            metric_value=stated_mean(generation["measures"], name),
        )
        for name in RESULTS
        if stated_mean(generation["measures"], name) is not None
    ]


def model_facts(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What the card says of the model itself, be it an autoencoder or a flow."""
    is_flow = "flow" in pipeline.components
    model = pipeline.flow if is_flow else pipeline.vae
    generator = model if is_flow else model.decoder
    return {
        "is_flow": is_flow,
        "sampling_class": "ECFlowPipeline" if is_flow else "ECVAEPipeline",
        "sample_size": model.config.sample_size,
        "in_channels": model.config.in_channels,
        "num_latents": model.num_latents if is_flow else model.config.latent_channels,
        "num_generator_parameters": sum(p.numel() for p in generator.parameters()),
        "has_energy_model": pipeline.energy_model is not None,
        "restores": not is_flow and model.config.reconstruction_variance is not None,
    }


def write_card(
    pipeline: DiffusionPipeline,
    save_directory: str | os.PathLike,
    evaluation: dict | None = None,
    details: dict[str, Any] | None = None,
    location: str = LOCATION,
    pictures: dict[str, str] | None = None,
) -> None:
    """
    Write `README.md` from `card_template.md`, unless there is one that is not, or no more, ours.

    Args:
        pipeline ([`DiffusionPipeline`]): What it describes.
        save_directory (`str`): Its folder.
        evaluation (`dict`, *optional*): The content of its `evaluation.json`.
        details (`dict`, *optional*): What else the card says; needed with an evaluation.
        location (`str`, *optional*): What the snippets load: a folder or a Hub id.
        pictures (`dict`, *optional*): File names in the folder, each with a caption.

    Raises:
        ValueError: if `details` lacks a field, or there is an evaluation without them.
    """
    path = Path(save_directory) / "README.md"
    if evaluation is not None and details is None:
        raise ValueError("a card with an evaluation needs `details`: title, license, data and known failures.")
    if details is not None:
        check_details(details)
    if path.exists() and CARD_MARKER.encode() not in path.read_bytes():
        return
    stated, facts = details or {}, model_facts(pipeline)
    kind = "Normalizing flow" if facts["is_flow"] else "VAE"
    kind = pipeline.saved_class.__name__ if facts["has_energy_model"] else kind
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[
            "diffusers",
            # Without an energy model it may be the plain model that others are compared with.
            *(["ecvae", "energy-based-model"] if facts["has_energy_model"] else []),
            "unconditional-image-generation",
            *(["normalizing-flow"] if facts["is_flow"] else []),
            *(["image-restoration"] if facts["restores"] else []),
            *stated.get("tags", []),
        ],
        license=stated.get("license"),
        datasets=[stated["data"]["id"]] if "id" in stated.get("data", {}) else None,
        model_name=stated.get("title") if evaluation is not None else None,
        eval_results=eval_results(evaluation, details) if evaluation is not None else None,
    )
    card = ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"),
        card_marker=CARD_MARKER,
        title=stated.get("title", f"{kind}, {facts['sample_size']} px"),
        details=stated,
        location=location,
        pictures=pictures or {},
        evaluation=evaluation,
        figure=figure,
        evaluation_table=evaluation_table(evaluation) if evaluation is not None else None,
        kernel_is_stated=evaluation is not None
        and stated_mean(evaluation["generation"]["measures"], "kernel_distance") is not None,
        baseline_rows=baseline_rows(evaluation) if evaluation is not None and "baseline" in evaluation else None,
        pipeline_class=pipeline.saved_class.__name__,
        **facts,
    )
    write_text(path, str(card) + "\n")
