# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains an energy-calibrated normalizing flow: `accelerate launch training/train_flow.py --help`, or `ecvae train-flow --help`.

Likelihood is learned first, with `--calibration none`; a second run from there (`--pretrained_model_name_or_path`) calibrates: see
docs/guides/flows.md.
"""

from collections.abc import Callable

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.config import ECFlowConfig


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECFlowConfig:
    """Read and check a configuration, as `read_config` does."""
    return read_config(ECFlowConfig, argv, prog)


def run(config: ECFlowConfig) -> None:
    """Train as configured. Raises what `launch.train` raises."""
    from ecvae_diffusers.training.tasks.flow import train_flow

    train_flow(config)


def main(
    argv: list[str] | None = None, prog: str = "train_flow.py", prepare: Callable[[], None] = lambda: None
) -> None:
    """Train as the command line says. `prepare` is called when that is read."""
    config = parse_args(argv, prog)
    prepare()
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)


if __name__ == "__main__":
    main()
