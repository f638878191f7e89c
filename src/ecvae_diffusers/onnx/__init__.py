# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Models as ONNX files, which run without torch. `export.py` writes them, and needs torch."""

from .pipeline_onnx_ecvae import OnnxECVAEPipeline
