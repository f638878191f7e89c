#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What a fault in the energy model does to a run, with the guard and without: `python benchmarks/studies/fault_study.py`.

Trains the demo's EC-VAE on the digits, undisturbed and with a fault from iteration 600 on, and measures the Frechet
distance as the demo does. Faults: a gradient of the energy model that is not a number, once; its learning rate 1,000
times too high, for 50 iterations. Iterations are counted as they are run, those after a rollback too: a fault is over
when it has been lived through. Rows that STUDY/faults.jsonl holds already are not run again.
"""

import statistics
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.study import (
    Results,
    end_with_parent,
    load_data,
    open_results,
    parser,
    versions,
)
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.run.log import EVENTS_FILE, METRICS_FILE, read_metrics


FAULT_AT = 600
FAULTY_ITERATIONS = 50
RATE_FACTOR = 1000.0
# name -> (fault, arguments beside the demo's)
SETTINGS = {
    "undisturbed": (None, []),
    "gradient not a number, guard": ("nan", []),
    "rate 1,000 times too high, guard": ("rate", []),
    "gradient not a number, no guard": ("nan", ["--no-divergence_guard"]),
    "rate 1,000 times too high, no guard": ("rate", ["--no-divergence_guard"]),
}


def train_with_fault(fault: str | None, arguments: list[str]) -> None:
    """The training script with a fault in it, in this process."""
    import torch

    from ecvae_diffusers.training import train_ecvae
    from ecvae_diffusers.training.run import launch

    class FaultyTrainer(launch.Trainer):
        iteration = 0

        def train_step(self, batches):
            parameter = next(self.task.energy_model.parameters())
            hook = None
            if fault == "nan" and self.iteration == FAULT_AT:
                hook = parameter.register_hook(lambda gradient: gradient * torch.nan)
            if fault == "rate" and FAULT_AT <= self.iteration < FAULT_AT + FAULTY_ITERATIONS:
                for group in self.energy.optimizer.param_groups:
                    group["lr"] *= RATE_FACTOR  # the schedule sets it again after each step
            scalars = super().train_step(batches)
            if hook is not None:
                hook.remove()
            self.iteration += 1
            return scalars

    launch.Trainer = FaultyTrainer
    train_ecvae.run(train_ecvae.parse_args(arguments))


def make_row(data, name: str, seed: int, output_dir: Path, max_train_steps: int) -> dict:
    fault, extra = SETTINGS[name]
    folder = output_dir / f"{fault}{'-'.join(extra)}-{seed}"
    arguments = [
        *data.data_arguments, *data.arguments, "--output_dir", folder, "--overwrite_output_dir", "--seed", seed,
        "--max_train_steps", max_train_steps, *extra,
    ]  # fmt: skip
    command = [sys.executable, __file__, "--train", str(fault), *map(str, arguments)]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent)
    message = result.stderr.strip().splitlines()[-1] if result.returncode else ""
    events = read_metrics(folder / EVENTS_FILE) if (folder / EVENTS_FILE).is_file() else []
    row = {
        "last_step": read_metrics(folder / METRICS_FILE)[-1]["step"],
        "rollbacks": sum(event["kind"] == "rollback" for event in events),
        "first_alarm": next((event["message"] for event in events if event["kind"] == "rollback"), ""),
        "message": message,
        "frechet_distance": None,
    }
    if (folder / "model_index.json").is_file():
        row |= data.measure(sample_images(ECVAEPipeline.from_pretrained(folder), data.num_samples, seed=1))
    return row


def table(results: Results) -> str:
    lines = [
        "| setting | Frechet distance, each seed | median | over the undisturbed one of its seed | rollbacks |",
        "|---|---|---|---|---|",
    ]
    undisturbed = {row["seed"]: row["frechet_distance"] for row in results.of("undisturbed")}
    for name in SETTINGS:
        rows = results.of(name)
        if not rows:
            continue
        distances = [row["frechet_distance"] for row in rows]
        rollbacks = ", ".join(str(row["rollbacks"]) for row in rows)
        if None in distances:
            lines.append(f"| {name} | no model: {rows[0]['message']} | | | {rollbacks} |")
            continue
        ratios = ", ".join(
            f"{row['frechet_distance'] / undisturbed[row['seed']]:.2f}" for row in rows if row["seed"] in undisturbed
        )
        listed = ", ".join(f"{d:.1f}" for d in distances)
        lines.append(f"| {name} | {listed} | {statistics.median(distances):.1f} | {ratios} | {rollbacks} |")
    return "\n".join(lines)


def main() -> None:
    args = parser(__doc__, list(SETTINGS)).parse_args()
    results = open_results(args, "faults")
    if not args.table:
        data = load_data(args)
        print(f"{data.about}; {versions()}", flush=True)
        results.fill(
            args.settings,
            args.seeds,
            lambda name, seed: make_row(data, name, seed, args.output_dir, args.max_train_steps),
            args.max_train_steps,
        )
    print(table(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train_with_fault(sys.argv[2], sys.argv[3:])
    else:
        main()
