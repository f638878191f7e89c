# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Runs `examples/server.py` where torch can't be imported, and sends it requests from many threads."""

import contextlib
import http.client
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from without_package import PRELUDE


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "server.py"
RUN = f"""
import runpy
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
START_SECONDS = 120


@contextlib.contextmanager
def serving(folder: Path | str, log: Path) -> Iterator[tuple[str, int]]:
    """
    Serve the model of a folder on a free port, with what the server says in the file `log`. Yields its address and process id. Raises
    `RuntimeError` if it does not start, or ended by itself.
    """
    command = [sys.executable, "-c", PRELUDE.format(package="torch") + RUN, str(folder), "--port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        waits_until = time.monotonic() + START_SECONDS
        while not (found := re.search(r"running on http://([\d.]+:\d+)", log.read_text())):
            if process.poll() is not None or time.monotonic() > waits_until:
                raise RuntimeError(log.read_text()[-3000:])
            time.sleep(0.05)
        yield found[1], process.pid
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-3000:])
    finally:
        process.terminate()
        process.wait(60)


def fetch(address: str, paths: Sequence[str], num_threads: int) -> list[tuple[int, bytes] | None]:
    """Return the status and body of each path, asked for by threads with one connection each. `None` stands for a lost answer."""
    answers: list[tuple[int, bytes] | None] = [None] * len(paths)
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(paths)):
        todo.put(index)

    def work() -> None:
        connection = http.client.HTTPConnection(address, timeout=60)
        with contextlib.closing(connection), contextlib.suppress(queue.Empty):
            while True:
                index = todo.get_nowait()
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection.request("GET", paths[index])
                    response = connection.getresponse()
                    answers[index] = (response.status, response.read())

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers
