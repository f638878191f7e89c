#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Write the report of a training run: `python training/report.py my_model`."""

from ecvae_diffusers.report.report import main


if __name__ == "__main__":
    main()
