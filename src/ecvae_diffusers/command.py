"""What the command lines of all scripts share: folders and Hub ids, and a last line that says why a script has ended.

`accelerate launch` and `torchrun` print a traceback, of which process failed, below what that process has printed. Under one
of them, a process of a few lines, this file as a script, waits for its end and repeats the line below that.
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
# A launcher that takes longer, such as one that starts its processes again, has other news by then.
MAX_SECONDS = 60
# Arguments of all scripts that must be folders of pictures.
PICTURE_FOLDERS = ("train_data_dir", "test_data_dir", "generated_image_dir", "image_dir")
# Arguments of all scripts that are folders or Hub ids, with the kind of repository.
SOURCES = {"pretrained_model_name_or_path": "model", "baseline": "model", "dataset_name": "dataset"}
HUB_TIMEOUT = 10.0  # seconds


def place(text: str) -> str:
    """Read a folder, a file or a Hub id of the command line, and expand a leading `~`: the `type` of such an argument."""
    expanded = os.path.expanduser(text)
    if not text.strip() or expanded.startswith("~"):
        raise argparse.ArgumentTypeError(f"must be a place, but is {text!r}")
    return expanded


def local_path(text: str) -> Path:
    """Read a folder or file of the command line, as [`place`] does."""
    return Path(place(text))


def named_place(text: str) -> str:
    """Read `NAME=PLACE` of the command line, the place as [`place`] does. Text without `=` is returned as it is."""
    name, equals, source = text.partition("=")
    return f"{name}={place(source)}" if equals else text


def device_name(text: str) -> str:
    """Read the name of a device of the command line, and refuse one on which nothing can be computed, here and now."""
    import torch

    try:
        torch.zeros(1, device=torch.device(text))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, but is {text}: {reason}") from error
    return text


def name_as_text(source: str) -> str:
    """Return a Hub id, or the name of a folder without its path, which is this machine's, and with escapes for what is no UTF-8."""
    if not os.path.exists(source):
        return source
    return os.fsencode(Path(source).resolve().name).decode("utf-8", "backslashreplace")


def check_places(args: argparse.Namespace) -> None:
    """
    Check that the folders and Hub ids of a command line exist, before anything is loaded. Raises `ValueError`, naming the argument,
    if a folder of pictures does not exist, or a source is neither a local path nor on the Hub.
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
    """Raise `ValueError` if there is no such folder. Empty text would be the working directory, and is refused."""
    if not str(folder) or not os.path.isdir(folder):
        raise ValueError(f"--{argument} must be a folder of images, but {str(folder)!r} is not a folder.")


def why_missing(source: str, kind: str) -> str | None:
    """
    Say why nothing can be loaded from a source that is neither a local path nor, by a single request, a `kind` ("model" or
    "dataset") on the Hub; `None` if there is something to load. The libraries that load it ask the Hub many times, with pauses,
    and never say that there is no such folder.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError

    cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{source.replace('/', '--')}"  # loads without the Hub
    if os.path.exists(source) or "://" in source or cached.is_dir():
        return None
    try:
        HfApi().repo_info(source, repo_type=kind, timeout=HUB_TIMEOUT)
    except GatedRepoError:
        return None  # it exists: loading it says how to get access
    except Exception as error:  # no id, no repository, or of the client's transport, which changes between releases
        return f"there is no such folder, and the Hub gives no such {kind} ({' '.join(str(error).split())})"
    return None


def launcher_id() -> int | None:
    """Return the id of the launcher that waits for this process, or `None` if it was started by anything else."""
    try:
        import psutil
    except ImportError:
        return None  # without the extra `training` nothing is launched
    try:
        parent = psutil.Process().parent()
        # As `launcher ...`, `python launcher ...` or `python -m launcher ...`.
        started = [Path(part).name for part in parent.cmdline()[:3]] if parent is not None else []
    except psutil.Error:
        return None
    return parent.pid if LAUNCHERS.intersection(started) else None


def announce(message: str) -> str:
    """Return a message, with which this process is about to end, as one line, and have a launcher's output end with it."""
    line = " ".join(message.split())
    if (launcher := launcher_id()) is not None:
        # In a new session: a launcher ends those of its processes.
        command = [sys.executable, __file__, str(launcher), line]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    return line


def fail(message: str) -> NoReturn:
    """End the process with one line on standard error: what went wrong, and what to do. Raises `SystemExit`."""
    sys.exit(announce(message))


def printable() -> None:
    """Let standard output show letters that the locale does not have, such as those of a file name, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of a hundred arguments above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, announce(f"{self.prog}: error: {message}") + "\n")


def repeat_after(launcher: int, line: str) -> None:
    """Wait until a launcher has ended, and print a line, once if several of its processes end with the same one."""
    import psutil

    if sys.platform == "linux":
        # A name without a file, which is free again when this process ends.
        only_one = socket.socket(socket.AF_UNIX)
        try:
            only_one.bind(f"\0{launcher} {hashlib.sha256(line.encode()).hexdigest()}")
        except OSError:
            return
    until = time.monotonic() + MAX_SECONDS
    try:
        process = psutil.Process(launcher)
        # One that has ended stays a zombie for as long as its parent does not ask, which may wait for this very line.
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return
            time.sleep(0.002)
    except psutil.NoSuchProcess:
        pass
    # On a terminal the shell's prompt stands there by now.
    print(f"\n{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    repeat_after(int(sys.argv[1]), sys.argv[2])
