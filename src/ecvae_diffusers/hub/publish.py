# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Prepares a model's folder for the Hub and uploads it, for `ecvae publish`.

The folder holds weights, code, `evaluation.json`, pictures, and a card with the figures of the evaluation, which must have
been made with these weights. An autoencoder with a calibrated decoder is published unchanged, without an evaluation.
"""

import argparse
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from ..atomic import replacing, write_json, write_text
from ..evaluation.schema import Baseline, Evaluation, Measured, SeedRun, TrainingSeeds
from ..pipelines import ECFlowPipeline, ECVAEPipeline
from ..report.curves import plot_curves
from ..training.run.log import METRICS_FILE, read_arguments, read_metrics
from .card import CARD_MARKER, LOCATION, Details, stated_means, with_location, write_card
from .contents import CARD, EVALUATION, PICTURES, class_name, files_to_publish, read_index
from .saving import weights_fingerprint
from .upload import upload_folder


EVALUATED: dict[str, Any] = {"ECVAEPipeline": ECVAEPipeline, "ECFlowPipeline": ECFlowPipeline}
CAPTIONS = {
    "samples.png": "The first samples of the first seed, not selected",
    "neighbours.png": "The samples nearest to training images (left), each next to those images",
    "curves.png": "Curves of training",
}


def read_evaluation(argument: str, folder: str) -> Evaluation:
    try:
        return Evaluation.load(folder)
    except ValueError as error:
        raise ValueError(f"--{argument}: {error}") from error


def read_details(path: str) -> Details:
    try:
        return Details.from_yaml(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--details {path!r}: {error}") from error


def read_comparable(argument: str, named: str, evaluation: Evaluation) -> tuple[str, Evaluation]:
    """Return name and evaluation of `NAME=FOLDER`. Raises `ValueError` if its samples were measured by another protocol."""

    def protocol(one: Evaluation) -> dict[str, Any]:
        common = {"features": one.protocol.features, "images": one.protocol.images}
        return vars(one.generation.protocol) | common

    name, _, folder = named.partition("=")
    other = read_evaluation(argument, folder)
    ours, theirs = protocol(evaluation), protocol(other)
    if changed := [key for key, value in ours.items() if theirs[key] != value]:
        raise ValueError(
            f"--{argument} {named!r} can't be compared: it was evaluated with another {', '.join(changed)}."
        )
    return name, other


def merged_evaluation(args: argparse.Namespace, fingerprint: str) -> Evaluation:
    """Return the evaluation of the model, with those of the baseline and of other training seeds."""
    evaluation = read_evaluation("evaluation", args.evaluation)
    if evaluation.weights != fingerprint:
        raise ValueError(
            f"--evaluation {args.evaluation!r} was made with other weights than those of {args.model!r}: evaluate this model."
        )
    if args.baseline is not None:
        name, other = read_comparable("baseline", args.baseline, evaluation)
        evaluation.baseline = Baseline(name=name, **{one.name: getattr(other, one.name) for one in fields(Measured)})
    runs = []
    for named in args.training_seeds:
        seed, other = read_comparable("training_seeds", named, evaluation)
        means = stated_means(other.generation.measures)
        distances = {name: means.get(name) for name in ("frechet_distance", "kernel_distance")}
        runs.append(SeedRun(seed=seed, weights=other.weights, **distances))
    if runs:
        published = [run.seed for run in runs if run.weights == fingerprint]
        if len(published) != 1:
            raise ValueError(f"--training_seeds must hold this model once, but holds it {len(published)} times.")
        evaluation.training_seeds = TrainingSeeds(published=published[0], runs=runs)
    return evaluation


def card_location(args: argparse.Namespace) -> str:
    """Return the location that the card's snippets load. An absolute path of this machine is shortened to its last name."""
    if args.location is not None:
        return args.location
    if args.hub_model_id is not None:
        # If the name has no user, the upload fills in the full name.
        return args.hub_model_id if "/" in args.hub_model_id else LOCATION
    return Path(args.output_dir).name if Path(args.output_dir).is_absolute() else args.output_dir


def copy_as_it_is(args: argparse.Namespace, held: str, folder: Path) -> None:
    """Copy the files of a model that `ecvae evaluate` can't measure, and fill the location into its card."""
    for argument, is_given in (("evaluation", args.evaluation is not None), ("dtype", args.dtype != "float32")):
        if is_given:
            raise ValueError(f"--{argument} is for {' and '.join(EVALUATED)}, but {args.model!r} holds a {held}.")
    for name in files_to_publish(args.model):
        if not (folder / name).exists():  # a file of an earlier model that is kept
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(args.model) / name, folder / name)
    card = (folder / CARD).read_text(encoding="utf-8")
    write_text(folder / CARD, with_location(card, card_location(args)))


def write_folder(args: argparse.Namespace, pipeline: ECVAEPipeline | ECFlowPipeline, folder: Path) -> None:
    """Write all files to publish of a model that `ecvae evaluate` can measure."""
    fingerprint = weights_fingerprint(pipeline)
    details = read_details(args.details) if args.details is not None else None
    evaluation = merged_evaluation(args, fingerprint) if args.evaluation is not None else None
    if args.dtype == "float16":
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.half()
    pipeline.save_pretrained(folder)
    if evaluation is not None:
        write_json(folder / EVALUATION, evaluation.to_json())
        for source in (Path(args.evaluation) / name for name in ("samples.png", "neighbours.png")):
            if source.is_file():
                # A link stays a link, which `files_to_publish` refuses.
                shutil.copyfile(source, folder / source.name, follow_symlinks=False)
    metrics = Path(args.model) / METRICS_FILE
    records = read_metrics(metrics) if metrics.is_file() else []
    if records:
        plot_curves(records, folder / "curves.png")
    trained = read_arguments(args.model)
    if details is not None and trained:
        names = ("seed", "max_train_steps", "train_batch_size", "calibration")
        facts = {name.replace("_", " "): str(trained[name]) for name in names if name in trained}
        if "use_ema" in trained:
            facts["averaged weights (EMA)"] = "yes" if trained["use_ema"] else "no"
        if calibrating := [record["calibrating"] for record in records if "calibrating" in record]:
            facts["lambda at the end"] = f"{records[-1]['dual']:.3g}"
            facts["calibration on"] = f"in {sum(calibrating) / len(calibrating):.0%} of the logged steps"
        details.training = (details.training or {}) | facts
    pictures = {name: caption for name, caption in CAPTIONS.items() if (folder / name).is_file()}
    write_card(pipeline, folder, evaluation, details, card_location(args), pictures)


def files_to_keep(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the files of an earlier model in `--output_dir` to keep: a licence, a user's pictures and an edited card."""
    if not folder.exists() or not any(folder.iterdir()):
        return []
    try:
        known = set(files_to_publish(folder))
    except ValueError as error:
        raise ValueError(f"--output_dir must be new, empty or an earlier model's folder, but {error}") from error
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if found - known:  # they would be lost
        raise ValueError(f"--output_dir {args.output_dir!r} holds other files, such as {min(found - known)!r}.")
    kept = [name for name in known if name == "LICENSE" or (Path(name).suffix in PICTURES and name not in CAPTIONS)]
    if CARD_MARKER.encode() not in (folder / CARD).read_bytes():
        print(f"{folder / CARD} was edited and stays as it is: compare its figures with {EVALUATION}.")
        kept.append(CARD)
    return kept


def run(args: argparse.Namespace) -> None:
    """
    Publish a model with the arguments of `ecvae publish`.

    Raises:
        ValueError: if an argument is wrong, before anything is written.
        UploadError: if the upload fails.
    """
    held = str(class_name(read_index(Path(args.model))))
    pipeline = EVALUATED[held].from_pretrained(args.model) if held in EVALUATED else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.output_dir or Path(temporary) / "model").resolve()
        # The earlier folder stays complete until the new one is.
        with replacing(folder) as unfinished:
            unfinished.mkdir()
            for name in files_to_keep(args, folder):
                shutil.copyfile(folder / name, unfinished / name)
            if pipeline is not None:
                write_folder(args, pipeline, unfinished)
            else:
                copy_as_it_is(args, held, unfinished)
            files_to_publish(unfinished)
        if args.output_dir is not None:
            print(f"Written: {folder}")
        if args.hub_model_id is not None:
            url = upload_folder(
                folder,
                args.hub_model_id,
                private=args.hub_private_repo,
                revision=args.hub_revision,
                commit_message=args.commit_message,
            )
            print(f"Published: {url}")
