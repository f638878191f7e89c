# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def saved(make_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder
