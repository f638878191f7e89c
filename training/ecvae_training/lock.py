"""One process at a time in an output folder."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecvae_diffusers.atomic import writing


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def locked(output_dir: str | os.PathLike) -> Iterator[None]:
    """
    Hold `--output_dir`, which is made if it is not there, for this process. The lock ends with the process, however that ends, and
    is seen by other machines that share the folder. If nothing else was written, nothing is left.

    Raises:
        ValueError: if another process holds it, or it is a file.
        WriteError: if it can't be written.
    """
    output_dir = Path(output_dir)
    path, is_new = output_dir / LOCK_FILE, not output_dir.exists()
    if not is_new and not output_dir.is_dir():
        raise ValueError(f"--output_dir must be a folder, but {str(output_dir)!r} is a file.")
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        file = open_locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if is_new:
            with suppress(OSError):  # it holds something by now
                output_dir.rmdir()


def open_locked(path: Path):
    """The open lock file, which says who holds it. Raises `ValueError` if another process does."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            # Of the process, unlike that of `flock`, which a worker that outlives it would keep.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                logger.warning(
                    f"{str(path.parent)!r} lies on a file system without locks: see to it that no other run writes there."
                )
                return file
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise ValueError(
                f"--output_dir {str(path.parent)!r} is in use by another run ({holder or 'which has just begun'}): wait for it, stop "
                "it, or choose another folder."
            ) from None
        # The one before may have removed it since it was opened.
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()
