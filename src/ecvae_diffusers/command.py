# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Shared parts of all command lines: arguments that are folders or Hub ids, and a last line that says why a command failed.

`accelerate launch` and `torchrun` print a traceback below the message of a failed process. Under one of them, this file also runs
as a small script, which waits until the launcher has ended and then repeats the message below the traceback.
"""

import argparse
import hashlib
import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn


LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
# The message is not repeated after this time: a launcher that restarts its processes has newer messages by then.
MAX_SECONDS = 60
# Arguments of any command that must be folders of pictures.
PICTURE_FOLDERS = ("train_data_dir", "test_data_dir", "generated_image_dir", "image_dir")
# Arguments of any command that are folders or Hub ids, with the kind of repository.
SOURCES = {"pretrained_model_name_or_path": "model", "baseline": "model", "dataset_name": "dataset"}
HUB_TIMEOUT = 10.0  # seconds


def place(text: str) -> str:
    """Return a folder, a file or a Hub id of the command line with a leading `~` expanded: the `type` of such an argument."""
    expanded = os.path.expanduser(text)
    if not text.strip() or expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"must be a folder, a file or a Hub id, but is {text!r}")
    return expanded


def local_path(text: str) -> Path:
    """Return a folder or file of the command line, expanded as by [`place`]."""
    return Path(place(text))


def named_place(text: str) -> str:
    """Return `NAME=PLACE` of the command line, with PLACE expanded as by [`place`]. Text without `=` is returned as it is."""
    name, equals, source = text.partition("=")
    return f"{name}={place(source)}" if equals else text


def device_name(text: str) -> str:
    """Return the name of a device of the command line. Raises `ArgumentTypeError` if this machine can't compute on it."""
    import torch

    try:
        torch.zeros(1, device=torch.device(text))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, but is {text}: {reason}") from error
    return text


def name_as_text(source: str) -> str:
    """Return a Hub id as it is, or the name of a local folder without its path. Bytes that are not UTF-8 are escaped."""
    if not os.path.exists(source):
        return source
    return os.fsencode(Path(source).resolve().name).decode("utf-8", "backslashreplace")


def check_places(args: argparse.Namespace) -> None:
    """
    Check that the folders and Hub ids of a command line exist, before anything is loaded. Raises `ValueError`, which names the
    argument, if a folder of pictures does not exist, or a source is neither a local path nor on the Hub.
    """
    for argument in PICTURE_FOLDERS:
        if (folder := getattr(args, argument, None)) is not None:
            check_picture_folder(argument, folder)
    sources = [(argument, getattr(args, argument, None), kind) for argument, kind in SOURCES.items()]
    named = getattr(args, "out_of_distribution", ())
    sources += [("out_of_distribution", one.partition("=")[2], "dataset") for one in named]
    for argument, source, kind in sources:
        if source is not None and (reason := why_missing(source, kind)) is not None:
            raise ValueError(f"--{argument} {source!r} can't be loaded: {reason}.")


def check_picture_folder(argument: str, folder: str | os.PathLike) -> None:
    """Raise `ValueError` if a folder does not exist, or its path is empty, which would mean the working directory."""
    if not str(folder) or not os.path.isdir(folder):
        raise ValueError(f"--{argument} must be a folder of images, but {str(folder)!r} is not a folder.")


def why_missing(source: str, kind: str) -> str | None:
    """
    Return why a source can't be loaded, or `None` if it is a local path or a `kind` ("model" or "dataset") on the Hub. This takes a
    single request. The libraries that load sources would ask the Hub many times, and never say that the folder is missing.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{source.replace('/', '--')}"  # loads without the Hub
    if os.path.exists(source) or "://" in source or cached.is_dir():
        return None
    try:
        HfApi().repo_info(source, repo_type=kind, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        return None  # it exists, and the error on loading says how to get access
    except Exception as error:  # no valid id, no repository, or an error of the client's transport, whose class varies
        return f"there is no such folder, and no such {kind} on the Hub ({' '.join(str(error).split())})"
    return None


def launcher_id() -> int | None:
    """Return the process id of the launcher that started this process, or `None` if there is none."""
    try:
        import psutil
    except ImportError:
        return None  # nothing is launched without the extra `training`
    try:
        parent = psutil.Process().parent()
        # Started as `launcher ...`, `python launcher ...` or `python -m launcher ...`.
        started = [Path(part).name for part in parent.cmdline()[:3]] if parent is not None else []
    except psutil.Error:
        return None
    return parent.pid if LAUNCHERS.intersection(started) else None


def announce(message: str) -> str:
    """Return the last message of this process as one line. Under a launcher, also repeat it at the end of the launcher's output."""
    line = " ".join(message.split())
    if (launcher := launcher_id()) is not None:
        # In a new session, because a launcher ends the sessions of its processes.
        command = [sys.executable, __file__, str(launcher), line]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    return line


def fail(message: str) -> NoReturn:
    """End the process with one line on standard error: what went wrong, and what to do. Raises `SystemExit`."""
    sys.exit(announce(message))


def printable() -> None:
    """Make standard output escape characters that the locale can't encode, such as those of a file name."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage message."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, announce(f"{self.prog}: error: {message}") + "\n")


def repeat_after(launcher: int, line: str) -> None:
    """Wait until a launcher has ended, and print a line. Prints it once if several of the launcher's processes pass the same line."""
    import psutil

    if sys.platform == "linux":
        # An abstract socket: one process at a time can hold its name, which is free again when this process ends.
        only_one = socket.socket(socket.AF_UNIX)
        try:
            only_one.bind(f"\0{launcher} {hashlib.sha256(line.encode()).hexdigest()}")
        except OSError:
            return
    until = time.monotonic() + MAX_SECONDS
    try:
        process = psutil.Process(launcher)
        # A launcher that has ended stays a zombie until its parent asks, and the parent may wait for this very line.
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return
            time.sleep(0.002)
    except psutil.NoSuchProcess:
        pass
    # On a terminal, the shell has already printed its prompt on the current line.
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    repeat_after(int(sys.argv[1]), sys.argv[2])
