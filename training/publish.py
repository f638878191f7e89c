#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Prepare a model's folder for the Hub and upload it: `python training/publish.py --help`."""

from ecvae_diffusers.commands.publish import main


if __name__ == "__main__":
    main()
