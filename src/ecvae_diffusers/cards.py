# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The name that `ecvae_diffusers.hub.card` had in version 0.1. It goes with 0.2."""

from .hub.card import *  # noqa: F403
