# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Prepare a model's folder for the Hub, and upload it: `ecvae publish --help`.

`--output_dir` keeps the folder, `--hub_model_id` uploads it. The token is that of `hf auth login` or HF_TOKEN.
"""

import argparse

from ecvae_diffusers.command import ArgumentParser, named_place, place, printable
from ecvae_diffusers.commands import run_or_fail


def named_folder(text: str) -> str:
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER, but is {text!r}")
    return named_place(text)


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=prog, description=str(__doc__).split(":")[0] + ".")
    parser.add_argument("model", type=place, help="Folder of a pipeline, such as that of a training run.")
    parser.add_argument("--evaluation", type=place, help="Folder that `ecvae evaluate` wrote for this model.")
    parser.add_argument(
        "--details", type=place, help="YAML file with title, license, data (name, license), known_failures."
    )
    parser.add_argument(
        "--baseline", type=named_folder, metavar="NAME=FOLDER", help="Evaluation of another model to compare with."
    )
    parser.add_argument(
        "--training_seeds", type=named_folder, nargs="+", default=[], metavar="SEED=FOLDER",
        help="Evaluations of the same training with each seed, including this model's.",
    )  # fmt: skip
    # Not bfloat16: it rounds weights so much that their fingerprint no longer matches the evaluation.
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="Type of the published weights. Default: float32.",
    )
    parser.add_argument("--output_dir", type=place, help="Folder to keep: a new one, or one to replace.")
    parser.add_argument("--hub_model_id", help="Repository to upload to: user/name.")
    parser.add_argument(
        "--hub_private_repo", action=argparse.BooleanOptionalAction, help="Make a new repository private."
    )
    parser.add_argument("--hub_revision", help="Branch, created if it does not exist. Default: main.")
    parser.add_argument("--commit_message", help="Title of the commit.")
    parser.add_argument(
        "--location", help="Folder or Hub id that the card's snippets load. Default: the repository, or --output_dir."
    )
    args = parser.parse_args(argv)
    if args.output_dir is None and args.hub_model_id is None:
        parser.error("--output_dir or --hub_model_id is required.")
    if args.evaluation is not None and args.details is None:
        parser.error("--evaluation requires --details.")
    if args.evaluation is None and (args.baseline is not None or args.training_seeds):
        parser.error("--baseline and --training_seeds require --evaluation.")
    return args


def main(argv: list[str] | None = None, prog: str = "publish.py") -> None:
    """Run `ecvae publish` with `argv`, or with the arguments of this process."""
    printable()
    args = parse_args(argv, prog)

    from ecvae_diffusers.hub.publish import run

    run_or_fail(run, args, prog)


if __name__ == "__main__":
    main()
