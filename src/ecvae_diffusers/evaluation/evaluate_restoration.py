# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Degrade a folder of clean images, restore them and measure the answers: `ecvae evaluate-restoration --help`.

Writes `restoration.json` (every measure with its protocol), `restoration.md` (a table) and one picture per noise level,
with the columns clean | measured | A^+ y (A_s y with noise) | restored | uncertainty. Use images that the model was not
trained on.
"""

import argparse
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecvae_diffusers.atomic import write_json, write_text
from ecvae_diffusers.command import ArgumentParser, check_places, place, printable
from ecvae_diffusers.commands import number, run_or_fail
from ecvae_diffusers.training.command_line import HelpFormatter


if TYPE_CHECKING:
    from ecvae_diffusers.training.data.images import CheckedPictures


TASKS = (
    "box_inpainting", "random_inpainting", "super_resolution_x2", "super_resolution_x4", "deblurring", "colorization",
    "denoising", "compressed_sensing",
)  # fmt: skip
COLUMNS = {
    "psnr": ("PSNR of the mean, dB", ".2f"),
    "psnr_single": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM of the mean", ".3f"),
    "frechet_distance": ("feature distance", ".1f"),
    "residual": ("residual", ".4f"),
    "residual_of_mean": ("residual of the mean", ".4f"),
    "largest_relative_residual": ("largest relative residual", ".0e"),
    "coverage": ("within 2 std", ".1%"),
    "num_network_calls": ("network calls", "d"),
    "seconds": ("s per image", ".2f"),
}
NUM_PICTURES = 8
HOW_TO_READ = (
    "How to read the table: PSNR and SSIM should be high, feature distance and residuals low. About 95% of pixels should "
    "lie within 2 std; with fewer, the stated uncertainty is too small. `ours` should be better than every other method "
    "for the same task and noise.\n"
    "The pictures show, from left to right: clean, measured, linear answer, restored, uncertainty."
)


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    description = __doc__.split(":")[0] + "."
    parser = ArgumentParser(prog, description=description, formatter_class=HelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", type=place, required=True, help="Pipeline: a folder or a Hub id."
    )
    parser.add_argument(
        "--baseline", type=place, help="Pipeline to compare with, such as the VAE without calibration."
    )
    count = number(int, 1)
    parser.add_argument("--image_dir", type=place, required=True, help="Folder of clean images.")
    parser.add_argument("--max_images", type=count, default=256, help="At most so many, spread evenly over the names.")
    parser.add_argument(
        "--output_dir", type=place, required=True, help="Folder to write to. Must not hold an evaluation."
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        metavar="TASK",
        help=f"Tasks, from {', '.join(TASKS)}. Default: all that fit.",
    )
    parser.add_argument(
        "--noise_std",
        type=number(float, 0),
        nargs="+",
        default=[0.0, 0.05],
        help="Standard deviations of the measurement noise, for images in [-1, 1].",
    )
    parser.add_argument("--num_restorations", type=count, default=8, help="Answers per measurement.")
    parser.add_argument(
        "--num_inference_steps", type=count, nargs="+", default=[75], help="Decoder passes per answer."
    )
    parser.add_argument(
        "--method", choices=("langevin", "map"), default="langevin",
        help="langevin: draw answers from the posterior. map: find the most likely latents.",
    )  # fmt: skip
    parser.add_argument(
        "--energy_weight", type=number(float, 0), default=0.0,
        help="Weight of an answer's energy in the search. Above 0 requires an energy model.",
    )  # fmt: skip
    parser.add_argument("--classical", action="store_true", help="Also measure scikit-image's method for a task.")
    parser.add_argument(
        "--features", type=place, default="lite0", help="As for `ecvae evaluate`, except 'classifier'."
    )
    parser.add_argument("--batch_size", type=count, default=64, help="Measurements restored together.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of noise and answers.")
    parser.add_argument("--device", help="Such as cpu or cuda:1. Default: a GPU if there is one.")
    args = parser.parse_args(argv)
    if max(args.noise_std) >= 1:
        parser.error(f"--noise_std must be below 1, for images in [-1, 1], but is {args.noise_std}.")
    if (Path(args.output_dir) / "restoration.json").exists():
        parser.error(f"--output_dir {args.output_dir!r} already holds a restoration.json: give another folder.")
    if args.classical and importlib.util.find_spec("skimage") is None:
        parser.error("--classical requires scikit-image: pip install 'ecvae-diffusers[restoration]'.")
    return args


def choose_clean(image_dir: str, count: int, in_channels: int | None = None) -> "CheckedPictures":
    """Choose pictures spread evenly over the folder's names."""
    from ecvae_diffusers.training.data.images import CheckedPictures, open_folder

    pictures = open_folder(image_dir, "image_dir", in_channels)
    count = min(count, len(pictures))
    return CheckedPictures(pictures.select([i * len(pictures) // count for i in range(count)]))


def load(name: str, device: str | None = None) -> Any:
    """Load an `ECVAERestorationPipeline`. The channels-last layout and, on a CPU, kept memory make it faster."""
    import torch

    from ecvae_diffusers import ECVAERestorationPipeline
    from ecvae_diffusers.commands.sample import load_pipeline
    from ecvae_diffusers.training.run.launch import keep_freed_memory

    pipeline: Any = load_pipeline(ECVAERestorationPipeline, "the pipeline", name, device)
    pipeline.vae.to(memory_format=torch.channels_last)
    if pipeline.device.type == "cpu":
        keep_freed_memory()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def task_names(asked: list[str] | None, image_shape: tuple[int, ...], noise_std: float) -> list[str]:
    """Return the tasks asked for, or all that fit images of this shape. Denoising needs noise."""
    from ecvae_diffusers.evaluation.restoration import make_operator

    if asked is not None:
        return asked
    names = []
    for name in TASKS:
        try:
            make_operator(name, image_shape).measurement_shape(image_shape)
        except ValueError:
            continue
        if name != "denoising" or noise_std > 0:
            names.append(name)
    return names


def table(rows: list[dict[str, Any]]) -> str:
    columns = {key: column for key, column in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    lines = ["| noise | task | method | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for row in rows:
        cells = ["" if row.get(key) is None else format(row[key], spec) for key, (_, spec) in columns.items()]
        names = (f"{row['noise_std']:g}", row["task"].replace("_", " "), row["method"])
        lines.append(f"| {' | '.join((*names, *cells))} |")
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> None:
    """Restore and measure, writing the results after each task. A lock keeps other evaluations out of the folder."""
    check_places(args)

    from ecvae_diffusers.training.run.folder import locked

    with locked(args.output_dir):
        restore_and_measure(args, Path(args.output_dir))


def restore_and_measure(args: argparse.Namespace, output_dir: Path) -> None:
    import diffusers
    import torch
    from tqdm import tqdm

    import ecvae_diffusers
    from ecvae_diffusers.evaluation import restoration
    from ecvae_diffusers.evaluation.pictures import decode_all
    from ecvae_diffusers.evaluation.summary import subset_size
    from ecvae_diffusers.evaluation.while_training import NUM_NEIGHBOURS, load_features
    from ecvae_diffusers.metrics import GenerationMetrics
    from ecvae_diffusers.training.data.files import trained_hashes
    from ecvae_diffusers.training.data.transforms import to_range
    from ecvae_diffusers.training.run.pictures import image_grid, save_atomically

    models = {"ours": args.pretrained_model_name_or_path, "baseline": args.baseline}
    pipelines = {method: load(name, args.device) for method, name in models.items() if name is not None}
    config, device = pipelines["ours"].vae.config, pipelines["ours"].device
    checked = choose_clean(args.image_dir, args.max_images, config.in_channels)
    if (left_out := checked.left_out()) is not None:
        print(f"Left out of --image_dir {args.image_dir!r}: {left_out}.", file=sys.stderr)
    known = trained_hashes(args.pretrained_model_name_or_path)
    num_trained_on = None if known is None else sum(one in known for one in checked.hashes)
    if num_trained_on:
        print(f"WARNING The model was trained on {num_trained_on} of {len(checked)} images.", file=sys.stderr)
    decoded = decode_all(checked, config.sample_size, config.in_channels)
    clean, subset = to_range(decoded), subset_size(len(decoded), len(decoded))
    metrics, features = None, load_features(args.features, device, argument="features")
    if len(clean) >= NUM_NEIGHBOURS + 2:  # fewer images can't be compared as a set
        metrics = GenerationMetrics(features, kernel_subset_size=subset)
        metrics.update(decoded, real=True)
    protocol = {
        "arguments": vars(args) | {"device": str(device)},
        "num_images": len(clean),
        "num_trained_on": num_trained_on,
        "files": checked.describe(config.in_channels),
        "features": features.name,
        "kernel_distance_std": f"over 100 subsets of {subset}",
        "null": "an infinite PSNR, of answers without any error, or a distance between too few images",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ecvae_diffusers": ecvae_diffusers.__version__,
        "machine": platform.machine(),
    }
    trained_on = "not known" if num_trained_on is None else f"{num_trained_on} of {len(clean)}"
    trained_on = f"\nImages that the model was trained on: {trained_on}.\n"
    pictures: dict[float, list[torch.Tensor]] = {}
    rows: list[dict[str, Any]] = []
    shape = tuple(clean.shape[1:])
    todo = [(noise, name) for noise in args.noise_std for name in task_names(args.tasks, shape, noise)]
    for noise_std, name in tqdm(todo, desc="Tasks"):
        task = restoration.Task(name, clean, noise_std, args.seed)
        linear = task.linear_answers()
        found = {method: restoration.as_answers(images) for method, images in linear.items()}
        if args.classical and (peer := restoration.classical(task)) is not None:
            found[peer[0]] = peer[1]
        for method, pipeline in pipelines.items():
            for steps in args.num_inference_steps:
                label = method if len(args.num_inference_steps) == 1 else f"{method}, {steps} steps"
                found[label] = restoration.restore(
                    pipeline, task, args.num_restorations, args.batch_size, args.seed, num_inference_steps=steps,
                    method=args.method, energy_weight=args.energy_weight,
                )  # fmt: skip
        for method, answers in found.items():
            measures = restoration.measures(task, answers, metrics)
            rows.append({"noise_std": noise_std, "task": name, "method": method} | measures)
        ours = next(answers for method, answers in found.items() if method.startswith("ours"))
        assert ours.std is not None
        columns = (clean, task.shown(), list(linear.values())[-1], ours.single, ours.std.clamp(0, 1) * 2 - 1)
        pictures.setdefault(noise_std, []).extend(torch.stack(columns, dim=1)[:NUM_PICTURES].flatten(0, 1))
        write_json(output_dir / "restoration.json", {"protocol": protocol, "rows": rows})
        write_text(output_dir / "restoration.md", table(rows) + trained_on)
    for noise_std, parts in pictures.items():
        grid = image_grid(torch.stack(parts), num_columns=5 * (NUM_PICTURES // 2), scale=2)
        save_atomically(grid, output_dir / f"restoration_noise-{noise_std:g}.png")
    print(table(rows) + trained_on)
    print(HOW_TO_READ)
    print(f"{output_dir / 'restoration.json'}: every figure with its protocol.")


def main(argv: list[str] | None = None, prog: str = "ecvae evaluate-restoration") -> None:
    """Run `ecvae evaluate-restoration` with `argv`, or with the arguments of this process."""
    printable()
    how_to_go_on = ": restoration.json holds the finished tasks; start again with another --output_dir"
    run_or_fail(run, parse_args(argv, prog), prog, how_to_go_on)


if __name__ == "__main__":
    main()
