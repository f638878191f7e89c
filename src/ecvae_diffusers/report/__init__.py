# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lays a run out in one HTML file. Needs the extra `training`."""
