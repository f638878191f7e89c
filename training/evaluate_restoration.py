#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Measure how well a model restores the images of a folder: `python training/evaluate_restoration.py --help`."""

from ecvae_diffusers.evaluation.evaluate_restoration import main


if __name__ == "__main__":
    main()
