# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Calibrates the decoder of any autoencoder of diffusers: `accelerate launch training/calibrate_decoder.py --help`, or
`ecvae calibrate-decoder --help`. The encoder stays frozen, and what is saved loads with plain diffusers.
"""

from collections.abc import Callable

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.config import ECDecoderConfig


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECDecoderConfig:
    """Read and check a configuration, as `read_config` does."""
    return read_config(ECDecoderConfig, argv, prog)


def run(config: ECDecoderConfig) -> None:
    """Train as configured. Raises what `launch.train` raises."""
    from ecvae_diffusers.training.tasks.decoder import calibrate_decoder

    calibrate_decoder(config)


def main(
    argv: list[str] | None = None, prog: str = "calibrate_decoder.py", prepare: Callable[[], None] = lambda: None
) -> None:
    """Train as the command line says. `prepare` is called when that is read."""
    config = parse_args(argv, prog)
    prepare()
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)


if __name__ == "__main__":
    main()
