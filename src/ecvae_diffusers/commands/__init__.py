# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the command `ecvae` does by itself. The other commands are those of training, evaluation, report and hub."""
