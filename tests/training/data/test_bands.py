# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Arrays and pages of a TIFF as images of any number of channels."""

import numpy as np
import PIL.Image
import pytest
import torch

from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data.bands import read_bands
from ecvae_diffusers.training.data.files import find_images
from ecvae_diffusers.training.data.images import ImageDataset, decode_image, hashes_of, load_images


def bands(channels: int = 6, height: int = 10, width: int = 14, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def write_tiff(path, array: np.ndarray):
    pages = [PIL.Image.fromarray(page) for page in np.moveaxis(array, -1, 0).copy()]
    pages[0].save(path, save_all=True, append_images=pages[1:])


def read(path, channels=None) -> np.ndarray:
    return read_bands({"path": str(path), "bytes": None}, channels)


def test_arrays_and_pages_hold_the_same_levels(tmp_path):
    """In each dtype, with white at its value, and from bytes as from a file."""
    array = bands()
    write_tiff(tmp_path / "a.tif", array)
    write_tiff(tmp_path / "b.tif", array.astype(np.uint16) * 257)
    for name, stored in (("8", array), ("16", array.astype(np.uint16) * 257), ("32", array.astype(np.float32) / 255)):
        np.save(tmp_path / f"{name}.npy", stored)
    for path in tmp_path.iterdir():
        assert np.array_equal(read(path, 6), array), path
        source = {"path": path.name, "bytes": path.read_bytes()}
        assert np.array_equal(read_bands(source, 6), array)
    np.save(tmp_path / "flat.npy", array[..., 0])
    assert np.array_equal(read(tmp_path / "flat.npy"), array[..., :1])


@pytest.mark.parametrize(
    "array",
    [bands().astype(np.int64), bands().astype(np.float32), np.full((4, 4, 6), np.nan, np.float32), bands(5), bands()[None]],
)  # fmt: skip
def test_other_arrays_are_refused(array, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError):
        read(tmp_path / "a.npy", 6)


def test_no_array_runs_code(tmp_path):
    np.save(tmp_path / "a.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        read(tmp_path / "a.npy")


def test_a_folder_of_arrays_tells_the_number_of_channels(tmp_path):
    """Its images are resized and cropped as pictures are, each channel by itself, and two of one content have one hash."""
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", bands(seed=min(i, 1)))
    data = DataConfig(train_data_dir=str(tmp_path), resolution=[6, 8])
    dataset = ImageDataset(load_images(data), data.decoded_size, progress=False)
    assert dataset.channels == 6 and dataset[0].shape == (6, 6, 8)
    for c in range(6):
        alone = decode_image({"path": str(tmp_path / "0.npy"), "bytes": None}, 6, [6, 8])[c]
        np.save(tmp_path / "one.npy", bands()[..., c])
        assert torch.equal(dataset[0][c], alone)
        assert torch.equal(decode_image({"path": str(tmp_path / "one.npy"), "bytes": None}, 1, [6, 8])[0], alone)
    hashes = dataset.checked.hashes
    assert hashes[1] == hashes[2] != hashes[0] and hashes_of(dataset.pictures) == hashes


def test_arrays_of_other_channels_are_named(tmp_path):
    np.save(tmp_path / "0.npy", bands())
    with pytest.raises(ValueError, match="--train_data_dir"):
        load_images(DataConfig(train_data_dir=str(tmp_path), in_channels=3))


def test_pictures_come_before_arrays_unless_channels_are_asked_for(tmp_path):
    PIL.Image.fromarray(bands(3)).save(tmp_path / "picture.png")
    np.save(tmp_path / "array.npy", bands())
    write_tiff(tmp_path / "pages.tif", bands())
    for channels, expected in (
        (None, {"picture.png", "pages.tif"}),
        (3, {"picture.png", "pages.tif"}),
        (6, {"array.npy", "pages.tif"}),
    ):
        found = find_images(tmp_path, in_channels=channels)
        assert {path.name for path in found.source} == expected and found.bands == (6 if channels == 6 else None)
        assert len(found.left_out) == 1
    (tmp_path / "broken.npy").write_bytes(b"no array")
    pictures = find_images(tmp_path, in_channels=6)
    with pytest.raises(ValueError, match="broken.npy"):
        ImageDataset(pictures, 8, 6, progress=False)
    assert len(ImageDataset(pictures, 8, 6, skip_broken=True, progress=False)) == 2
