# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A run's folder: checkpoints, logs, pictures, the guard, signals and the lock."""
