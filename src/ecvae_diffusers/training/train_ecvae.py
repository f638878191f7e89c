# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train an energy-calibrated VAE on images: `accelerate launch training/train_ecvae.py --help`, or `ecvae train --help`."""

from collections.abc import Callable

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.tasks.vae_config import ECVAEConfig


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECVAEConfig:
    """Read and check a configuration from the command line, with `read_config`."""
    return read_config(ECVAEConfig, argv, prog)


def run(config: ECVAEConfig) -> None:
    """Train with a configuration. Raises the errors of `launch.train`."""
    from ecvae_diffusers.training.tasks.vae import train_vae

    train_vae(config)


def main(
    argv: list[str] | None = None, prog: str = "train_ecvae.py", prepare: Callable[[], None] = lambda: None
) -> None:
    """Parse the command line and train. `prepare` is called between the two."""
    config = parse_args(argv, prog)
    prepare()
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)


if __name__ == "__main__":
    main()
