# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Pictures to train on: found, checked, decoded, streamed."""
