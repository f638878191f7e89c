# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Saves, loads and publishes a pipeline's folder."""

from .saving import fingerprint, weights_fingerprint
