# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Adapters for other libraries, none of which is a dependency."""
