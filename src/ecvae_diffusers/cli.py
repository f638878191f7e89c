# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The command `ecvae`: train, sample, restore, evaluate and publish energy-calibrated models. `ecvae --help` lists all commands.

What a command needs is imported only when the command runs, so that help is shown at once.
"""

import importlib
import os
import sys
from functools import partial
from typing import NamedTuple

from . import __version__
from .command import fail, printable
from .commands import what_to_install


class Command(NamedTuple):
    """A command of `ecvae`: the module whose `main(argv, prog)` runs it, a one-line summary, and example arguments."""

    module: str
    summary: str
    example: str


COMMANDS = {
    "train": Command(
        "training.train_ecvae",
        "Train an energy-calibrated VAE on images.",
        "my_images --resolution 32 --output_dir my_model",
    ),
    "train-flow": Command(
        "training.train_flow",
        "Train an energy-calibrated normalizing flow on images.",
        "my_images --resolution 16 --output_dir my_flow",
    ),
    "calibrate-decoder": Command(
        "training.calibrate_decoder",
        "Calibrate the decoder of a diffusers autoencoder.",
        "my_images --pretrained_model_name_or_path my_vae --resolution 64 --output_dir my_calibrated_vae",
    ),
    "sample": Command("commands.sample", "Sample images from a trained model.", "my_model -n 64 -o samples.png"),
    "restore": Command(
        "commands.restore",
        "Restore damaged pictures with a trained model.",
        "damaged.png --mask mask.png --model my_model -o restored/",
    ),
    "calibrate-threshold": Command(
        "commands.calibrate_threshold",
        "Measure when an image is anomalous for a model.",
        "my_model --data my_other_images --false_alarm_rate 0.01",
    ),
    "evaluate": Command(
        "evaluation.evaluate",
        "Evaluate a model, or a folder of generated images, against data.",
        "--pretrained_model_name_or_path my_model --train_data_dir my_images --test_data_dir my_other_images "
        "--output_dir my_evaluation",
    ),
    "evaluate-restoration": Command(
        "evaluation.evaluate_restoration",
        "Evaluate restoration on a folder of clean images.",
        "--pretrained_model_name_or_path my_model --image_dir my_other_images --output_dir my_restorations",
    ),
    "report": Command("report.report", "Write the report of a training run as one HTML file.", "my_model"),
    "export": Command(
        "commands.export", "Export a model to ONNX, to run it without torch.", "my_model --output_dir my_onnx_model"
    ),
    "page": Command(
        "commands.page",
        "Write a web page that runs a model in the browser.",
        "my_model --output_dir my_page --data my_images",
    ),
    "publish": Command(
        "commands.publish",
        "Prepare the folder of a model for the Hub, and upload it.",
        "my_model --evaluation my_evaluation --details details.yaml --hub_model_id me/my-model",
    ),
}
PARALLEL = ("train", "train-flow", "calibrate-decoder", "evaluate")  # commands that use every GPU of the machine
# Environment variables of a process that `torchrun` or `accelerate launch` has started.
LAUNCHED = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")


def overview() -> str:
    """Return the help of `ecvae` itself."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    examples = "\n".join(f"  ecvae {name} {COMMANDS[name].example}" for name in ("train", "sample"))
    return (
        f"usage: ecvae COMMAND ...\n\nEnergy-calibrated VAEs for diffusers.\n\ncommands:\n{commands}\n\n"
        f"example:\n{examples}\n\n`ecvae COMMAND --help` lists the arguments of a command."
    )


def launch(name: str, argv: list[str]) -> None:
    """Use the whole machine: one process per GPU, or one thread per physical core. Does nothing under a launcher."""
    if any(variable in os.environ for variable in LAUNCHED):
        return
    import psutil
    import torch

    if (num_gpus := torch.cuda.device_count()) > 1:
        launcher = [
            "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(num_gpus), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "ecvae_diffusers.cli", name,
        ]  # fmt: skip
        print(
            f"ecvae {name}: running {num_gpus} processes, one per GPU, with accelerate launch.",
            file=sys.stderr,
            flush=True,
        )
        # `execv` replaces this process, so signals reach the launcher and its exit code is returned.
        os.execv(sys.executable, [sys.executable, *launcher, *argv])
    if torch.accelerator.is_available():
        where = f"on {torch.accelerator.current_accelerator()}"
    else:
        if "OMP_NUM_THREADS" not in os.environ:
            usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(min(psutil.cpu_count(logical=False) or usable, usable))
        where = f"on the CPU, with {torch.get_num_threads()} thread(s)"
    print(f"ecvae {name}: running one process {where}.", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command that `argv` names, by default the command line of this process."""
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    printable()
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return
    name, *argv = argv
    if name == "--version":
        print(__version__)
        return
    if name not in COMMANDS:
        fail(f"ecvae: error: COMMAND must be one of {', '.join(COMMANDS)}, but is {name!r}.")
    command, prog = COMMANDS[name], f"ecvae {name}"
    asks_for_help = "-h" in argv or "--help" in argv
    try:
        module = importlib.import_module(f".{command.module}", __package__)
        if name in PARALLEL:
            module.main(argv, prog, partial(launch, name, argv))
        else:
            module.main(argv, prog)
    except ImportError as error:
        fail(f"{prog}: error: {what_to_install(error)}")
    except SystemExit as end:
        if asks_for_help and not end.code:
            print(f"\nexample:\n  {prog} {command.example}")
        raise


if __name__ == "__main__":
    main()
