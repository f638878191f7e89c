# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Make a model's folder ready for the Hub, and upload it: `python training/publish.py RUN --evaluation EVALUATION --details FILE`.

The folder holds weights, code, `evaluation.json`, pictures and a card with the figures of the evaluation, which must be of these
weights. An autoencoder with a calibrated decoder is published as it is, without an evaluation.
`--output_dir` keeps the folder, `--hub_model_id` uploads it. The token is that of `hf auth login` or HF_TOKEN.
"""

import argparse
import json
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import torch
import yaml

from ecvae_diffusers import ECFlowPipeline, ECVAEPipeline
from ecvae_diffusers.atomic import replacing, write_json, write_text
from ecvae_diffusers.hub.card import CARD_MARKER, LOCATION, check_details, stated_mean, with_location, write_card
from ecvae_diffusers.hub.contents import (
    CARD,
    EVALUATION,
    PICTURES,
    check_file,
    class_name,
    files_to_publish,
    read_index,
)
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.hub.upload import UploadError, upload_folder
from ecvae_diffusers.report.curves import plot_curves
from ecvae_diffusers.training.run.command import ArgumentParser, fail, named_place, place, printable
from ecvae_diffusers.training.run.log import METRICS_FILE, read_arguments, read_metrics


EVALUATED = {"ECVAEPipeline": ECVAEPipeline, "ECFlowPipeline": ECFlowPipeline}
SECTIONS = ("weights", "protocol", "generation")  # of every evaluation
CAPTIONS = {
    "samples.png": "Samples, the first ones of the first seed",
    "neighbours.png": "Each sample (left) next to the training images nearest to it in features",
    "curves.png": "Curves of training",
}
# Not bfloat16, which rounds weights so that their fingerprint is no more that of the evaluation.
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def named_folder(text: str) -> str:
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, but is {text!r}")
    return named_place(text)


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog=prog, description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=place, help="Pipeline's folder, such as that of a training run.")
    parser.add_argument("--evaluation", type=place, help="Folder that evaluate.py wrote for this model.")
    parser.add_argument(
        "--details", type=place, help="YAML file: title, license, data (name, license), known_failures, and more."
    )
    parser.add_argument(
        "--baseline", type=named_folder, metavar="NAME=FOLDER", help="Evaluation of another model to compare with."
    )
    parser.add_argument(
        "--training_seeds", type=named_folder, nargs="+", default=[], metavar="SEED=FOLDER",
        help="Evaluations of the same training with each seed, including this model's.",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Of the weights that are published.")
    parser.add_argument("--output_dir", type=place, help="Where to keep the folder: a new one, or an earlier one.")
    parser.add_argument("--hub_model_id", help="Repository to upload to: user/name.")
    parser.add_argument("--hub_private_repo", action=argparse.BooleanOptionalAction, help="Of a new repository.")
    parser.add_argument("--hub_revision", help="Branch, created if there is none. main if not given.")
    parser.add_argument("--commit_message")
    parser.add_argument(
        "--location", help="What the card's snippets load; the repository, or the folder, if not given."
    )
    args = parser.parse_args(argv)
    if args.output_dir is None and args.hub_model_id is None:
        parser.error("--output_dir or --hub_model_id must say where the model goes.")
    if (args.evaluation is None) != (args.details is None):
        parser.error("--evaluation and --details must be given together.")
    if args.evaluation is None and (args.baseline is not None or args.training_seeds):
        parser.error("--baseline and --training_seeds need --evaluation.")
    return args


def read_evaluation(argument: str, folder: str) -> dict:
    """Return the `evaluation.json` in a folder. Raise `ValueError` if it is not one of evaluate.py."""
    try:
        evaluation = json.loads(
            (Path(folder) / EVALUATION).read_text(encoding="utf-8"), parse_constant=refuse_constant
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"--{argument} {folder!r} holds no {EVALUATION} that can be read: {error}") from error
    if not isinstance(evaluation, dict) or not set(SECTIONS) <= evaluation.keys():
        raise ValueError(
            f"--{argument} {folder!r} must hold an {EVALUATION} of evaluate.py: with {', '.join(SECTIONS)}."
        )
    generation = evaluation["generation"]
    measures = generation.get("measures") if isinstance(generation, dict) else None
    if not isinstance(measures, dict) or not all(isinstance(one, dict) for one in measures.values()):
        raise ValueError(f"--{argument} {folder!r}: `generation` of its {EVALUATION} must hold measures by name.")
    return evaluation


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def read_details(path: str) -> dict:
    try:
        details = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        check_details(details)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--details {path!r}: {' '.join(str(error).split())}") from error
    return details


def check_comparable(argument: str, evaluation: dict, other: dict) -> None:
    """Raise `ValueError` if two evaluations differ in their protocol of generation."""

    def protocol(one: dict) -> dict:
        return one["generation"]["protocol"] | {
            "features": one["protocol"]["features"],
            "images": one["protocol"]["images"],
        }

    ours, theirs = protocol(evaluation), protocol(other)
    changed = [name for name, value in ours.items() if theirs.get(name) != value]
    if changed:
        raise ValueError(f"--{argument} can't be compared, since it was evaluated with another {', '.join(changed)}.")


def merged_evaluation(args: argparse.Namespace, fingerprint: str) -> dict:
    """Return the evaluation, with those of the baseline and of other training seeds."""
    evaluation = read_evaluation("evaluation", args.evaluation)
    if evaluation.get("weights") != fingerprint:
        raise ValueError(
            f"--evaluation {args.evaluation!r} is not of the weights of {args.model!r}: evaluate this model."
        )
    if args.baseline is not None:
        name, _, folder = args.baseline.partition("=")
        other = read_evaluation("baseline", folder)
        check_comparable("baseline", evaluation, other)
        evaluation["baseline"] = {"name": name, **other}
    runs = []
    for value in args.training_seeds:
        seed, _, folder = value.partition("=")
        other = read_evaluation("training_seeds", folder)
        check_comparable("training_seeds", evaluation, other)
        measures = other["generation"]["measures"]
        distances = {name: stated_mean(measures, name) for name in ("frechet_distance", "kernel_distance")}
        runs.append({"seed": seed, "weights": other["weights"], **distances})
    if runs:
        published = [run["seed"] for run in runs if run["weights"] == fingerprint]
        if len(published) != 1:
            raise ValueError(f"--training_seeds must hold this model once, but holds it {len(published)} times.")
        evaluation["training_seeds"] = {"published": published[0], "runs": runs}
    return evaluation


def card_location(args: argparse.Namespace) -> str:
    """Return what the card's snippets load: never an absolute path, which is of this machine."""
    if args.location is not None:
        return args.location
    if args.hub_model_id is not None:
        # A name alone is one's own: the upload learns whose.
        return args.hub_model_id if "/" in args.hub_model_id else LOCATION
    return Path(args.output_dir).name if Path(args.output_dir).is_absolute() else args.output_dir


def copy_as_it_is(args: argparse.Namespace, held: str, folder: Path) -> None:
    """Copy a model that evaluate.py does not measure: its own files, and its own card, with the place that it goes to."""
    for argument, is_given in (("evaluation", args.evaluation is not None), ("dtype", args.dtype != "float32")):
        if is_given:
            raise ValueError(f"--{argument} is for {' and '.join(EVALUATED)}, but {args.model!r} holds a {held}.")
    for name in files_to_publish(args.model):
        if not (folder / name).exists():  # an edited card
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(Path(args.model) / name, folder / name)
    card = (folder / CARD).read_text(encoding="utf-8")
    write_text(folder / CARD, with_location(card, card_location(args)))


def write_folder(args: argparse.Namespace, pipeline: ECVAEPipeline | ECFlowPipeline, folder: Path) -> None:
    """Write everything that is published of a model that evaluate.py measures."""
    fingerprint = weights_fingerprint(pipeline)
    details = read_details(args.details) if args.details is not None else None
    evaluation = merged_evaluation(args, fingerprint) if args.evaluation is not None else None
    pipeline.to(DTYPES[args.dtype]).save_pretrained(folder)
    if evaluation is not None:
        write_json(folder / EVALUATION, evaluation)
        for source in (Path(args.evaluation) / name for name in ("samples.png", "neighbours.png")):
            if source.is_file():
                check_file(source, Path(args.evaluation))
                shutil.copyfile(source, folder / source.name)
    metrics = Path(args.model) / METRICS_FILE
    records = read_metrics(metrics) if metrics.is_file() else []
    if records:
        plot_curves(records, folder / "curves.png")
    trained = read_arguments(args.model)
    if details is not None and trained:
        names = ("seed", "max_train_steps", "train_batch_size", "calibration")
        facts = {name.replace("_", " "): trained[name] for name in names if name in trained}
        if "use_ema" in trained:
            facts["averaged weights (EMA)"] = "yes" if trained["use_ema"] else "no"
        details["training"] = details.get("training", {}) | facts | calibration_facts(records)
    pictures = {name: caption for name, caption in CAPTIONS.items() if (folder / name).is_file()}
    write_card(pipeline, folder, evaluation, details, card_location(args), pictures)


def calibration_facts(records: list[dict]) -> dict[str, str]:
    """Return what a card says of calibration, from the logged steps of a run: lambda, and how often it was on."""
    calibrating = [record["calibrating"] for record in records if "calibrating" in record]
    if not calibrating:
        return {}
    return {
        "lambda in the end": f"{records[-1]['dual']:.3g}",
        "calibration on": f"in {sum(calibrating) / len(calibrating):.0%} of the logged steps",
    }


def run(args: argparse.Namespace) -> None:
    output_dir = Path(args.output_dir).resolve() if args.output_dir is not None else None
    own: list[str] = []
    if output_dir is not None and output_dir.exists() and any(output_dir.iterdir()):
        # Only an earlier one may be replaced: with it goes all that is in it.
        known = set(files_to_publish(output_dir))
        found = {path.relative_to(output_dir).as_posix() for path in output_dir.rglob("*") if path.is_file()}
        if found - known:
            raise ValueError(
                f"--output_dir {args.output_dir!r} holds other files, such as {sorted(found - known)[0]!r}."
            )
        # What somebody has laid next to it. All else is of the earlier model.
        own = [name for name in known if name == "LICENSE" or (Path(name).suffix in PICTURES and name not in CAPTIONS)]

    held = class_name(read_index(Path(args.model)))
    pipeline = EVALUATED[held].from_pretrained(args.model) if held in EVALUATED else None

    def fill(folder: Path) -> None:
        folder.mkdir()
        if output_dir is not None and (output_dir / CARD).is_file():
            card = (output_dir / CARD).read_bytes()
            if CARD_MARKER.encode() not in card:
                print(f"{output_dir / CARD} was edited and stays as it is: compare its figures with {EVALUATION}.")
                (folder / CARD).write_bytes(card)
        if pipeline is None:
            copy_as_it_is(args, held, folder)
        else:
            write_folder(args, pipeline, folder)
        for name in own:
            if not (folder / name).exists():
                shutil.copyfile(output_dir / name, folder / name)
        files_to_publish(folder)

    with tempfile.TemporaryDirectory() if output_dir is None else nullcontext() as temporary:
        folder = output_dir or Path(temporary) / "model"
        # What lies there stays complete until this is.
        with replacing(folder) as unfinished:
            fill(unfinished)
        if output_dir is not None:
            print(f"Written: {output_dir}")
        if args.hub_model_id is not None:
            url = upload_folder(
                folder,
                args.hub_model_id,
                private=args.hub_private_repo,
                revision=args.hub_revision,
                commit_message=args.commit_message,
            )
            print(f"Published: {url}")


def main(argv: list[str] | None = None, prog: str = "publish.py") -> None:
    """Publish as a command line says: that of this process, or `argv`."""
    printable()
    args = parse_args(argv, prog)
    try:
        run(args)
    except (ValueError, OSError, UploadError) as error:
        fail(f"{prog}: error: {error}")


if __name__ == "__main__":
    main()
