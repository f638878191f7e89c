#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What our fast arrangement of a training step does to quality: `python benchmarks/arrangement_study.py --output_dir STUDY`.

The arrangements of training_step.py, published and ours in fp32 and bf16, train the demo's networks on digits for equally
many iterations, with the same chain, rates, dual step and average; the distance is that of chain_study.py. `--settings` also
takes "published + single chain", one change alone, and "ours in fp32 - single chain", all but one.
"""

import time
from dataclasses import replace
from pathlib import Path

import torch
from study import (
    Results,
    epochs,
    load_data,
    median,
    open_results,
    parser,
    versions,
)
from tqdm import tqdm
from training_step import CHANGES, GPU_CHANGES, Arrangement, Iteration

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.tasks.networks import moving_average


OURS = {name: True for name in CHANGES if name not in GPU_CHANGES}
WHOLE = {
    "published arrangement": Arrangement(),
    "ours in fp32": Arrangement(**{**OURS, "bf16": False}),
    "ours in bf16": Arrangement(**OURS),
}
# One change to the first, and all but one: which of them it is that changes quality.
SETTINGS = WHOLE | {f"published + {name.replace('_', ' ')}": Arrangement(**{name: True}) for name in OURS}
SETTINGS |= {
    f"{whole} - {name.replace('_', ' ')}": replace(WHOLE[whole], **{name: False})
    for whole in ("ours in fp32", "ours in bf16")
    for name in OURS
}
NUM_STEPS, BATCH = 5, 64


def train(data, name: str, seed: int, folder: Path, max_train_steps: int) -> None:
    """Train the networks in an arrangement, and save the pipeline of the average with its seconds; once."""
    if (folder / "model_index.json").is_file():
        return
    torch.manual_seed(seed)
    sizes = {"sample_size": data.resolution, "in_channels": 1, "block_out_channels": data.channels}
    iteration = Iteration(
        SETTINGS[name],
        sizes,
        NUM_STEPS,
        weight=0.0,
        device=torch.device("cpu"),
        latent_channels=data.latent_channels,
        learning_rate=data.learning_rate,
        adapts_drift=True,
    )
    average = moving_average(iteration.vae, 0.999)
    started = time.perf_counter()
    batches = epochs(data.train, BATCH)
    for _ in tqdm(range(max_train_steps), desc=name, mininterval=5):
        iteration.step(next(batches))
        average.update_parameters(iteration.vae)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seconds").write_text(f"{time.perf_counter() - started:.1f}", encoding="utf-8")
    ECVAEPipeline(vae=average.module.eval(), energy_model=None, scheduler=None).save_pretrained(folder)


def make_row(data, name: str, seed: int, args) -> dict:
    folder = args.output_dir / f"{name.replace(' ', '-')}_{seed}_{args.max_train_steps}"
    train(data, name, seed, folder, args.max_train_steps)
    measures = data.measure(sample_images(ECVAEPipeline.from_pretrained(folder), data.num_samples, seed=1))
    return {**measures, "training_seconds": float((folder / "seconds").read_text(encoding="utf-8"))}


def table(results: Results) -> str:
    lines = ["| arrangement | Frechet distance, each seed | median | over the published one's | training, s |"]
    lines.append("|---|---|---|---|---|")
    slow = results.of("published arrangement")
    for name in SETTINGS:
        rows = results.of(name)
        if rows and slow:
            middle = median(rows, "frechet_distance")
            lines.append(
                f"| {name} | {', '.join(str(round(row['frechet_distance'], 1)) for row in rows)} | {middle:.1f} | "
                f"{middle / median(slow, 'frechet_distance'):.2f} | {median(rows, 'training_seconds'):.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    made = parser(__doc__, list(SETTINGS))
    made.set_defaults(settings=list(WHOLE))
    args = made.parse_args()
    results = open_results(args, "arrangements")
    if not args.table:
        data = load_data(args)
        print(f"{data.about}; K {NUM_STEPS}; {versions()}", flush=True)
        results.fill(
            args.settings,
            args.seeds,
            lambda name, seed: make_row(data, name, seed, args),
            args.max_train_steps,
        )
    print(table(results))


if __name__ == "__main__":
    main()
