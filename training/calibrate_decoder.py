#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Calibrate the decoder of an autoencoder of diffusers: `accelerate launch training/calibrate_decoder.py --help`."""

from ecvae_diffusers.training.calibrate_decoder import main


if __name__ == "__main__":
    main()
