# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Alias of `ecvae_diffusers.hub.upload` and `.contents` from version 0.1. It will be removed in version 0.2."""

from .hub.contents import *  # noqa: F403
from .hub.upload import *  # noqa: F403
