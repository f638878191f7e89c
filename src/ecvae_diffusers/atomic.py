# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Writes files and folders so that each is complete or absent, and JSON that every parser reads.

A file is written next to its place, flushed to the disk and renamed. A process that is killed, a machine that loses its power
and a disk that is full leave what was there before.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


# What torch says, in a RuntimeError, of a file that it could not write to the end.
TORCH_WRITER = ("StreamWriter", "unexpected pos")


class WriteError(OSError):
    """A file or folder that could not be written. The message names it, the reason and, on a full disk, the free space."""

    def __str__(self) -> str:
        if self.errno not in (errno.ENOSPC, errno.EDQUOT):
            return f"{self.filename!r} can't be written: {self.strerror}."
        place = next(parent for parent in Path(self.filename).absolute().parents if os.path.exists(parent))
        free = shutil.disk_usage(place).free / 2**20
        return f"{self.filename!r} can't be written: {self.strerror} ({free:,.0f} MiB are free there)."


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """
    Turn the errors of a write to `path` into a [`WriteError`] that names it. An error that names another file, such as one that the
    body reads, stays as it is.

    Raises:
        WriteError: if the body can't write, as on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, RuntimeError):
            if not any(word in str(error) for word in TORCH_WRITER):
                raise
            number = errno.ENOSPC  # torch only tells that less was written than there was
        elif isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        # If it is of a renaming, the second is the new name.
        named = getattr(error, "filename2", None) or getattr(error, "filename", None)
        if isinstance(named, str | os.PathLike):
            named, own = Path(named).absolute(), Path(path).absolute()
            if {own, temporary_path(own)}.isdisjoint({named, *named.parents}) and named not in own.parents:
                raise
        reason = os.strerror(number) if number is not None else str(error)
        raise WriteError(number, " ".join(reason.split()), str(path)) from error


def temporary_path(path: str | os.PathLike) -> Path:
    """Return the hidden name next to `path` under which it is written."""
    return Path(path).with_name(f".{Path(path).name}")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield the name under which the body writes a file or a folder. Afterwards it is flushed to the disk and renamed to `path`,
    replacing what is there. If the body fails, it is removed, and `path` is as it was.

    Raises:
        WriteError: if it can't be written.
    """
    path, temporary = Path(path), temporary_path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        try:
            yield temporary
            sync(temporary)
            move(temporary, path)
            sync(path.parent, recursive=False)
        except BaseException:
            remove(temporary)
            raise


def is_free(path: str | os.PathLike) -> bool:
    """Tell whether a folder of that name would replace nothing: there is none, or it is empty."""
    return not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path))


def write_text(path: str | os.PathLike, text: str, errors: str = "strict") -> None:
    """Write a text in UTF-8. `errors` is that of `str.encode`. Raises `WriteError` if it can't be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: str | os.PathLike, value: Any, sort_keys: bool = False) -> None:
    """Write `to_json(value)`, indented. Raises `WriteError` if it can't be written."""
    write_text(path, to_json(value, indent=2, sort_keys=sort_keys) + "\n")


def to_json(value: Any, **options) -> str:
    """Return JSON with `null` for numbers that are not finite: JSON has no NaN and no infinity. `options` are those of `json.dumps`."""
    return json.dumps(finite_or_none(value), allow_nan=False, **options)


def finite_or_none(value: Any) -> Any:
    """Replace numbers that are not finite, in nested dictionaries, lists and tuples, by `None`."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(one) for one in value]
    return value


def sync(path: Path, recursive: bool = True) -> None:
    """Flush a file, or a folder with all that is in it, to the disk."""
    is_folder, is_windows = path.is_dir(), os.name == "nt"
    for child in path.iterdir() if is_folder and recursive else []:
        sync(child)
    if is_folder and is_windows:
        return  # it opens no folders, and keeps their entries itself
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems flush files only.
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a folder or a link, if there is one. What a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(source: Path, path: Path) -> None:
    """Rename a file or folder to `path`, replacing what is there."""
    hidden = hide(path) if path.is_dir() else None
    os.replace(source, path)
    if hidden is not None:
        remove(hidden)


def discard(path: Path) -> None:
    """Remove a folder under another name: if the process is killed meanwhile, no part of it is left under its own."""
    remove(hide(path))


def hide(path: Path) -> Path:
    """Rename a folder to a hidden name next to it, under which it is removed."""
    hidden = path.with_name(f".discarded-{path.name.lstrip('.')}")
    remove(hidden)
    os.replace(path, hidden)
    return hidden
