# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Train and calibrate generators: the code that the training scripts share. Requires the extra `training`."""
