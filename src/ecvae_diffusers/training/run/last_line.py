"""How a script that can't continue ends: one line that names the reason, the last one that a person sees.

`accelerate launch` and `torchrun` print a traceback, of which process failed, below what that process has printed. Under one
of them, a process of a few lines waits for its end and repeats the line below that.
"""

import argparse
import hashlib
import io
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn


LAUNCHERS = {"accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run"}
# A launcher that takes longer, such as one that starts its processes again, has other news by then.
MAX_SECONDS = 60


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


def announce(line: str) -> None:
    """Have a line that this process is about to end with repeated below what its launcher prints, if it has one."""
    if (launcher := launcher_id()) is not None:
        # In a new session: a launcher ends those of its processes.
        command = [sys.executable, __file__, str(launcher), line]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


def fail(message: str) -> NoReturn:
    """
    End the process with one line on standard error.

    Args:
        message (`str`): What went wrong, and what to do. Line breaks, as in errors of other libraries, become spaces.

    Raises:
        SystemExit: always, with the line.
    """
    line = " ".join(message.split())
    announce(line)
    sys.exit(line)


def printable() -> None:
    """Let standard output show letters that the locale does not have, such as those of a file name, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of a hundred arguments above it."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(f"{self.prog}: error: {message}".split())
        announce(line)
        self.exit(2, f"{line}\n")


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
