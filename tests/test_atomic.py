# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What is written is complete or absent, and JSON is JSON."""

import errno
import json
import math
import os

import pytest
import torch
from safetensors.torch import save_file
from small_files import small_files

from ecvae_diffusers.atomic import WriteError, discard, remove, replacing, write_json, writing


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_folder", [False, True])
def test_what_was_there_stays_where_a_write_fails(is_folder, error, tmp_path):
    path = tmp_path / "it"

    def write(place, content):
        if is_folder:
            place.mkdir()
            place = place / "file"
        place.write_text(content)

    write(path, "before")
    with pytest.raises(WriteError if isinstance(error, OSError) else type(error)):
        with replacing(path) as temporary:
            write(temporary, "half")
            raise error
    assert (path / "file" if is_folder else path).read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        write(temporary, "after")
    assert (path / "file" if is_folder else path).read_text() == "after" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "write",
    [
        lambda values, path: path.write_text("x" * 10**6),
        torch.save,
        lambda values, path: save_file({"x": values}, path),
    ],
    ids=["text", "torch", "safetensors"],
)
def test_a_full_disk_is_said_with_the_files_name(write, tmp_path):
    """Each writer has an error of its own for it."""
    with small_files(), pytest.raises(WriteError, match="weights.bin") as raised:
        with replacing(tmp_path / "weights.bin") as temporary:
            write(torch.zeros(2**20), temporary)
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []


def test_other_errors_are_let_through(tmp_path):
    with pytest.raises(RuntimeError, match="of the model") as raised, writing(tmp_path / "file"):
        raise RuntimeError("an error of the model")
    assert not isinstance(raised.value, OSError)
    # What could not be read is not what could not be written.
    with pytest.raises(FileNotFoundError, match="missing"), writing(tmp_path / "file"):
        (tmp_path / "missing").read_text()
    with pytest.raises(WriteError, match="file"), writing(tmp_path / "file"):
        (tmp_path / "file" / "config.json").read_text()


def test_what_a_link_leads_to_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    for function in (remove, discard):
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        function(tmp_path / "link")
        (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
        function(tmp_path / "dangling")
        assert sorted(os.listdir(tmp_path)) == ["elsewhere"] and (tmp_path / "elsewhere" / "file").is_file()


def test_json_has_no_infinity(tmp_path):
    path = tmp_path / "new" / "file.json"
    value = {"psnr": math.inf, "rows": [{"x": (math.nan, 1.5)}, -math.inf], "text": "NaN ä", "none": None, "yes": True}
    expected = {"psnr": None, "rows": [{"x": [None, 1.5]}, None], "text": "NaN ä", "none": None, "yes": True}
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == expected
