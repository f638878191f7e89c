#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train from another set and another size: `python benchmarks/studies/transfer_study.py --source A --target B --output_dir STUDY`.

A model of the images of `--source` at 16 px is trained first. Then models of the images of `--target` at 32 px are trained from
scratch, from that model, and from it with the two coarsest blocks of the energy model frozen. While training, 2,000 samples are
measured against the training images, over EfficientNet-Lite0's features. The table has these distances, and the iterations after
which a run is as near as the one from scratch at its end. Finished runs are not trained again.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import study
from common.machine import machine
from common.results import table


SETTINGS = {"from scratch": [], "from the other model": [], "two blocks frozen": ["--freeze_energy_blocks", "2"]}
SCRATCH = "from scratch"


def arguments(args: argparse.Namespace, resolution: int, channels: list[int]) -> list[str]:
    return [
        "--resolution", str(resolution), "--in_channels", "3", "--langevin_steps", "1", "--train_batch_size", "32",
        "--learning_rate", "1e-3", "--energy_learning_rate", "1e-3", "--latent_channels", "64", "--log_steps", "50",
        "--block_out_channels", *map(str, channels), "--save_images_steps", "500", *study.precision(args.device),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="DATASET", help="Hub id or folder: images of another style")
    parser.add_argument("--target", required=True, metavar="DATASET", help="Hub id or folder: images to learn")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_train_steps", type=int, default=2000)
    parser.add_argument("--source_steps", type=int, default=3000)
    parser.add_argument("--evaluation_steps", type=int, default=250)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    study.add_device(parser)
    args = parser.parse_args()
    print(machine(args.device), flush=True)
    source = SimpleNamespace(
        data_arguments=["--dataset_name", args.source], arguments=arguments(args, 16, [16, 32, 64])
    )
    measured = [
        "--evaluation_steps",
        str(args.evaluation_steps),
        "--evaluation_features",
        "lite0",
        "--evaluation_samples",
        "2000",
    ]
    target = SimpleNamespace(
        data_arguments=["--dataset_name", args.target], arguments=[*arguments(args, 32, [16, 16, 32, 64]), *measured]
    )
    for seed in args.seeds:
        start, rows, curves = args.output_dir / f"source_{seed}", [], {}
        study.train(source, start, seed, args.source_steps)
        for name, own in SETTINGS.items():
            folder = study.run_folder(args.output_dir, "target", name, seed)
            given = [] if name == SCRATCH else ["--pretrained_model_name_or_path", str(start), *own]
            study.train(target, folder, seed, args.max_train_steps, *given)
            lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
            curves[name] = {line["step"]: line["frechet_distance"] for line in lines}
            goal = min(curves[SCRATCH].values())
            reached = next((step for step, distance in curves[name].items() if distance <= goal), None)
            rows.append(
                [name, str(seed), *(f"{distance:.0f}" for distance in curves[name].values()), str(reached or "")]
            )
        print(table(["start", "seed", *map(str, curves[SCRATCH]), "as near as from scratch"], rows), flush=True)


if __name__ == "__main__":
    main()
