# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""A web page that runs a model in the browser: what `ecvae page` writes."""
