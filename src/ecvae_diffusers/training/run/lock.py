"""One process at a time in an output folder."""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ecvae_diffusers.atomic import writing


try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def locked(output_dir: str | os.PathLike) -> Iterator[None]:
    """
    Hold `--output_dir`, which is made if it is not there, for this process. The lock ends with the process, however that ends, and
    is seen by other machines that share the folder.
    Windows has no such lock, which is warned of. If nothing else was written, nothing is left.

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
        if fcntl is None:
            file.close()
        path.unlink(missing_ok=True)
        file.close()
        if is_new:
            with suppress(OSError):  # it holds something by now
                output_dir.rmdir()


@contextmanager
def locked_by_main(accelerator: Accelerator, output_dir: str | os.PathLike) -> Iterator[None]:
    """`locked` in the main process. All processes wait for it, and raise what it raises."""
    with ExitStack() as stack:
        failure = [None]
        if accelerator.is_main_process:
            try:
                stack.enter_context(locked(output_dir))
            except (ValueError, OSError) as error:
                failure = [error]
        broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        yield


def open_locked(path: Path):
    """The open lock file, which says who holds it. Raises `ValueError` if another process does."""
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
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
