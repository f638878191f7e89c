#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train an energy-calibrated VAE on images: `accelerate launch training/train_ecvae.py --help`."""

from ecvae_diffusers.training.train_ecvae import main


if __name__ == "__main__":
    main()
