# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Fields of a configuration: a default, a help text and a range, declared together."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn


LIMITS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}


class ConfigError(ValueError):
    """The error for a value that is not allowed. The message names the flag, the value and what is allowed."""


def option(
    default: Any = None,
    help: str = "",
    *,
    read: Callable[[str], Any] | None = None,
    flag: bool = True,
    **limits: float,
) -> Any:
    """
    Declare a field of a configuration.

    Args:
        default, help: The default value, and the text of `--help`.
        read (`Callable`): Converts the text of the flag to a value, instead of the field's type.
        flag (`bool`): Whether the field is a command-line flag. Other fields are set in Python, or by the arguments of a resumed run.
        limits (`float`): The range of a number, by the names in `LIMITS`. Numbers must always be finite.
    """
    return field(default=default, metadata={"help": help, "limits": limits, "read": read, "flag": flag})


def with_default(group: type, name: str, default: Any) -> Any:
    """Declare a field of `group` again, with another default, in a subclass of it."""
    return field(default=default, metadata=next(own.metadata for own in fields(group) if own.name == name))


def refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise ConfigError(f"--{name} must be {allowed}, but is {value}.")


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of related fields. The docstring of a subclass is the title of its section in `--help`."""

    def check(self) -> None:
        """
        Check the range of each field.

        Raises:
            ConfigError: at the first value that is not allowed.
        """
        for own in fields(self):
            value, limits = getattr(self, own.name), own.metadata["limits"]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not (math.isfinite(value) and all(LIMITS[kind](value, limit) for kind, limit in limits.items())):
                bounds = [f"{kind.replace('_', ' ')} {limit:g}" for kind, limit in limits.items()]
                refuse(own.name, value, ", ".join(["a finite number", *bounds]))
