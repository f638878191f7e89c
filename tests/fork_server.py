"""Scripts in processes that are forked from one in which their imports are done, which takes seconds anew each time.

A script's process is its own as with `subprocess.run`: arguments, environment, working folder, streams and exit code.
What a library reads from the environment while it is imported can't be changed afterwards, so each environment has a server.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image


TRAINING = Path(__file__).resolve().parents[1] / "training"
# What the scripts import, at their top or later.
PRELOADED = (
    "torch._dynamo", "torch._inductor", "accelerate", "datasets", "diffusers.optimization", "ecvae_diffusers", "train_ecvae",
    "train_flow", "calibrate_decoder", "evaluate", "evaluate_restoration", "publish", "report",
)  # fmt: skip
servers: dict[frozenset, subprocess.Popen] = {}


def server_for(environment: dict[str, str]) -> subprocess.Popen:
    """The server of an environment, started the first time."""
    key = frozenset(environment.items())
    if key not in servers or servers[key].poll() is not None:
        servers[key] = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        atexit.register(servers[key].stdin.close)
    return servers[key]


def run(
    script: Path | str, *arguments, environment: dict[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess:
    """
    Run a script to its end, as `subprocess.run([python, script, *arguments], capture_output=True, text=True)` does.

    Args:
        environment: The whole environment; by default that of this process, with one thread and without the Hub.
        timeout: Seconds. The limit is for what hangs: a busy machine takes several times what an idle one does.

    Raises:
        subprocess.TimeoutExpired: if it takes longer; it is killed, with its server.
    """
    environment = {**(environment or {**os.environ, "HF_HUB_OFFLINE": "1"}), "OMP_NUM_THREADS": "1"}
    # pytest sets it anew for each test.
    environment.pop("PYTEST_CURRENT_TEST", None)
    server = server_for(environment)
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"command": command, "folder": folder, "cwd": os.getcwd()}), file=server.stdin, flush=True)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(int(timeout))
        try:
            answer = server.stdout.readline()
        except KeyboardInterrupt:
            os.killpg(server.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(command, timeout) from None
        finally:
            signal.alarm(0)
        stdout, stderr = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([sys.executable, *command], int(answer), stdout, stderr)


def become(command: list[str], folder: str, cwd: str) -> None:
    """Be the process of a script, from here to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        file = os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


def serve() -> None:
    """Fork a process for each line of standard input, and answer with its exit code."""
    sys.path.insert(1, str(TRAINING))
    for name in PRELOADED:
        importlib.import_module(name)
    PIL.Image.init()
    # What is there already is no business of the children's garbage collector.
    gc.freeze()
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
