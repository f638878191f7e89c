# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Writes the report of a training run, one HTML file. Requires the extra `training`."""
