# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Restore damaged pictures with a trained model: `ecvae restore --help`.

Writes several answers per picture, their mean, a map of the uncertainty, a sheet of all these, and `restored.json`. The app `spaces/restoration` has the
same tasks with the same parameters.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecvae_diffusers.atomic import is_free
from ecvae_diffusers.checks import MODES
from ecvae_diffusers.command import ArgumentParser
from ecvae_diffusers.commands import LARGEST_SEED, check_writable, load_pipeline, number, read_label, run_or_fail


if TYPE_CHECKING:
    import PIL.Image

    from ecvae_diffusers import ECVAERestorationPipeline

# The tasks of `ecvae evaluate-restoration` whose measurement is a picture.
TASKS = ("super_resolution_x2", "super_resolution_x4", "deblurring", "colorization", "denoising")
# Parameters that must be above 0 for a task.
REQUIRED = {"deblurring": "blur_std", "denoising": "noise_std"}
RECORD = "restored.json"
# Standard deviation of images in [0, 1] that is white in the map of the uncertainty.
WHITE_STD = 0.25
SHEET_ANSWERS = 8


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = ArgumentParser(prog=prog, description=str(__doc__).split(":")[0] + ".")
    parser.add_argument(
        "pictures", type=os.path.expanduser, nargs="+", metavar="picture", help="Damaged pictures, or folders of them."
    )
    parser.add_argument("--model", type=os.path.expanduser, required=True, help="Pipeline: a folder or a Hub id.")
    damage = parser.add_mutually_exclusive_group(required=True)
    damage.add_argument(
        "--mask", type=os.path.expanduser, help="Picture of the same size: white pixels are repainted."
    )
    damage.add_argument("--task", choices=TASKS, metavar="TASK", help=f"Or the damage to undo: {', '.join(TASKS)}.")
    parser.add_argument(
        "-o", "--output_dir", type=os.path.expanduser, required=True, help="Folder to write to. Must be new or empty."
    )
    parser.add_argument(
        "--blur_std", type=number(float, 0),
        help="For --task deblurring: standard deviation of the Gaussian blur in pixels.",
    )  # fmt: skip
    parser.add_argument(
        "--noise_std", type=number(float, 0, 1),
        help="Standard deviation of the noise, for images in [-1, 1]. Divide 8-bit levels by 127.5. Default: 0.0023, for rounding to "
        "8 bits. Required for --task denoising.",
    )  # fmt: skip
    for name, kind, default, meaning in (
        ("num_restorations", number(int, 1), 8, "Answers per picture"),
        ("num_inference_steps", number(int, 1), 75, "Decoder passes per answer"),
        ("seed", number(int, 0, LARGEST_SEED), 0, "Seed of the answers"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning}. Default: {default}.")
    parser.add_argument("--class_label", metavar="CLASS", help="Name or number of the class of all pictures.")
    parser.add_argument("--device", help="Such as cpu or cuda:1. Default: a GPU if there is one.")
    args = parser.parse_args(argv)
    if args.blur_std is not None and args.task != "deblurring":
        parser.error(f"--blur_std must be left out except for --task deblurring, but is {args.blur_std}.")
    try:
        check_required(args.task, args.blur_std, args.noise_std)
    except ValueError as error:
        parser.error(f"--{error}")
    if not is_free(args.output_dir):
        parser.error(f"--output_dir must be a new or empty folder, but {args.output_dir!r} is not.")
    return args


def find_pictures(sources: list[str]) -> dict[str, Path]:
    """Return the pictures in files and folders by their stems, which name the answers. Raises `ValueError` if two are equal."""
    from ecvae_diffusers.training.data.images import open_folder

    found: dict[str, Path] = {}
    for source in sources:
        for path in open_folder(source, "pictures").source if os.path.isdir(source) else [Path(source)]:
            if (other := found.setdefault(path.stem, path)) != path:
                raise ValueError(f"pictures must have different names, but {str(other)!r} and {str(path)!r} do not.")
    return found


def check_pictures(pictures: dict[str, Path], mask: str | None) -> None:
    """Raise `ValueError`, before a model is loaded, if a picture or the mask can't be read, or their sizes differ."""
    import PIL.Image

    from ecvae_diffusers.pipelines.inputs import read_mask, read_picture

    def read(argument: str, path: str | Path, reader: Callable) -> Any:
        try:
            with PIL.Image.open(path) as image:
                image.load()
                return reader(image)
        except Exception as error:  # Pillow raises errors of many kinds for damaged files
            raise ValueError(f"{argument} {str(path)!r} can't be read: {error}") from error

    height_and_width = None if mask is None else read("--mask", mask, read_mask).shape
    for path in pictures.values():
        size = read("picture", path, lambda image: read_picture(image, 3)).size
        if height_and_width not in (None, size[::-1]):
            raise ValueError(f"--mask {mask!r} must have the size of {str(path)!r}, {size[0]}x{size[1]} px.")


def check_required(task: str | None, blur_std: float | None, noise_std: float | None) -> None:
    """Raise `ValueError` if a parameter that a task requires is missing or 0."""
    parameters = {"blur_std": blur_std, "noise_std": noise_std}
    if task in REQUIRED and not parameters[name := REQUIRED[task]]:
        raise ValueError(f"{name} must be above 0 for {task}, but is {parameters[name]}.")


def measurement(image: "PIL.Image.Image", task: str, blur_std: float | None) -> dict[str, Any]:
    """Return the arguments `image` and `operator` of the pipeline for a picture with the damage of a task."""
    from ecvae_diffusers.operators import Blur, Colorization, Denoising, SuperResolution, gaussian_kernel
    from ecvae_diffusers.pipelines.inputs import read_picture

    if task == "deblurring":
        return {"image": image, "operator": Blur(gaussian_kernel(blur_std or 0), "reflect")}
    if task == "denoising":
        return {"image": image, "operator": Denoising()}
    if task == "colorization":
        return {"image": read_picture(image, 1), "operator": Colorization()}
    return {"image": image, "operator": SuperResolution(int(task[-1]))}


def uncertainty_map(std: Any) -> "PIL.Image.Image":
    """Return a standard deviation per pixel, (H, W, C) for images in [0, 1], as a gray picture in which `WHITE_STD` is white."""
    import numpy as np
    import PIL.Image

    return PIL.Image.fromarray(np.uint8((np.asarray(std).mean(-1) / WHITE_STD * 255).clip(0, 255).round()))


def sheet_of(pictures: list["PIL.Image.Image"], channels: int) -> "PIL.Image.Image":
    """Lay pictures out in a row, each in the size of the last, and magnified if that is small."""
    import numpy as np
    import PIL.Image

    from ecvae_diffusers.grid import display_scale, lay_out
    from ecvae_diffusers.pipelines.inputs import read_picture

    size = pictures[-1].size
    alike = [read_picture(each, channels).resize(size, PIL.Image.Resampling.NEAREST) for each in pictures]
    rows = np.stack([np.asarray(each).reshape(*size[::-1], channels) for each in alike])
    return lay_out(rows, len(rows), display_scale(*size))


def restore(pipeline: "ECVAERestorationPipeline", path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Restore a picture, write its answers, their mean and the uncertainty into the output folder, and return a record."""
    import PIL.Image
    import torch

    from ecvae_diffusers.training.run.pictures import save_atomically

    image: PIL.Image.Image = PIL.Image.open(path)
    measured: dict[str, Any]
    if args.task is None:
        measured = {"image": image, "mask_image": PIL.Image.open(args.mask)}
    else:
        measured = measurement(image, args.task, args.blur_std)
    output = pipeline(
        **measured,
        noise_std=args.noise_std,
        num_restorations=args.num_restorations,
        num_inference_steps=args.num_inference_steps,
        generator=torch.Generator().manual_seed(args.seed),
        class_labels=read_label(args.class_label, pipeline.vae.config),
    )
    digits = len(str(args.num_restorations - 1))
    answers = {f"{path.stem}-{i:0{digits}d}.png": answer for i, answer in enumerate(output.images)}
    mean, uncertainty, sheet = (f"{path.stem}-{kind}.png" for kind in ("mean", "uncertainty", "sheet"))
    others = {mean: output.mean[0], uncertainty: uncertainty_map(output.std[0])}
    shown = [image, *output.images[:SHEET_ANSWERS], *others.values()]
    others[sheet] = sheet_of(shown, pipeline.vae.config.in_channels)
    for name, picture in (answers | others).items():
        save_atomically(picture, Path(args.output_dir) / name)
    return {
        "picture": str(path),
        "answers": list(answers),
        "mean": mean,
        "uncertainty": uncertainty,
        "sheet": sheet,
        "relative_residuals": output.residual.tolist(),
        "relative_residuals_of_files": output.residual_output.tolist(),
        "relative_residual_of_mean": output.residual_mean.item(),
        "mean_std": float(output.std.mean()),
        "energies": None if output.energy is None else output.energy.tolist(),
        "num_network_calls": output.num_network_calls,
    }


def run(args: argparse.Namespace) -> None:
    check_writable("--output_dir", args.output_dir)
    pictures = find_pictures(args.pictures)
    check_pictures(pictures, args.mask)

    import ecvae_diffusers
    from ecvae_diffusers.atomic import write_json

    pipeline = load_pipeline(ecvae_diffusers.ECVAERestorationPipeline, "--model", args.model, args.device)
    channels = pipeline.vae.config.in_channels
    if channels not in MODES:
        raise ValueError(
            f"--model must have images of 1, 3 or 4 channels, which pictures have, but {args.model!r} has {channels}: call "
            "ECVAERestorationPipeline with arrays."
        )
    if args.task == "colorization" and channels != 3:
        raise ValueError(
            f"--task colorization requires a model of 3 channels, but --model {args.model!r} has {channels}."
        )
    record: dict[str, Any] = {
        "arguments": vars(args),
        "ecvae_diffusers": ecvae_diffusers.__version__,
        "uncertainty": f"standard deviation per pixel of images in [0, 1]: black is 0, white {WHITE_STD} or more",
        "restorations": [],
    }
    for name, path in pictures.items():
        pipeline.set_progress_bar_config(desc=name, unit="step")
        record["restorations"].append(restore(pipeline, path, args))
        # After each picture, so that an interruption loses no finished one.
        write_json(Path(args.output_dir) / RECORD, record)
    print(
        f"{args.output_dir}: {args.num_restorations} answer(s) per picture, mean, uncertainty and sheet, and {RECORD}."
    )


def main(argv: list[str] | None = None, prog: str = "ecvae restore") -> None:
    """Run `ecvae restore` with `argv`, or with the arguments of this process."""
    run_or_fail(run, parse_args(argv, prog), prog)


if __name__ == "__main__":
    main()
