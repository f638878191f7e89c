# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Write files and folders so that each is complete or absent, and JSON that every parser can read.

A file is written under a temporary name next to its path, flushed to disk and renamed. If the process is killed, the power fails
or the disk is full, the previous file is still there.
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


# Words in the RuntimeError that torch raises for a file it could not write completely.
TORCH_WRITER = ("StreamWriter", "unexpected pos")


class WriteError(OSError):
    """An error in writing a file or folder. The message names it, the reason and, on a full disk, the free space."""

    def __str__(self) -> str:
        if self.errno not in (errno.ENOSPC, errno.EDQUOT):
            return f"{self.filename!r} can't be written: {self.strerror}."
        place = next(parent for parent in Path(self.filename).absolute().parents if os.path.exists(parent))
        free = shutil.disk_usage(place).free / 2**20
        return f"{self.filename!r} can't be written: {self.strerror} ({free:,.0f} MiB are free there)."


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """
    Turn errors of writing `path` into a [`WriteError`] that names it. An error that names another file, such as one that the body
    reads, is raised unchanged.

    Raises:
        WriteError: if the body can't write, for example on a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, RuntimeError):
            if not any(word in str(error) for word in TORCH_WRITER):
                raise
            number = errno.ENOSPC  # torch says only that the file is incomplete
        elif isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
            number = int(found[1])
        # If a file was renamed, `filename2` is the new name.
        named = getattr(error, "filename2", None) or getattr(error, "filename", None)
        if isinstance(named, str | os.PathLike):
            named, own = Path(named).absolute(), Path(path).absolute()
            if {own, temporary_path(own)}.isdisjoint({named, *named.parents}) and named not in own.parents:
                raise
        reason = os.strerror(number) if number is not None else str(error)
        raise WriteError(number, " ".join(reason.split()), str(path)) from error


def temporary_path(path: str | os.PathLike) -> Path:
    """Return the hidden temporary name next to `path` under which it is written."""
    return Path(path).with_name(f".{Path(path).name}")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary path for the body to write a file or folder to. It is then flushed to disk and renamed to `path`, replacing
    what is there. If the body fails, the temporary file or folder is removed, and `path` is unchanged.

    Raises:
        WriteError: if `path` can't be written.
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
    """Write text in UTF-8, with `errors` as for `str.encode`. Raises `WriteError` if it can't be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: str | os.PathLike, value: Any, sort_keys: bool = False) -> None:
    """Write `to_json(value)`, indented. Raises `WriteError` if it can't be written."""
    write_text(path, to_json(value, indent=2, sort_keys=sort_keys) + "\n")


def to_json(value: Any, **options) -> str:
    """Return JSON with `null` for non-finite numbers, since JSON has no NaN or infinity. `options` are those of `json.dumps`."""
    return json.dumps(finite_or_none(value), allow_nan=False, **options)


def finite_or_none(value: Any) -> Any:
    """Replace non-finite numbers in nested dictionaries, lists and tuples by `None`. Tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(one) for one in value]
    return value


def sync(path: Path, recursive: bool = True) -> None:
    """Flush a file, or a folder with all its contents, to disk."""
    is_folder, is_windows = path.is_dir(), os.name == "nt"
    for child in path.iterdir() if is_folder and recursive else []:
        sync(child)
    if is_folder and is_windows:
        return  # Windows can't open folders, and stores their entries itself
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
    """Remove a file, a folder or a link, if it exists. The target of a link stays."""
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
    """Rename a folder, then remove it: if the process is killed meanwhile, no partial folder is left under its own name."""
    remove(hide(path))


def hide(path: Path) -> Path:
    """Rename a folder to a hidden name next to it, and return that name, for removal."""
    hidden = path.with_name(f".discarded-{path.name.lstrip('.')}")
    remove(hidden)
    os.replace(path, hidden)
    return hidden
