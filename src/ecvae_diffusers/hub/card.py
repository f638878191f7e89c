# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Writes model cards: what a model draws, how good it is, what fails, and the snippets that load it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from diffusers import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..atomic import write_text
from ..checks import MODES, height_and_width, size_as_text
from ..evaluation.schema import Evaluation, Figures, ImageSet, OverSeeds, Pairs, read
from ..figures import DISTANCES, NOISE, is_above_noise


# In every card that `write_card` wrote. A card without it was edited, and is never replaced.
CARD_MARKER = (
    "<!-- Written by ecvae_diffusers on saving, and again at each saving: take this line out to keep your changes. -->"
)
# What the snippets load until the model's location is known.
LOCATION = "path/or/hub-id"
PAIRWISE = ("kernel_distance", "precision", "recall", "density", "coverage")
RESULTS = ("frechet_distance", *PAIRWISE)
# Scores that may tell other images from the training data, in words.
SCORES = {
    "energy": "energy",
    "error": "reconstruction error",
    "bits_per_dimension": "bits per dimension",
}
TITLES = {
    "elbo": "ELBO, nats per image",
    "importance_weighted": "importance-weighted bound, nats per image",
    "amortisation_gap": "amortisation gap, nats per image",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "mean_squared_error": "mean squared error",
    "named_as_asked": "recognised as the class asked for",
    "nearest_of_samples": "samples: median distance to the nearest training image",
    "nearest_of_held_out": "held-out images: median distance to the nearest training image",
    "nearest_ratio": "ratio of these distances",
}
# What a good value is, next to the floor.
GOOD = {
    **dict.fromkeys((*DISTANCES, "mean_squared_error", "amortisation_gap"), "near 0"),
    **dict.fromkeys(("precision", "recall", "density", "coverage", "ssim", "named_as_asked"), "near 1"),
    **dict.fromkeys(("elbo", "importance_weighted", "psnr"), "high"),
    "bits_per_dimension": "low",
    "nearest_ratio": "1 or more; copies are nearer",
}
COLUMNS = ("measure", "value", "spread", "floor", "good", "measured on")
Row = tuple[str, str, str, str, str, str]  # of `COLUMNS`


@dataclass(kw_only=True)
class Data:
    """The training data of a model. `id` is its id on the Hub."""

    name: str
    license: str
    id: str | None = None
    description: str | None = None


@dataclass(kw_only=True)
class Details:
    """What a card says in addition to figures. `license` is that of the weights, as spelled on the Hub."""

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
        """Read the content of a YAML file. Raises `ValueError`, naming a field that is missing or wrong."""
        if isinstance(value, dict) and isinstance(value.get("training"), dict):
            value = value | {"training": {str(name): str(one) for name, one in value["training"].items()}}
        details = read(cls, value, "")
        stated = {"title": details.title, "license": details.license, "known_failures": details.known_failures}
        stated |= {"data.name": details.data.name, "data.license": details.data.license}
        if empty := [name for name, text in stated.items() if not text.strip()]:
            raise ValueError(f"`{empty[0]}` must not be empty.")
        return details


def with_location(card: str, location: str) -> str:
    """Fill `location` into the snippets of a card that has none. A card that somebody has edited is returned unchanged."""
    return card.replace(f'"{LOCATION}"', f'"{location}"') if CARD_MARKER in card else card


def figure(value: float | None, digits: int = 4) -> str:
    return "not given" if value is None else f"{value:.{digits}g}"


def stated_means(measures: dict[str, OverSeeds]) -> Figures:
    """Return the measures of samples, as means over seeds. A kernel distance within its noise is `None`."""
    means = {name: measure.mean for name, measure in measures.items()}
    is_stated = is_above_noise(means.get("kernel_distance"), means.get("kernel_distance_std"))
    return means if is_stated else means | {"kernel_distance": None}


def title_of(measure: str) -> str:
    return TITLES.get(measure, measure.replace("_", " ").replace("frechet", "Frechet"))


def images_of(images: ImageSet) -> str:
    return f"{images.num_images:,} images of {images.data} ({images.split})"


def first_ones(protocol: Pairs, *counts: int) -> str:
    """Say that only the first images are compared in pairs, if a set has more than that."""
    most = protocol.most_images_in_pairs
    return f", the first {most:,} of each" if most is not None and max(counts) > most else ""


def stated_floor(evaluation: Evaluation) -> tuple[Figures, str]:
    """
    Return the measures of held-out images instead of samples, and in words what they are. Fewer images have a larger
    Frechet distance and a smaller coverage. So, with fewer held-out images than samples, coverage is left out, and the
    whole floor is if its Frechet distance is not below that of the samples.
    """
    if (floor := evaluation.floor) is None:
        return {}, ""
    compared, measures = floor.protocol.compared, dict(floor.measures)
    what = f"Floor: the same measures for {images_of(compared)} instead of samples, about the best values possible."
    if not is_above_noise(measures.get("kernel_distance"), measures.get("kernel_distance_std")):
        measures["kernel_distance"] = None
    own = evaluation.generation.measures["frechet_distance"].mean
    num_samples, best = evaluation.generation.protocol.num_samples, measures.get("frechet_distance")
    if compared.num_images < num_samples:
        measures["coverage"] = None
    if compared.num_images < num_samples and own is not None and best is not None and best >= own:
        measures = {}
        what = f"No floor: {images_of(compared)} are too few to compare with {num_samples:,} samples."
    return measures, what


def quality(evaluation: Evaluation) -> list[str]:
    """Say in a few lines how good samples are, next to the floor and the baseline."""
    means, (floor, what) = stated_means(evaluation.generation.measures), stated_floor(evaluation)
    baseline, lines = evaluation.baseline, []
    name = next((name for name in ("frechet_distance", "kernel_distance") if means.get(name) is not None), None)
    if name is not None:
        found = [f"**{figure(means[name], 3)}** for samples"]
        if floor.get(name) is not None:
            found.append(f"{figure(floor[name], 3)} for held-out images, the floor")
        if baseline is not None and (other := stated_means(baseline.generation.measures).get(name)) is not None:
            found.append(f"{figure(other, 3)} for {baseline.name}")
        lines.append(f"{title_of(name).capitalize()} from the training images (lower is better): {'; '.join(found)}.")
    overlaps = []
    for key in ("precision", "recall", "coverage"):
        if means.get(key) is not None:
            best = "" if floor.get(key) is None else f" (floor {floor[key]:.2f})"
            overlaps.append(f"{key} {means[key]:.2f}{best}")
    if overlaps:
        lines.append(f"{', '.join(overlaps).capitalize()}; higher is better, up to 1.")
    if evaluation.memorisation is not None:
        ratio = evaluation.memorisation.measures.get("nearest_ratio")
        if ratio is not None:
            lines.append(
                f"Samples lie {ratio:.2f} times as far from the nearest training image as held-out images do; copies would "
                "lie much nearer."
            )
    if what and not floor:
        lines.append(what)
    return lines


def evaluation_table(evaluation: Evaluation) -> str:
    """Return the figures of an `evaluation.json` in Markdown: their protocol in words, and a table."""
    protocol = evaluation.generation.protocol
    about = f"Samples are compared with {images_of(protocol.reference)}. Features: {evaluation.protocol.features}."
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] * len(COLUMNS), *evaluation_rows(evaluation))]
    return "\n".join([f"{about} {stated_floor(evaluation)[1]}".strip(), "", *lines])


def evaluation_rows(evaluation: Evaluation) -> Iterator[Row]:
    generation, protocol = evaluation.generation, evaluation.generation.protocol
    of = f"{protocol.num_samples:,} samples" + (" per seed" if len(protocol.seeds or []) > 1 else "")
    in_pairs = first_ones(protocol, protocol.num_samples, protocol.reference.num_images)
    measures = {name: measure for name, measure in generation.measures.items() if name in (*RESULTS, *DISTANCES)}
    means = {name: measure.mean for name, measure in measures.items()}
    spreads = {
        name: f"{measure.std:.2g} over {len(measure.values)} seeds"
        for name, measure in measures.items()
        if measure.std is not None
    }
    if generation.why_no_frechet_distance is not None:
        yield "Frechet distance", "not given", "", "", "", generation.why_no_frechet_distance
    yield from rows_of("{}", means, of, in_pairs, spreads, stated_floor(evaluation)[0])
    if (held_out := evaluation.held_out) is not None:
        of = f"{images_of(held_out.protocol)}, compared with {held_out.protocol.compared_with}"
        yield "held-out images that were trained on", str(held_out.measures["num_trained_on"]), "", "", "0", of
    if (reconstruction := evaluation.reconstruction) is not None:
        in_pairs = first_ones(reconstruction.protocol, reconstruction.protocol.num_images)
        of = images_of(reconstruction.protocol)
        yield from rows_of("reconstruction: {}", reconstruction.measures, of, in_pairs)
    if (likelihood := evaluation.likelihood) is not None:
        of = images_of(likelihood.protocol)
        if likelihood.protocol.variance is not None:  # of a VAE, whose likelihood has bounds only
            of += (
                f", decoder variance {likelihood.protocol.variance}, {likelihood.protocol.importance_samples} latents"
            )
        yield from rows_of("{}", likelihood.measures, of)
    if (memorisation := evaluation.memorisation) is not None:
        of = f"{memorisation.protocol.num_samples:,} samples, {images_of(memorisation.protocol.compared)}"
        yield from rows_of("{}", memorisation.measures, of)
    if (classes := evaluation.classes) is not None:
        accuracy = classes.protocol.accuracy
        known = "" if accuracy is None else f" with an accuracy of {accuracy:.1%} on held-out images"
        of = f"a classifier of {classes.protocol.num_classes} classes{known}"
        for name, of_class in classes.measures.items():
            yield from rows_of(f"{name}: {{}}", of_class, of)
    if (others := evaluation.out_of_distribution) is not None:
        for name, scores in others.measures.items():
            of = f"{others.protocol.outside[name]:,} images of {name}, {others.protocol.inside.num_images:,} held-out images"
            for score, value in scores.items():
                yield f"AUROC for {name}, by {SCORES[score]}", figure(value), "", "", "near 1; 0.5 is chance", of


def rows_of(
    title: str,
    measures: Figures,
    of: str,
    in_pairs: str = "",
    spreads: dict[str, str] | None = None,
    floor: Figures | None = None,
) -> Iterator[Row]:
    """
    Yield the rows of a section, whose `title` has a place for the measure. Figures that are not stated are left out, and
    so are kernel distances within their noise. `in_pairs` is added for measures that compare images in pairs.
    """
    std = measures.get("kernel_distance_std")
    for name, value in measures.items():
        is_noise = name == "kernel_distance" and not is_above_noise(value, std)
        if value is None or is_noise or name == "kernel_distance_std":
            continue
        spread = [spreads[name]] if spreads and name in spreads else []
        if name == "kernel_distance":
            spread.append(f"{figure(std, 2)} over subsets")
        best = (floor or {}).get(name)
        floor_is_noise = floor and name == "kernel_distance" and best is None
        yield (
            title.format(title_of(name)),
            figure(value),
            ", ".join(spread),
            NOISE if floor_is_noise else "" if best is None else figure(best),
            GOOD.get(name, "") if best is None else "near the floor",
            of + (in_pairs if name in PAIRWISE else ""),
        )


def baseline_rows(evaluation: Evaluation) -> Iterator[tuple[str, str, str, str]]:
    """
    Yield the measures that the model and the baseline both have, and their ratio. The AUROC of our energy stands next to
    that of another score of the baseline.
    """
    if (baseline := evaluation.baseline) is None:
        return
    means, their_means = (stated_means(one.generation.measures) for one in (evaluation, baseline))
    for name in ("frechet_distance", "kernel_distance"):
        ours, theirs = means.get(name), their_means.get(name)
        if ours is not None and theirs is not None:
            ratio = f"{theirs / ours:.1f}" if min(ours, theirs) > 0 else ""
            yield title_of(name), figure(ours), figure(theirs), ratio
    here, there = evaluation.out_of_distribution, baseline.out_of_distribution
    if here is None or there is None or here.protocol.inside != there.protocol.inside:
        return
    for name, scores in here.measures.items():
        # AUROCs on other images can't be compared.
        is_same = here.protocol.outside[name] == there.protocol.outside.get(name)
        for score, value in there.measures.get(name, {}).items():
            if is_same and score != "energy" and "energy" in scores:
                title = f"AUROC for {name}, by energy of this model and {SCORES[score]} of the other"
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
    Write `README.md` from `card_template.md`, unless there is one that somebody has written or edited.

    Args:
        pipeline ([`DiffusionPipeline`]): The pipeline to describe.
        save_directory (`str`): Its folder.
        evaluation ([`Evaluation`], *optional*): The content of its `evaluation.json`.
        details ([`Details`], *optional*): What else the card says. Required with an evaluation.
        location (`str`, *optional*): What the snippets load: a folder or a Hub id.
        pictures (`dict`, *optional*): The captions of pictures in the folder, by file name.

    Raises:
        ValueError: if there is an evaluation without details.
    """
    path = Path(save_directory) / "README.md"
    if evaluation is not None and details is None:
        raise ValueError("`details` (title, license, data and known failures) are required with an `evaluation`.")
    if path.exists() and CARD_MARKER.encode() not in path.read_bytes():
        return
    is_flow, has_energy_model = "flow" in pipeline.components, pipeline.energy_model is not None
    model = pipeline.flow if is_flow else pipeline.vae
    restores = not is_flow and model.config.reconstruction_variance is not None
    kind = pipeline.saved_class.__name__ if has_energy_model else "Normalizing flow" if is_flow else "VAE"
    title = details.title if details is not None else f"{kind}, {size_as_text(model.config.sample_size)}"
    means = stated_means(evaluation.generation.measures) if evaluation is not None else {}
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[
            "diffusers",
            # Without an energy model, it may be a plain model without calibration.
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
        quality=quality(evaluation) if evaluation is not None else [],
        seed_measures=[name for name in ("frechet_distance", "kernel_distance") if means.get(name) is not None],
        title_of=title_of,
        figure=figure,
        pipeline_class=pipeline.saved_class.__name__,
        model=model,
        size="x".join(map(str, height_and_width(model.config.sample_size))),
        as_arrays="" if model.config.in_channels in MODES else ', output_type="np"',
        num_parameters=sum(p.numel() for p in (model if is_flow else model.decoder).parameters()),
        is_flow=is_flow,
        has_energy_model=has_energy_model,
        restores=restores,
    )
    write_text(path, str(card) + "\n")
