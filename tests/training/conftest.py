"""Data that the runs of these tests share."""

from pathlib import Path

import pytest
from training_runs import write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """24 gray images of 16 px."""
    return write_images(tmp_path_factory.mktemp("data") / "gray")
