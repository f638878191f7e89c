# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Trains and calibrates generators: what the training scripts share. Needs the extra `training`."""
