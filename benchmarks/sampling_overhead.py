#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the pipeline costs beyond its decoder: `python benchmarks/sampling_overhead.py`.

`ECVAEPipeline` and the bare `vae.decode` are called alternately in one process; the ratio of their times is taken pair
by pair, and its median reported.
"""

import argparse
import statistics
import time

import diffusers
import torch

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--pairs", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    vaes = {
        "demo, 16 px": AutoencoderEC(
            sample_size=16, in_channels=1, latent_channels=32, block_out_channels=(16, 32, 64)
        ),
        "defaults, 32 px": AutoencoderEC(),
    }
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    print("| decoder | batch | output | decode, ms | pipeline, ms | pipeline / decode |\n|---|---|---|---|---|---|")
    for name, vae in vaes.items():
        vae.eval()
        pipeline = ECVAEPipeline(vae=vae)
        for batch_size in args.batch_sizes:
            latents = torch.randn(batch_size, vae.config.latent_channels, 1, 1)
            for output_type in ("pt", "pil"):

                def decode():
                    with torch.no_grad():
                        vae.decode(latents)

                def sample():
                    pipeline(batch_size=batch_size, output_type=output_type)

                times = {decode: [], sample: []}
                for repeat in range(args.pairs + 3):
                    for call in (decode, sample) if repeat % 2 else (sample, decode):
                        started = time.perf_counter()
                        call()
                        if repeat >= 3:  # the first three warm up
                            times[call].append(time.perf_counter() - started)
                ratio = statistics.median(b / a for a, b in zip(times[decode], times[sample]))
                decode_ms, sample_ms = (statistics.median(times[call]) * 1e3 for call in (decode, sample))
                print(
                    f"| {name} | {batch_size} | {output_type} | {decode_ms:.2f} | {sample_ms:.2f} | {ratio:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
