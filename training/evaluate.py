#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Compare a model, or a folder of generated images, with data: `accelerate launch training/evaluate.py --help`."""

from ecvae_diffusers.evaluation.evaluate import main


if __name__ == "__main__":
    main()
