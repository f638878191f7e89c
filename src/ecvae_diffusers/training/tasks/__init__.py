# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Tasks of the training loop: VAEs, flows and decoders, and calibration of a VAE's posterior."""
