#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Speed of the page of `ecvae page` in headless Chromium, against torch: `python benchmarks/speed/page.py PAGE MODEL [PAGE MODEL ...]`.

PAGE is a folder that `ecvae page MODEL --vendor` wrote. The page is opened with one thread and, by the headers of a Space, with
several. The median time of a decode of one image is that of `ecvae.decode` in the page and of the pipeline's decoder in torch,
in turns, `--rounds` of 20 each; the ratio is the median of the ratios within a round. Frames a second are those that the page
counts while its walk plays.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from chromium import ISOLATED, Chromium, serving

from common.machine import machine
from common.results import table
from ecvae_diffusers import ECVAEPipeline


DECODES = 20
IN_PAGE = f"""(async () => {{
  const times = [];
  for (let i = 0; i < {DECODES}; i++) {{
    const start = performance.now();
    await ecvae.decode([ecvae.state.latents]);
    times.push(performance.now() - start);
  }}
  return times.sort((a, b) => a - b)[times.length >> 1];
}})()"""


def decode_in_torch(pipeline: ECVAEPipeline) -> float:
    """Return the median time of a decode of one image, in milliseconds."""
    latents = torch.randn(1, pipeline.vae.config.latent_channels, 1, 1)
    times = []
    with torch.inference_mode():
        for _ in range(DECODES):
            started = time.perf_counter()
            pipeline.vae.decode(latents)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def measure(page: Path, model: str, isolated: bool, rounds: int) -> list[str]:
    pipeline = ECVAEPipeline.from_pretrained(model)
    with (
        tempfile.TemporaryDirectory() as profile,
        serving(page, ISOLATED if isolated else {}) as address,
        Chromium(Path(profile)) as browser,
    ):
        browser.open(address)
        browser.wait("document.querySelector('#status').textContent.startsWith('Ready')")
        threads = min(4, os.cpu_count() or 1) if isolated else 1
        torch.set_num_threads(threads)
        pairs = [(browser.evaluate(IN_PAGE), decode_in_torch(pipeline)) for _ in range(rounds)]
        browser.press("w")
        frames = []
        for _ in range(5):
            browser.rest(1)
            frames.append(int(browser.evaluate("document.querySelector('#frames').textContent").split()[0]))
    own, other = (statistics.median(one) for one in zip(*pairs))
    ratio = statistics.median(a / b for a, b in pairs)
    return [page.name, str(threads), f"{statistics.median(frames)}", f"{own:.1f}", f"{other:.1f}", f"{ratio:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="+", metavar="PAGE MODEL", help="folders of pages, each with that of its model"
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    pairs = list(zip(args.folders[::2], args.folders[1::2], strict=True))
    print(machine("cpu"))
    columns = ["page", "threads", "frames a second", "decode in the page, ms", "decode in torch, ms", "page / torch"]
    print(table(columns, []), flush=True)
    for page, model in pairs:
        for isolated in (False, True):
            print(f"| {' | '.join(measure(Path(page), model, isolated, args.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
