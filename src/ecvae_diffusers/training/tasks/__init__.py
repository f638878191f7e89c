# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What is trained: VAEs, posteriors, flows, decoders."""
