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
        return read(cls, value, "")


def with_location(card: str, location: str) -> str:
    """A card of ours whose snippets load from `location`, where they named no place; any other, as it is."""
    return card.replace(f'"{LOCATION}"', f'"{location}"') if CARD_MARKER in card else card


def figure(value: float | None, digits: int = 4) -> str:
    return "not given" if value is None else f"{value:.{digits}g}"


def kernel_figure(value: float | None, std: float | None) -> str:
    """A kernel distance as a card states it."""
    return figure(value) if is_above_noise(value, std) else NOISE


def stated_mean(measures: dict[str, OverSeeds], name: str) -> float | None:
    """The mean over seeds of a measure of generation; `None` where it may not be stated."""
    means = {key: measure.mean for key, measure in measures.items()}
    is_noise = name == "kernel_distance" and not is_above_noise(means.get(name), means.get("kernel_distance_std"))
    return None if is_noise else means.get(name)


def title_of(measure: str) -> str:
    return TITLES.get(measure, measure.replace("_", " ").replace("frechet", "Frechet"))


def images_of(images: ImageSet) -> str:
    return f"{images.num_images:,} of {images.data} ({images.split})"


def first_ones(protocol: Pairs, *counts: int) -> str:
    """Of which images all measures but the Frechet distance are, where there are more than can be compared in pairs."""
    most = protocol.most_images_in_pairs
    return f", the first {most:,} of each" if most is not None and max(counts) > most else ""


def evaluation_table(evaluation: Evaluation) -> str:
    """The figures of an `evaluation.json` as a table in Markdown, each with its spread and of what it is."""
    lines = [f"| {' | '.join(row)} |" for row in evaluation_rows(evaluation)]
    return "\n".join(["| measure | value | spread | of |", "|---|---|---|---|", *lines])


def evaluation_rows(evaluation: Evaluation) -> Iterator[Row]:
    yield from generation_rows(evaluation)
    if (floor := evaluation.floor) is not None:
        compared = floor.protocol.compared
        in_pairs = first_ones(floor.protocol, compared.num_images, floor.protocol.reference.num_images)
        distances = {name: value for name, value in floor.measures.items() if name in DISTANCES}
        yield from rows_of("{}, floor", distances, f"{images_of(compared)} instead of samples", in_pairs)
    if (held_out := evaluation.held_out) is not None:
        of = f"{images_of(held_out.protocol)}, against {held_out.protocol.compared_with}"
        yield "held-out images that were trained on", str(held_out.measures["num_trained_on"]), "", of
    if (reconstruction := evaluation.reconstruction) is not None:
        of = images_of(reconstruction.protocol)
        in_pairs = first_ones(reconstruction.protocol, reconstruction.protocol.num_images)
        yield from rows_of("reconstruction, {}", reconstruction.measures, of, in_pairs)
    if (likelihood := evaluation.likelihood) is not None:
        of = f"{images_of(likelihood.protocol)}, {likelihood.protocol.unit}"
        if likelihood.protocol.variance is not None:  # of a VAE, whose likelihood has bounds only
            of += f", variance {likelihood.protocol.variance}, {likelihood.protocol.importance_samples} latents"
        yield from rows_of("{}", likelihood.measures, of)
    if (others := evaluation.out_of_distribution) is not None:
        for name, scores in others.measures.items():
            of = f"{others.protocol.outside[name]:,} others against {others.protocol.inside.num_images:,}"
            for score, value in scores.items():
                yield f"AUROC by which the {SCORES[score]} tells {name} apart", figure(value), "", of


def generation_rows(evaluation: Evaluation) -> Iterator[Row]:
    generation, protocol = evaluation.generation, evaluation.generation.protocol
    of = f"{protocol.num_samples:,} samples against {images_of(protocol.reference)}, {evaluation.protocol.features}"
    in_pairs = first_ones(protocol, protocol.num_samples, protocol.reference.num_images)
    for name in RESULTS:
        if (measure := generation.measures.get(name)) is None:
            continue
        value = figure(measure.mean)
        spread = [] if measure.std is None else [f"{measure.std:.2g} over {len(measure.values)} seeds"]
        if name == "kernel_distance":
            std = generation.measures["kernel_distance_std"].mean
            value = kernel_figure(measure.mean, std)
            spread.append(f"{figure(std, 2)} over subsets")
        yield title_of(name), value, ", ".join(spread), of if name == "frechet_distance" else of + in_pairs
    if generation.why_no_frechet_distance is not None:
        yield "no Frechet distance", figure(None), "", generation.why_no_frechet_distance


def rows_of(title: str, measures: Figures, of: str, in_pairs: str = "") -> Iterator[Row]:
    std = measures.get("kernel_distance_std")
    for name, value in measures.items():
        if name == "kernel_distance":
            yield (
                title.format(title_of(name)),
                kernel_figure(value, std),
                f"{figure(std, 2)} over subsets",
                of + in_pairs,
            )
        elif name != "kernel_distance_std":
            yield title.format(title_of(name)), figure(value), "", of


def baseline_rows(evaluation: Evaluation) -> Iterator[Row]:
    """
    Rows of what the model has, the other model has, and the ratio; `ecvae publish --baseline` adds it to the evaluation. Next to
    the AUROC of our energy stands that of the other's own score, which a model without an energy has too.
    """
    if (baseline := evaluation.baseline) is None:
        return
    for name in ("frechet_distance", "kernel_distance"):
        ours, theirs = (stated_mean(one.generation.measures, name) for one in (evaluation, baseline))
        ratio = f"{theirs / ours:.1f}" if ours and theirs and min(ours, theirs) > 0 else ""
        nothing = NOISE if name == "kernel_distance" else figure(None)
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


def eval_results(evaluation: Evaluation, details: Details) -> list[EvalResult]:
    """The figures of generation as the Hub's metadata has them."""
    generation = evaluation.generation
    means = {name: stated_mean(generation.measures, name) for name in RESULTS}
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=details.data.id or details.data.name,
            dataset_name=details.data.name,
            dataset_split=generation.protocol.reference.split,
            metric_type=name,
            metric_name=f"{title_of(name)} ({evaluation.protocol.features})",
            metric_value=mean,
        )
        for name, mean in means.items()
        if mean is not None
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
    facts = model_facts(pipeline)
    kind = "Normalizing flow" if facts["is_flow"] else "VAE"
    kind = pipeline.saved_class.__name__ if facts["has_energy_model"] else kind
    tags = [
        "diffusers",
        # Without an energy model it may be the plain model that others are compared with.
        *(["ecvae", "energy-based-model"] if facts["has_energy_model"] else []),
        "unconditional-image-generation",
        *(["normalizing-flow"] if facts["is_flow"] else []),
        *(["image-restoration"] if facts["restores"] else []),
    ]
    stated: dict[str, Any] = {"title": f"{kind}, {facts['sample_size']} px"}
    metadata: dict[str, Any] = {}
    if details is not None:
        tags += details.tags or []
        stated["title"] = details.title
        metadata = {"license": details.license, "datasets": [details.data.id] if details.data.id else None}
        if evaluation is not None:
            metadata |= {"model_name": details.title, "eval_results": eval_results(evaluation, details)}
            stated |= {
                "evaluation_table": evaluation_table(evaluation),
                "baseline_rows": list(baseline_rows(evaluation)),
                "kernel_is_stated": stated_mean(evaluation.generation.measures, "kernel_distance") is not None,
            }
    card = ModelCard.from_template(
        ModelCardData(library_name="diffusers", pipeline_tag="unconditional-image-generation", tags=tags, **metadata),
        template_str=files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"),
        card_marker=CARD_MARKER,
        details=details,
        evaluation=evaluation,
        location=location,
        pictures=pictures or {},
        figure=figure,
        pipeline_class=pipeline.saved_class.__name__,
        **stated,
        **facts,
    )
    write_text(path, str(card) + "\n")
