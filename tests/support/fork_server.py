"""Scripts in processes that are forked from one in which their imports are done, which takes seconds anew each time.

A script's process is its own as with `subprocess.run`: arguments, environment, working folder, streams and exit code. So are
several ranks, with the variables that `torchrun` gives them.
What a library reads from the environment while it is imported can't be changed afterwards, so each environment has a server.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import PIL.Image


# What the scripts import, at their top or later.
PRELOADED = (
    "torch._dynamo", "torch._inductor", "accelerate", "datasets", "diffusers.optimization", "ecvae_diffusers",
    "ecvae_diffusers.training.train_ecvae", "ecvae_diffusers.training.train_flow", "ecvae_diffusers.training.calibrate_decoder",
    "ecvae_diffusers.evaluation.summary", "ecvae_diffusers.evaluation.restoration", "ecvae_diffusers.hub.publish",
    "ecvae_diffusers.report.page",
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
    script: Path | str, *arguments, ranks: int = 1, environment: dict[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess:
    """
    Run a script to its end, as `subprocess.run([python, script, *arguments], capture_output=True, text=True)` does.

    Args:
        ranks: Number of processes. Their output is one.
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
        request = {"command": command, "output": folder, "cwd": os.getcwd(), "ranks": variables_of_ranks(ranks)}
        print(json.dumps(request), file=server.stdin, flush=True)
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


def variables_of_ranks(count: int) -> list[dict[str, str]]:
    """For each process the variables of the environment by which `torch.distributed` finds the others; none for a single one."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def become(variables: dict[str, str], command: list[str], output: str, cwd: str) -> None:
    """Be the process of a script, from here to its end."""
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, stream in (("stdout", 1), ("stderr", 2)):
        file = os.open(os.path.join(output, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


def wait_for(children: list[int]) -> int:
    """Wait until all have ended, and return the first exit code that is not 0, after which the others are ended."""
    left, found = set(children), 0
    while left:
        child, status = os.wait()
        left.discard(child)
        if (code := os.waitstatus_to_exitcode(status)) != 0 and found == 0:
            found = code
            for other in left:
                os.kill(other, signal.SIGTERM)
    return found


def serve() -> None:
    """Fork the processes of each line of standard input, and answer with the exit code."""
    for name in PRELOADED:
        importlib.import_module(name)
    PIL.Image.init()
    # What is there already is no business of the children's garbage collector.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for variables in request.pop("ranks"):
            children.append(os.fork())
            if children[-1] == 0:
                return become(variables, **request)
        print(wait_for(children), flush=True)


if __name__ == "__main__":
    serve()
