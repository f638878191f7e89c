#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Normalizing flows with and without calibration: `python benchmarks/flow_study.py --fashion_mnist DATASET --output_dir STUDY`.

A flow of Fashion-MNIST at `--resolution` is trained on likelihood alone (`--pretraining_steps`), then trained on, equal
iterations, without calibration and with it. Each row has the bits per dimension of 2,000 test images, and Frechet and
kernel distance (EfficientNet-Lite0's features) of 5,000 samples against 10,000 training images. `--plot PNG` draws one against
the other, `--picture PNG` samples. Rows that STUDY/flow_<resolution>.jsonl holds already are not made again.
"""

import argparse
import statistics
from pathlib import Path

import torch
from chain_study import run_folder
from command_line import picture_file, place, positive, positive_number, resolution, source, whole_number
from study import RememberedFeatures, Results, add_device, against, precision, reference, train, versions
from tqdm import tqdm

from ecvae_diffusers import ECFlowPipeline, FlowEC
from ecvae_diffusers.evaluation.pictures import draw_images, open_source
from ecvae_diffusers.metrics import lite0_features
from ecvae_diffusers.models import bits_per_dimension, dequantize
from ecvae_diffusers.training.data.digits import sample_images
from ecvae_diffusers.training.data.transforms import to_range
from ecvae_diffusers.training.run.folder import EVENTS_FILE, METRICS_FILE, image_grid, is_finished, read_metrics


NUM_REFERENCE, NUM_TEST, NUM_SAMPLES = 10_000, 2_000, 5_000
SCRIPT = Path(__file__).resolve().parents[1] / "training" / "train_flow.py"


def dual(value: float) -> list[str]:
    """lambda held at a value: a point of the trade-off between likelihood and samples."""
    return ["--initial_dual", str(value), "--max_dual", str(value), "--dual_learning_rate", "0"]


PLAIN = ["--calibration", "none"]
# What goes on from the flow that was trained on likelihood alone; None: that flow itself.
SETTINGS = {
    "as it was": None,
    "trained on": PLAIN,
    "calibrated": [],
    **{f"calibrated, lambda {value:g}": dual(value) for value in (10, 100, 200)},
    # An energy model at two scales, as the decoders' study has it, and one that learns four times as fast.
    "calibrated, two scales": ["--energy_num_scales", "2"],
    "calibrated, lambda 200, two scales": [*dual(200), "--energy_num_scales", "2"],
    "calibrated, energy's rate 2e-3": ["--energy_learning_rate", "2e-3"],
}
# What begins anew, for as many iterations in all, at likelihood's own rate (docs/flows.md: why it is not that of calibration).
FROM_THE_START = {"plain from the start": PLAIN, "calibrated from the start": []}


class FlowData:
    """Fashion-MNIST at a resolution, over EfficientNet-Lite0's features."""

    def __init__(self, folder: Path, dataset: str, size: int, device: torch.device):
        self.device = device
        self.name = f"flow_{size}"
        self.data_arguments = ["--dataset_name", dataset, "--image_column", "image"]
        levels, channels = ("2", [32, 64, 128]) if size <= 16 else ("3", [16, 32, 64, 128])
        self.size = ["--num_levels", levels, "--steps_per_level", "4", "--hidden_channels", "64"]
        self.arguments = [
            "--resolution", str(size), "--energy_block_out_channels", *map(str, channels), "--log_steps", "50",
            "--save_images_steps", "500", *precision(device),
        ]  # fmt: skip

        def images(split: str, count: int) -> torch.Tensor:
            source = open_source("fashion_mnist", dataset, split, None, None, None)
            return draw_images(source, count, size, 1, 0, True)

        self.test = images("test", NUM_TEST)
        features = lite0_features().to(device)
        remembered = RememberedFeatures(features, folder / "features")
        self.metrics = reference(remembered, images("train", NUM_REFERENCE))
        floor = against(self.metrics, images("test", NUM_SAMPLES))
        self.metrics.features = features
        self.about = (
            f"Fashion-MNIST at {size} px; {NUM_SAMPLES:,} test images are at Frechet distance "
            f"{floor['frechet_distance']:.1f}, kernel distance {floor['kernel_distance']:.4f}"
        )


@torch.no_grad()
def test_bits(flow: FlowEC, images: torch.Tensor) -> float:
    """Bits per dimension of held-out images, the same dequantization for every flow."""
    generator, bits = torch.Generator().manual_seed(0), []
    for part in tqdm(images.split(250), desc="Likelihood"):
        real = dequantize(to_range(part), torch.rand(part.shape, generator=generator)).to(flow.device)
        bits.append(bits_per_dimension(flow(real).log_prob, flow.num_latents))
    return torch.cat(bits).mean().item()


def measured_row(data: FlowData, folder: Path) -> dict:
    pipeline = ECFlowPipeline.from_pretrained(folder).to(data.device)
    row = against(data.metrics, sample_images(pipeline, NUM_SAMPLES, seed=1, batch_size=250))
    row["bits_per_dimension"] = test_bits(pipeline.flow.eval(), data.test)
    last = read_metrics(folder / METRICS_FILE)[-1]
    row |= {key: last[key] for key in ("training_seconds", "dual", "drift", "langevin_drift_step") if key in last}
    events = folder / EVENTS_FILE
    row["rollbacks"] = sum(event["kind"] == "rollback" for event in read_metrics(events)) if events.is_file() else 0
    return row


def table(results: Results) -> str:
    lines = [
        "| flow | bits per dimension | mean | Frechet distance | median | kernel distance | lambda | drift | rollbacks | s an iteration |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in [*SETTINGS, *FROM_THE_START]:
        rows = results.of(name)
        if not rows:
            continue

        def listed(key: str, form: str, rows: list[dict] = rows) -> str:
            return ", ".join(format(row[key], form) for row in rows if key in row)

        distance = statistics.median(row["frechet_distance"] for row in rows)
        seconds = statistics.median(row["training_seconds"] / row["iterations"] for row in rows)
        lines.append(
            f"| {name} | {listed('bits_per_dimension', '.3f')} | {statistics.mean(row['bits_per_dimension'] for row in rows):.3f} | "
            f"{listed('frechet_distance', '.1f')} | {distance:.1f} | {listed('kernel_distance', '.4f')} | {listed('dual', '.0f')} | "
            f"{listed('drift', '.4f')} | {listed('rollbacks', 'd')} | {seconds:.3f} |"
        )
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """The trade-off: a point a run, a colour a setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for name in [*SETTINGS, *FROM_THE_START]:
        rows = results.of(name)
        if rows:
            axis.plot([r["bits_per_dimension"] for r in rows], [r["frechet_distance"] for r in rows], "o", label=name)
    axis.set(xlabel="bits per dimension of test images", ylabel="Frechet distance of samples")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def picture(folders: list[Path], path: Path) -> None:
    """Samples of each flow, of the same latents: 8 x 8 a block, side by side."""
    blocks = []
    for folder in folders:
        images = sample_images(ECFlowPipeline.from_pretrained(folder), 64, seed=1, batch_size=64)
        blocks.append(to_range(images).unflatten(0, (8, 8)))
    image_grid(torch.cat(blocks, dim=1).flatten(0, 1), num_columns=8 * len(blocks)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SETTINGS, *FROM_THE_START]
    parser.add_argument("--fashion_mnist", type=source, metavar="DATASET", required=True, help="Hub id or folder")
    parser.add_argument("--output_dir", type=place, required=True)
    parser.add_argument("--resolution", type=resolution, default=16)
    parser.add_argument("--pretraining_steps", type=positive, default=1500, help="on likelihood alone")
    parser.add_argument("--max_train_steps", type=positive, default=1500, help="after those")
    parser.add_argument("--seeds", type=whole_number(0), nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and stop")
    parser.add_argument("--plot", type=picture_file, help="picture of the trade-off")
    parser.add_argument(
        "--picture", type=picture_file, help="samples of the same latents, first seed: a block a setting"
    )
    parser.add_argument(
        "--likelihood_rate", type=positive_number, default="1e-2",
        help="learning rate of what begins anew, with a cosine schedule; 1e-2 is quick at 16 px, at 32 px some runs blow up with it. Each its own --output_dir",
    )  # fmt: skip
    add_device(parser)
    args = parser.parse_args()
    likelihood_rate = ["--learning_rate", args.likelihood_rate, "--lr_scheduler", "cosine"]
    results = Results(args.output_dir / f"flow_{args.resolution}.jsonl", NUM_SAMPLES)
    folders = [run_folder(args.output_dir, f"flow_{args.resolution}", name, args.seeds[0]) for name in args.settings]
    if args.table and args.plot is not None and not results.rows():
        parser.error(f"--plot needs rows, but there are none in {results.path}.")
    if not args.table:
        data = FlowData(args.output_dir, args.fashion_mnist, args.resolution, args.device)
        print(f"{data.about}; arguments {' '.join(data.arguments)}; {versions()}", flush=True)

        def make(name: str, seed: int) -> dict:
            folder = run_folder(args.output_dir, data.name, name, seed)
            if name in FROM_THE_START:
                steps = "--pretraining_steps + --max_train_steps"
                own = [*data.size, *FROM_THE_START[name], *likelihood_rate]
                train(data, folder, seed, iterations[name], *own, script=SCRIPT, steps=steps)
                return measured_row(data, folder)
            start = run_folder(args.output_dir, data.name, "as it was", seed)
            own = [*data.size, *PLAIN, *likelihood_rate]
            train(data, start, seed, args.pretraining_steps, *own, script=SCRIPT, steps="--pretraining_steps")
            if SETTINGS[name] is not None:
                own = ["--pretrained_model_name_or_path", str(start), *SETTINGS[name]]
                train(data, folder, seed, args.max_train_steps, *own, script=SCRIPT)
            return measured_row(data, folder)

        iterations = dict.fromkeys(SETTINGS, args.max_train_steps)
        iterations |= dict.fromkeys(FROM_THE_START, args.pretraining_steps + args.max_train_steps)
        iterations["as it was"] = args.pretraining_steps
        common = [*data.size, *data.arguments]
        pretraining = ["--pretraining_steps", str(args.pretraining_steps), *PLAIN, *likelihood_rate]
        arguments = {name: [*common, *pretraining, *(SETTINGS[name] or [])] for name in SETTINGS}
        arguments |= {name: [*common, *FROM_THE_START[name], *likelihood_rate] for name in FROM_THE_START}
        results.fill(args.settings, args.seeds, make, iterations, arguments)
    print(table(results))
    if args.plot is not None:
        plot(results, args.plot)
    if args.picture is not None:
        if missing := [folder.name for folder in folders if not is_finished(folder)]:
            parser.error(f"--picture needs the flows of --settings, but there is no {', '.join(missing)}.")
        picture(folders, args.picture)


if __name__ == "__main__":
    main()
