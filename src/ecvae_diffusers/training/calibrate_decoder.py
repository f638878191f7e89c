# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Calibrate the decoder of any autoencoder of diffusers: `accelerate launch training/calibrate_decoder.py --help`, or
`ecvae calibrate-decoder --help`. The encoder is frozen. The saved autoencoder loads with plain diffusers.
"""

from collections.abc import Callable

from ecvae_diffusers.training.command_line import read_config
from ecvae_diffusers.training.tasks.decoder_config import ECDecoderConfig


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ECDecoderConfig:
    """Read and check a configuration from the command line, with `read_config`."""
    return read_config(ECDecoderConfig, argv, prog)


def run(config: ECDecoderConfig) -> None:
    """Train with a configuration. Raises the errors of `launch.train`."""
    from ecvae_diffusers.training.tasks.decoder import calibrate_decoder

    calibrate_decoder(config)


def main(
    argv: list[str] | None = None, prog: str = "calibrate_decoder.py", prepare: Callable[[], None] = lambda: None
) -> None:
    """Parse the command line and train. `prepare` is called between the two."""
    config = parse_args(argv, prog)
    prepare()
    from ecvae_diffusers.training.run.launch import run_script

    run_script(prog, config, run)


if __name__ == "__main__":
    main()
