#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""How many samples a distance on digits needs: `python benchmarks/sample_size.py --output_dir STUDY --model PIPELINE`.

The Frechet distance of sets of other samples from one model, and of training digits drawn with replacement, whose distance would be 0
if it were of infinitely many.
"""

import argparse

import torch
from command_line import place, source
from study import Digits

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training.data.digits import sample_images


# Samples a set, and sets.
SETS = {5_000: 8, 20_000: 4, 50_000: 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=place, required=True)
    parser.add_argument("--model", type=source, required=True, help="pipeline's folder or Hub id")
    args = parser.parse_args()
    try:
        pipeline = ECVAEPipeline.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model!r} can't be loaded: {error}")
    data = Digits(args.output_dir)
    samples = sample_images(pipeline, max(size * count for size, count in SETS.items()), seed=1)
    drawn = data.train[torch.randint(len(data.train), (len(samples),), generator=torch.Generator().manual_seed(0))]
    print("| samples | the model's sets | sets of training digits |\n|---|---|---|")
    for size, count in SETS.items():
        cells = [
            ", ".join(f"{data.measure(part)['frechet_distance']:.1f}" for part in images.split(size)[:count])
            for images in (samples, drawn)
        ]
        print(f"| {size:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
