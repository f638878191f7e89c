# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a checkpoint is, the snippets that load it, and the figures of its `evaluation.json`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..atomic import write_text
from ..evaluation.schema import Evaluation, Figures, ImageSet, OverSeeds, Pairs, read
from ..figures import DISTANCES, NOISE, is_above_noise


# Stands in every card that `write_card` wrote; a card without it is somebody's work.
CARD_MARKER = (
    "<!-- Written by ecvae_diffusers on saving, and again at each saving: take this line out to keep your changes. -->"
)
# What the snippets load until it is known where the model will lie.
LOCATION = "path/or/hub-id"
PAIRWISE = ("kernel_distance", "precision", "recall", "density", "coverage")
RESULTS = ("frechet_distance", *PAIRWISE)
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
    "nearest_of_samples": "distance of samples to the nearest training image",
    "nearest_of_held_out": "distance of held-out images to the nearest training image",
    "nearest_ratio": "ratio of both",
}
Row = tuple[str, str, str, str]  # measure, value, spread, of what


@dataclass(kw_only=True)
class Data:
    """What a model was trained on; `id` is that of the Hub."""

    name: str
    license: str
    id: str | None = None
    description: str | None = None


@dataclass(kw_only=True)
class Details:
    """What a card says that figures can't. `license` is that of the weights, as the Hub spells it."""

    title: str
    license: str
    data: Data
    known_failures: str
    description: str | None = None
    intended_use: str | None = None
    training: dict[str, str] | None = None
    tags: list[str] | None = None

    @classmethod
    def from_yaml(cls, value: Any) -> Self:
        """Return the details that a YAML file's content holds. Raises `ValueError` naming a field that is missing or wrong."""
        if isinstance(value, dict) and isinstance(value.get("training"), dict):
            value = value | {"training": {str(name): str(one) for name, one in value["training"].items()}}
        details = read(cls, value, "")
        stated = {"title": details.title, "license": details.license, "known_failures": details.known_failures}
        stated |= {"data.name": details.data.name, "data.license": details.data.license}
        if empty := [name for name, text in stated.items() if not text.strip()]:
            raise ValueError(f"`{empty[0]}` must not be empty.")
        return details


def with_location(card: str, location: str) -> str:
    """A card of ours whose snippets load from `location`, where they named no place; any other, as it is."""
    return card.replace(f'"{LOCATION}"', f'"{location}"') if CARD_MARKER in card else card


def figure(value: float | None, digits: int = 4) -> str:
    return "not given" if value is None else f"{value:.{digits}g}"


def stated_means(measures: dict[str, OverSeeds]) -> Figures:
    """Means over seeds of the measures of generation; `None` for a kernel distance that is not above its noise."""
    means = {name: measure.mean for name, measure in measures.items()}
    is_stated = is_above_noise(means.get("kernel_distance"), means.get("kernel_distance_std"))
    return means if is_stated else means | {"kernel_distance": None}


def title_of(measure: str) -> str:
    return TITLES.get(measure, measure.replace("_", " ").replace("frechet", "Frechet"))


def images_of(images: ImageSet) -> str:
    return f"{images.num_images:,} of {images.data} ({images.split})"


def first_ones(protocol: Pairs, *counts: int) -> str:
    """Which images are compared in pairs, where there are more than can be."""
    most = protocol.most_images_in_pairs
    return f", the first {most:,} of each" if most is not None and max(counts) > most else ""


def evaluation_table(evaluation: Evaluation) -> str:
    """The figures of an `evaluation.json` as a table in Markdown, each with its spread and of what it is."""
    lines = [f"| {' | '.join(row)} |" for row in evaluation_rows(evaluation)]
    return "\n".join(["| measure | value | spread | of |", "|---|---|---|---|", *lines])


def evaluation_rows(evaluation: Evaluation) -> Iterator[Row]:
    generation, protocol = evaluation.generation, evaluation.generation.protocol
    of = f"{protocol.num_samples:,} samples against {images_of(protocol.reference)}, {evaluation.protocol.features}"
    in_pairs = first_ones(protocol, protocol.num_samples, protocol.reference.num_images)
    measures = {name: measure for name, measure in generation.measures.items() if name in (*RESULTS, *DISTANCES)}
    means = {name: measure.mean for name, measure in measures.items()}
    spreads = {
        name: f"{measure.std:.2g} over {len(measure.values)} seeds"
        for name, measure in measures.items()
        if measure.std is not None
    }
    yield from rows_of("{}", means, of, in_pairs, spreads)
    if generation.why_no_frechet_distance is not None:
        yield "no Frechet distance", figure(None), "", generation.why_no_frechet_distance
    if (floor := evaluation.floor) is not None:
        compared = floor.protocol.compared
        in_pairs = first_ones(floor.protocol, compared.num_images, floor.protocol.reference.num_images)
        distances = {name: value for name, value in floor.measures.items() if name in DISTANCES}
        yield from rows_of("{}, floor", distances, f"{images_of(compared)} instead of samples", in_pairs)
    if (held_out := evaluation.held_out) is not None:
        of = f"{images_of(held_out.protocol)}, against {held_out.protocol.compared_with}"
        yield "held-out images that were trained on", str(held_out.measures["num_trained_on"]), "", of
    if (reconstruction := evaluation.reconstruction) is not None:
        in_pairs = first_ones(reconstruction.protocol, reconstruction.protocol.num_images)
        of = images_of(reconstruction.protocol)
        yield from rows_of("reconstruction, {}", reconstruction.measures, of, in_pairs)
    if (likelihood := evaluation.likelihood) is not None:
        of = f"{images_of(likelihood.protocol)}, {likelihood.protocol.unit}"
        if likelihood.protocol.variance is not None:  # of a VAE, whose likelihood has bounds only
            of += f", variance {likelihood.protocol.variance}, {likelihood.protocol.importance_samples} latents"
        yield from rows_of("{}", likelihood.measures, of)
    if (memorisation := evaluation.memorisation) is not None:
        of = f"{memorisation.protocol.num_samples:,} samples and {images_of(memorisation.protocol.compared)}; copies are nearer"
        yield from rows_of("{}", memorisation.measures, of)
    if (classes := evaluation.classes) is not None:
        known = (
            ""
            if classes.protocol.accuracy is None
            else f", which names {classes.protocol.accuracy:.1%} of test images right"
        )
        of = f"a classifier of {classes.protocol.num_classes} classes{known}"
        for name, of_class in classes.measures.items():
            yield from rows_of(f"{{}}, {name}", of_class, of)
    if (others := evaluation.out_of_distribution) is not None:
        for name, scores in others.measures.items():
            of = f"{others.protocol.outside[name]:,} others against {others.protocol.inside.num_images:,}"
            for score, value in scores.items():
                yield f"AUROC by which the {SCORES[score]} tells {name} apart", figure(value), "", of


def rows_of(
    title: str, measures: Figures, of: str, in_pairs: str = "", spreads: dict[str, str] | None = None
) -> Iterator[Row]:
    """The rows of a section, whose `title` has a place for the measure. `in_pairs` is of measures that compare in pairs."""
    std = measures.get("kernel_distance_std")
    for name in (name for name in measures if name != "kernel_distance_std"):
        value, spread = figure(measures[name]), [spreads[name]] if spreads and name in spreads else []
        if name == "kernel_distance":
            value = value if is_above_noise(measures[name], std) else NOISE
            spread.append(f"{figure(std, 2)} over subsets")
        yield title.format(title_of(name)), value, ", ".join(spread), of + (in_pairs if name in PAIRWISE else "")


def baseline_rows(evaluation: Evaluation) -> Iterator[Row]:
    """Rows of what the model and the baseline have, and the ratio; AUROCs of our energy and of another score."""
    if (baseline := evaluation.baseline) is None:
        return
    means, their_means = (stated_means(one.generation.measures) for one in (evaluation, baseline))
    for name, nothing in (("frechet_distance", figure(None)), ("kernel_distance", NOISE)):
        ours, theirs = means.get(name), their_means.get(name)
        ratio = f"{theirs / ours:.1f}" if ours and theirs and min(ours, theirs) > 0 else ""
        mine, other = (nothing if one is None else figure(one) for one in (ours, theirs))
        yield title_of(name), mine, other, ratio
    here, there = evaluation.out_of_distribution, baseline.out_of_distribution
    if here is None or there is None or here.protocol.inside != there.protocol.inside:
        return
    for name, scores in here.measures.items():
        # On other sets the other's score says nothing of these.
        is_same = here.protocol.outside[name] == there.protocol.outside.get(name)
        for score, value in there.measures.get(name, {}).items():
            if is_same and score != "energy" and "energy" in scores:
                title = f"AUROC by which {name} is told apart: by the energy here, by the {SCORES[score]} there"
                yield title, figure(scores["energy"]), figure(value), ""


def write_card(
    pipeline: DiffusionPipeline,
    save_directory: str | os.PathLike,
    evaluation: Evaluation | None = None,
    details: Details | None = None,
    location: str = LOCATION,
    pictures: dict[str, str] | None = None,
) -> None:
    """
    Write `README.md` from `card_template.md`, unless there is one that is not, or no more, ours.

    Args:
        pipeline ([`DiffusionPipeline`]): What it describes.
        save_directory (`str`): Its folder.
        evaluation ([`Evaluation`], *optional*): The content of its `evaluation.json`.
        details ([`Details`], *optional*): What else the card says; needed with an evaluation.
        location (`str`, *optional*): What the snippets load: a folder or a Hub id.
        pictures (`dict`, *optional*): File names in the folder, each with a caption.

    Raises:
        ValueError: if there is an evaluation without details.
    """
    path = Path(save_directory) / "README.md"
    if evaluation is not None and details is None:
        raise ValueError("a card with an evaluation needs `details`: title, license, data and known failures.")
    if path.exists() and CARD_MARKER.encode() not in path.read_bytes():
        return
    is_flow, has_energy_model = "flow" in pipeline.components, pipeline.energy_model is not None
    model = pipeline.flow if is_flow else pipeline.vae
    restores = not is_flow and model.config.reconstruction_variance is not None
    kind = pipeline.saved_class.__name__ if has_energy_model else "Normalizing flow" if is_flow else "VAE"
    title = details.title if details is not None else f"{kind}, {model.config.sample_size} px"
    means = stated_means(evaluation.generation.measures) if evaluation is not None else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[
            "diffusers",
            # Without an energy model it may be the plain model that others are compared with.
            *(["ecvae", "energy-based-model"] if has_energy_model else []),
            "unconditional-image-generation",
            *(["normalizing-flow"] if is_flow else []),
            *(["image-restoration"] if restores else []),
            *(details.tags or [] if details is not None else []),
        ],
    )
    if details is not None:
        data.license = details.license
        data.datasets = [details.data.id] if details.data.id is not None else None
    if evaluation is not None and details is not None:
        data.model_name = title
        data.eval_results = [
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=details.data.id or details.data.name,
                dataset_name=details.data.name,
                dataset_split=evaluation.generation.protocol.reference.split,
                metric_type=name,
                metric_name=f"{title_of(name)} ({evaluation.protocol.features})",
                metric_value=mean,
            )
            for name, mean in means.items()
            if name in RESULTS and mean is not None
        ]
    card = ModelCard.from_template(
        data,
        template_str=files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"),
        card_marker=CARD_MARKER,
        title=title,
        details=details,
        location=location,
        pictures=pictures or {},
        evaluation=evaluation,
        evaluation_table=evaluation_table(evaluation) if evaluation is not None else None,
        baseline_rows=list(baseline_rows(evaluation)) if evaluation is not None else None,
        kernel_is_stated=means.get("kernel_distance") is not None,
        figure=figure,
        pipeline_class=pipeline.saved_class.__name__,
        model=model,
        num_parameters=sum(p.numel() for p in (model if is_flow else model.decoder).parameters()),
        is_flow=is_flow,
        has_energy_model=has_energy_model,
        restores=restores,
    )
    write_text(path, str(card) + "\n")
