"""Images become what the models take, whatever their mode and shape; `tests/pipelines/test_inputs.py` tests how they are read."""

import sys

import datasets
import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch
from training_runs import write_images

from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data import images as module
from ecvae_diffusers.training.data.images import ImageDataset, load_images, open_folder, to_size


GRAYS = ("L", "1", "LA", "I;16")


def dataset(folder, **kwargs) -> ImageDataset:
    return ImageDataset(open_folder(str(folder), "train_data_dir"), 16, progress=False, **kwargs)


def write_mode(path, mode: str, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (20, 18, 4), dtype=np.uint8)
    if mode == "I;16":
        PIL.Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0]).save(path)
    else:
        PIL.Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize("modes, in_channels, skip_broken", [
    (GRAYS, None, False), ((*GRAYS, "RGB", "L"), None, True), (("RGBA", *GRAYS), None, False), ((*GRAYS, "P"), 1, True),
    ((*GRAYS, "RGBA"), 4, True),
])  # fmt: skip
def test_each_image_is_decoded_once_and_cached_as_it_is_decoded_later(
    modes, in_channels, skip_broken, tmp_path, monkeypatch
):
    """Also with gray images before the first in colour, next to broken ones, and without a cache."""
    rng, decoded = np.random.default_rng(0), []
    for i, mode in enumerate(modes):
        write_mode(tmp_path / f"{i}.png", mode, rng)
    if skip_broken:
        (tmp_path / "0a.png").write_bytes((tmp_path / "0.png").read_bytes()[:-60])
    image_file = PIL.ImageFile.ImageFile
    prepare = image_file.load_prepare
    monkeypatch.setattr(image_file, "load_prepare", lambda self: (decoded.append(self.filename), prepare(self)))
    images = dataset(tmp_path, in_channels=in_channels, skip_broken=skip_broken)
    assert len(decoded) == len(set(decoded)) == len(modes) + skip_broken
    batch = images.images(list(range(len(modes))))
    assert batch.shape == (len(modes), in_channels or (1 if set(modes) <= set(GRAYS) else 3), 16, 16)
    assert torch.equal(images.images([3, 1]), torch.stack([images[3], images[1]]))
    # No room for any, and room for one channel of each, broken ones too.
    for room, is_cached in ((100, False), ((len(modes) + skip_broken) * 16**2, batch.shape[1] == 1)):
        monkeypatch.setattr(module, "MAX_CACHED_BYTES", room)
        again = dataset(tmp_path, in_channels=in_channels, skip_broken=skip_broken)
        assert (again.cache is not None) == is_cached
        assert torch.equal(again.images(list(range(len(modes)))), batch)


@pytest.mark.parametrize("size", [(40, 17), (9, 33)])
def test_shorter_side_is_resized_and_the_center_kept(size):
    image = PIL.Image.new("L", size, 0)
    image.paste(255, (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 3, size[1] // 2 + 3))
    result = np.asarray(to_size(image, 16), dtype=float)
    assert result.shape == (16, 16)
    rows, columns = np.indices(result.shape)
    assert abs((result * rows).sum() / result.sum() - 7.5) < 1.1
    assert abs((result * columns).sum() / result.sum() - 7.5) < 1.1


@pytest.mark.parametrize("damage", ["cut off", "empty", "pixels without a range", "EXIF data"])
def test_broken_images_are_named_and_skipped_on_request(damage, tmp_path):
    folder = write_images(tmp_path / "data", count=4)
    path = folder / "002.png"
    if damage == "pixels without a range":
        PIL.Image.new("F", (16, 16)).save(path.with_suffix(".tiff"))
        path.unlink()
    elif damage == "EXIF data":
        PIL.Image.open(path).save(path, exif=b"b'Exif\\x00\\x00'")  # the `repr` of bytes, as some upscalers write it
    else:
        path.write_bytes(path.read_bytes()[:60] if damage == "cut off" else b"")
    with pytest.raises(ValueError, match=r"1 of 4 .*002\.(png|tiff)"):
        dataset(folder)
    rest = dataset(folder, skip_broken=True)
    assert len(rest) == 3 and "1 of 4" in rest.checked.skipped and "002." in rest.checked.skipped
    for path in folder.glob("002.*"):
        path.unlink()
    whole = dataset(folder)
    assert whole.checked.skipped is None and torch.equal(whole.cache, rest.cache)
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 3"):
        dataset(folder, skip_broken=True)


def test_a_data_set_with_configurations_and_a_column_of_images(tmp_path):
    """Dark and bright images: the configuration that is named is read, and no more images than are asked for."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for name, level in (("dark", 20), ("bright", 230)):
        pictures = [np.full((16, 16), level + i, np.uint8) for i in range(8)]
        (tmp_path / name).mkdir()
        rows = datasets.Dataset.from_dict({"img": pictures, "label": list(range(8))}, features=features)
        rows.to_parquet(tmp_path / name / "train.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: dark\n  data_files: dark/*.parquet\n"
        "- config_name: bright\n  data_files: bright/*.parquet\n---\n"
    )

    def load(name: str, **values):
        return load_images(DataConfig(dataset_name=str(tmp_path), dataset_config_name=name, **values))

    images = ImageDataset(load("bright", max_train_samples=3), 16, progress=False)
    assert images.channels == 1 and images.cache[:, 0, 0, 0].tolist() == [230, 231, 232]
    with pytest.raises(ValueError, match="--image_column.*'img'"):
        load("dark", image_column="label")


def test_missing_extra_is_named(monkeypatch):
    """As on a machine where only the base package is installed."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'ecvae-diffusers\[training\]'"):
        load_images(DataConfig(dataset_name="images"))
