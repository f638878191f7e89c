#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train an energy-calibrated normalizing flow on images: `accelerate launch training/train_flow.py --help`."""

from ecvae_diffusers.training.train_flow import main


if __name__ == "__main__":
    main()
