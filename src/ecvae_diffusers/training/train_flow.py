# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train an energy-calibrated normalizing flow: `accelerate launch training/train_flow.py --help`, or `ecvae train-flow --help`.

Train on likelihood first, with `--calibration none`. Then calibrate in a second run that starts from the first one
(`--pretrained_model_name_or_path`): see docs/guides/flows.md.
"""

from collections.abc import Callable

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.tasks.flow_config import ECFlowConfig


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECFlowConfig:
    """Read and check a configuration from the command line, with `read_config`."""
    return read_config(ECFlowConfig, argv, prog)


def run(config: ECFlowConfig) -> None:
    """Train with a configuration. Raises the errors of `launch.train`."""
    from ecvae_diffusers.training.tasks.flow import train_flow

    train_flow(config)


def main(
    argv: list[str] | None = None, prog: str = "train_flow.py", prepare: Callable[[], None] = lambda: None
) -> None:
    """Parse the command line and train. `prepare` is called between the two."""
    config = parse_args(argv, prog)
    prepare()
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)


if __name__ == "__main__":
    main()
