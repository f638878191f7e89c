#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Load the example server on loopback, against torch: `python benchmarks/speed/server.py model_cards/digits`.

The model is exported, and `examples/server.py` serves it. In each round, 32 threads send it 1,000 requests, and then one thread of torch
draws 200 images by `ECVAEPipeline` at batch size 1. Each picture is compared with that of `OnnxECVAEPipeline.sample` for its seed. The
server's time includes HTTP, PNG files and, on the same machine, the clients; that of torch ends with a PIL image.

Images per second are medians over rounds, and "server / torch" is the median of the ratios within a round. CPU time is that of the
process, the server's or that of torch. Memory is the resident memory of the server after the first and the last round, and of this process
around 10,000 calls of `OnnxECVAEPipeline.sample`.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import psutil
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from example_server import fetch, serving

from common.machine import machine
from common.results import table
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.onnx import OnnxECVAEPipeline
from ecvae_diffusers.onnx.export import export_onnx


THREADS, REQUESTS, DRAWN_BY_TORCH, WARM_UP = 32, 1000, 200, 100


def cpu_seconds(process: psutil.Process) -> float:
    used = process.cpu_times()
    return used.user + used.system


def mebibytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def draw_by_torch(pipeline: ECVAEPipeline, count: int) -> None:
    for seed in range(count):
        pipeline(generator=torch.Generator().manual_seed(seed))


def differences(answers: list[tuple[int, bytes] | None], expected: np.ndarray) -> np.ndarray:
    """Return the largest difference of each answered picture from that of its seed, in levels of 256."""
    found = [
        np.abs(np.asarray(PIL.Image.open(io.BytesIO(answer[1]))).astype(int) - image).max()
        for answer, image in zip(answers, expected)
        if answer is not None and answer[0] == 200
    ]
    return np.array(found)


def load(pipeline: ECVAEPipeline, onnx: OnnxECVAEPipeline, folder: Path, rounds: int) -> tuple[list[str], list[str]]:
    """Return the cells of load, and those of the server's memory."""
    paths = [f"/sample?seed={seed}" for seed in range(REQUESTS)]
    expected = np.concatenate([onnx.sample(1, np.random.default_rng(seed)) for seed in range(REQUESTS)])
    expected = expected.squeeze(-1) if expected.shape[-1] == 1 else expected
    own, wrong, lost, memory, rows = psutil.Process(), 0, 0, [], []
    with serving(folder, folder.parent / "log.txt") as (address, number):
        server = psutil.Process(number)
        fetch(address, paths[:WARM_UP], THREADS)
        draw_by_torch(pipeline, WARM_UP)
        for _ in range(rounds):
            before, started = cpu_seconds(server), time.perf_counter()
            answers = fetch(address, paths, THREADS)
            served = REQUESTS / (time.perf_counter() - started)
            cpu = (cpu_seconds(server) - before) / REQUESTS
            before, started = cpu_seconds(own), time.perf_counter()
            draw_by_torch(pipeline, DRAWN_BY_TORCH)
            drawn = DRAWN_BY_TORCH / (time.perf_counter() - started)
            rows.append(
                (served, drawn, served / drawn, 1000 * cpu, 1000 * (cpu_seconds(own) - before) / DRAWN_BY_TORCH)
            )
            found = differences(answers, expected)
            lost, wrong = lost + REQUESTS - len(found), wrong + int((found > 0).sum())
            memory.append(mebibytes(server))
    served, drawn, ratio, cpu, cpu_of_torch = map(statistics.median, zip(*rows))
    total = f"{rounds * REQUESTS}"
    speed = [f"{served:.0f}", f"{drawn:.0f}", f"{ratio:.2f}", f"{cpu:.2f}", f"{cpu_of_torch:.2f}"]
    return [total, str(lost), str(wrong), *speed], ["server", total, f"{memory[0]:.1f}", f"{memory[-1]:.1f}"]


def call(onnx: OnnxECVAEPipeline, calls: int) -> list[str]:
    """Return the cells of the memory of this process, a tenth of the calls before the first figure."""
    memory = []
    for seed in range(calls + 1):
        if seed in (calls // 10, calls):
            memory.append(f"{mebibytes(psutil.Process()):.1f}")
        onnx.sample(1, np.random.default_rng(seed))
    return ["OnnxECVAEPipeline", str(calls), *memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an ECVAEPipeline")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine("cpu"), flush=True)
    pipeline = ECVAEPipeline.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "onnx"
        export_onnx(pipeline, folder)
        onnx = OnnxECVAEPipeline(folder)
        cells, memory = load(pipeline, onnx, folder, args.rounds)
        columns = ["requests", "lost", "not that of the seed", "server, images/s", "torch, images/s", "server / torch"]
        columns += ["CPU ms per image, server", "CPU ms per image, torch"]
        print(table(columns, [cells]), flush=True)
        columns = ["what", "calls", "MiB after first calls", "MiB after all"]
        print(table(columns, [memory, call(onnx, args.calls)]))


if __name__ == "__main__":
    main()
