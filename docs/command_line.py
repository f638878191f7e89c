# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The parsers of the commands, and their reference in Markdown."""

import argparse
import re
import sys
from collections.abc import Callable
from unittest import mock

from ecvae_diffusers.cli import COMMANDS


class Found(BaseException):
    """Carries a parser out of the function that is about to use it."""


def parser_of(main: Callable[[], object]) -> argparse.ArgumentParser:
    """Return the first parser with which a `main` reads its command line. Nothing else of it is run."""

    def stop(parser: argparse.ArgumentParser, *args, **kwargs):
        raise Found(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop), mock.patch.object(sys, "argv", ["x"]):
        try:
            main()
        except Found as found:
            return found.args[0]
    raise ValueError(f"{main} parses no command line.")


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command of `ecvae`."""
    from importlib import import_module

    module = import_module(f"ecvae_diffusers.{COMMANDS[name].module}")
    return parser_of(lambda: module.main([], f"ecvae {name}"))


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Return all options that a parser knows, with both forms of switches."""
    return set(parser._option_string_actions)


def text(help_text: str) -> str:
    """Return a help text in Markdown, flags as code."""
    escaped = re.sub(r"([<>*_\[\]])", r"\\\1", " ".join(help_text.split()))
    return re.sub(r"(?<![`\w-])--?[a-z](?:[\w-]|\\_)*", lambda found: f"`{found[0].replace(chr(92), '')}`", escaped)


def entry(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return an argument as an item of a definition list."""
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    values = ""
    if action.choices is not None:
        values = " " + " | ".join(f"`{choice}`" for choice in action.choices)
    elif action.option_strings and action.nargs != 0:
        shown = action.metavar or action.dest.upper()
        values = f" *{shown.replace('_', chr(92) + '_')}*" + (" ..." if action.nargs == "+" else "")
    said = text((action.help or "") % {**vars(action), "prog": parser.prog})
    known = action.default not in (None, argparse.SUPPRESS, [], "") and action.nargs != 0
    if known and "Default" not in said and "by default" not in said:
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        said += f" Default: `{shown}`."
    if isinstance(action, argparse.BooleanOptionalAction) and action.default:
        said += " On by default."
    return f"{names}{values}\n: {said.strip() or chr(8203)}"


def command_reference(name: str) -> str:
    """Return what a command is for, an example and its arguments, group by group."""
    command, parser = COMMANDS[name], command_parser(name)
    parts = [f"## ecvae {name}", command.summary, f"```bash\necvae {name} {command.example}\n```"]
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
        ]
        if not actions:
            continue
        if group.title not in ("positional arguments", "options"):
            parts.append(f"**{text(group.title or '')[:1].upper()}{text(group.title or '')[1:]}**")
        parts += [entry(parser, action) for action in actions]
    return "\n\n".join(parts) + "\n"


def reference() -> str:
    """Return the reference of all commands."""
    return "\n".join(map(command_reference, COMMANDS))
