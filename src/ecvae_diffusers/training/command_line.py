# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Read a [`TrainingConfig`] from flags, a YAML file and the arguments of a resumed run."""

import argparse
import itertools
import os
import sys
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from ecvae_diffusers.command import ArgumentParser, place
from ecvae_diffusers.training.config import TrainingConfig
from ecvae_diffusers.training.options import ConfigError


Config = TypeVar("Config", bound=TrainingConfig)

# Retired flags of version 0.1: the only value that is still supported (a run with another one can't be resumed), and the reason.
RETIRED: dict[str, tuple[Any, str]] = {
    "adam_epsilon": (1e-8, "it is always 1e-8"),
    "adam_weight_decay": (0.0, "it is always 0"),
    "cache_dir": (None, "set HF_DATASETS_CACHE instead"),
    "early_stopping_metric": (
        "frechet_distance",
        "early stopping uses the Frechet distance, or the kernel distance if there are fewer images than features",
    ),
    "energy_act_fn": ("leaky_relu", "it is always leaky_relu"),
    "energy_adam_beta1": (0.0, "it is always 0"),
    "energy_adam_beta2": (None, "it is 0.99 (0.9 for flows and decoders), and a resumed run keeps its value"),
    "free_bits": (0.0, "see --kl_warmup_steps"),
    "healthy_state_steps": (100, "it is always 100"),
    "healthy_states": (3, "it is always 3"),
    "hub_revision": (None, "publish the run's folder with `ecvae publish --hub_revision` instead"),
    "initial_posterior_dual": (None, "it is always --max_posterior_dual"),
    "langevin_dtype": (None, "the chain runs in the precision of training"),
    "norm_type": ("group", "only group normalization works with every calibration"),
    "num_chains": (1, "two chains were slower and no closer to the data"),
    "num_epochs": (None, "give --max_train_steps instead"),
    "posterior_conditioning_weight": (0.0, "it is always 0"),
    "posterior_constraint": ("log_prob", "squared_error was worse than no calibration"),
    "posterior_decoder_drift_step": (0.1, "it is always 0.1"),
    "posterior_decoder_langevin_steps": (5, "it is always 5"),
    "posterior_drift_step": (0.01, "it is always 0.01"),
    "posterior_generated_images": (True, "generated images are always used"),
    "posterior_langevin_steps": (1, "it is always 1"),
    "posterior_tolerance": ("auto", "it is computed from the chain"),
    "shuffle_buffer_size": (10_000, "it is always 10,000"),
    "tracker_project_name": ("ecvae", "it is always ecvae"),
    "use_8bit_adam": (False, "the networks are too small to need it"),
}
# `datasets` reads a folder with such files as a data set, not as a folder of images.
DATA_FILES = (".parquet", ".arrow", ".jsonl", ".csv", ".tar", ".zip")
# Retired flags that are errors: ignoring them could cost hours, or publish to the wrong place.
REFUSED = ("hub_revision", "num_epochs")
# If the command line gives one of these, both are ignored in the YAML file.
EITHER_OR = ("dataset_name", "train_data_dir")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """A formatter that shows the default of each argument, except `None` and `[]`."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)


def auto_or_number(text: str) -> str | float:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be 'auto' or a number, but is {text!r}") from None


def argparse_options(kind: Any, read: Any) -> dict[str, Any]:
    """Return the options of argparse for a field of type `kind`. `read` converts its text, if it is not `None`."""
    if get_origin(kind) is Literal:
        return {"type": type(get_args(kind)[0]), "choices": get_args(kind)}
    if get_origin(kind) is list:
        return {"nargs": "+", **argparse_options(get_args(kind)[0], read)}
    if kinds := [one for one in get_args(kind) if one is not NoneType]:
        if lists := [one for one in kinds if get_origin(one) is list]:
            return argparse_options(lists[0], read)
        return argparse_options(kinds[0], read) if len(kinds) == 1 else {"type": auto_or_number}
    return {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": read or kind}


def build_parser(config_class: type[TrainingConfig], prog: str | None) -> argparse.ArgumentParser:
    parser = ArgumentParser(prog=prog, description=config_class.description, formatter_class=HelpFormatter)
    parser.usage = f"{parser.prog} [data] [--argument value ...]"
    parser.add_argument(
        "data",
        nargs="?",
        type=place,
        help="Folder of images or data set: short for --train_data_dir or --dataset_name.",
    )
    parser.add_argument(
        "--config",
        type=place,
        help="YAML file of arguments (examples: training/configs in a clone). Command-line arguments override it.",
    )
    for kind in config_class.groups().values():
        group = parser.add_argument_group((kind.__doc__ or "").strip())
        for own in fields(kind):
            if own.metadata["flag"]:
                options = argparse_options(own.type, own.metadata["read"])
                group.add_argument(f"--{own.name}", default=own.default, help=own.metadata["help"], **options)
    for name in RETIRED:
        parser.add_argument(f"--{name}", f"--no-{name}", nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def yaml_arguments(parser: argparse.ArgumentParser, path: str, argv: list[str]) -> list[str]:
    """Return the entries of a YAML file as command-line arguments, so that the parser checks their types and choices."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = yaml.safe_load(file)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"--config {path!r} can't be read: {error}")
    if not isinstance(entries, dict):
        parser.error(f"--config {path!r} must hold `argument: value` lines.")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config", "data")}
    if unknown := [str(name) for name in entries if name not in actions]:
        parser.error(f"--config {path!r} holds unknown arguments: {', '.join(unknown)}.")
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(actions)))
    replaced = set(EITHER_OR) if any(getattr(given, name) is not None for name in EITHER_OR) else set()
    if given.max_train_steps is not None:
        replaced.add("num_epochs")
    arguments: list[str] = []
    for name, value in entries.items():
        if value is None or name in replaced:
            continue
        # YAML reads a bare `no` as false.
        if value is False and "no" in (actions[name].choices or ()):
            value = "no"
        is_switch, is_list = isinstance(actions[name], argparse.BooleanOptionalAction), actions[name].nargs == "+"
        if name not in RETIRED and (
            is_switch != isinstance(value, bool) or isinstance(value, list | dict) and not is_list
        ):
            allowed = "true or false" if is_switch else "one value"
            parser.error(f"--config {path!r}: --{name} must be {allowed}, but is {value!r}.")
        if is_switch and isinstance(value, bool):
            arguments.append(f"--{'' if value else 'no-'}{name}")
        elif is_list:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        else:
            # One string, so that the value may start with a dash.
            arguments.append(f"--{name}={value}")
    return arguments


def data_first(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Return `argv` with the data at the front, if it follows a list of numbers, of which argparse would take it for one."""
    lists = {flag for action in parser._actions if action.nargs == "+" for flag in action.option_strings}
    for i, flag in enumerate(argv):
        numbers = list(itertools.takewhile(is_number, argv[i + 1 :]))
        after = i + 1 + len(numbers)
        if flag in lists and numbers and after < len(argv) and not argv[after].startswith("-"):
            return [argv[after], *argv[:after], *argv[after + 1 :]]
    return argv


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def named_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """Return the argument that `data` is short for: `train_data_dir`, or `dataset_name` for data files and Hub ids."""
    for name in EITHER_OR:
        if (other := getattr(args, name)) is not None:
            parser.error(f"data must be given only once, but {args.data!r} and --{name} {other!r} are given.")
    if os.path.isdir(args.data):
        names = os.listdir(args.data) if os.access(args.data, os.R_OK) else []  # training reports the error
        is_data_set = args.streaming or any(name.endswith(DATA_FILES) for name in names)
    else:
        is_data_set = not (os.path.exists(args.data) or args.data.startswith((".", os.sep)))
    return "dataset_name" if is_data_set else "train_data_dir"


def read_config(config_class: type[Config], argv: list[str] | None = None, prog: str | None = None) -> Config:
    """Read and check a script's configuration. Exit with one line that names the argument, its value and what is allowed."""
    parser = build_parser(config_class, prog)
    argv = data_first(parser, sys.argv[1:] if argv is None else list(map(str, argv)))
    args = parser.parse_args(argv)
    if args.data is not None:
        argv = [*argv, f"--{named_data(parser, args)}={args.data}"]
        args = parser.parse_args(argv)
    if args.config is not None:
        argv = [*yaml_arguments(parser, args.config, argv), *argv]
        args = parser.parse_args(argv)
    own: dict[str, Any] = {}
    if args.resume_from_checkpoint is not None and args.output_dir is not None:
        from ecvae_diffusers.training.run.checkpoints import arguments_of_run

        # Arguments that are not given keep the run's values, even if defaults have changed since.
        own = arguments_of_run(args.output_dir)
        parser.set_defaults(**{name: value for name, value in own.items() if name in vars(args)})
        args = parser.parse_args(argv)
    given = vars(args)
    del given["data"]
    for name in sorted(RETIRED.keys() & given.keys()):
        if name in REFUSED:
            parser.error(f"--{name} is retired: {RETIRED[name][1]}.")
        print(f"{parser.prog}: --{name} is retired and ignored: {RETIRED[name][1]}.", file=sys.stderr)
        del given[name]
    try:
        config = config_class.from_flat({**own, **given}).resolved()
        config.check()
    except ConfigError as error:
        parser.error(str(error))
    return config
