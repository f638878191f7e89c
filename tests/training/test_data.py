"""Images become what the models take, whatever their mode and shape."""

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
import torch

from ecvae_diffusers.pipelines.inputs import read_picture
from ecvae_diffusers.training.data import images as data
from ecvae_diffusers.training.data.images import ImageDataset, load_images, to_size


def dataset(folder, **kwargs) -> ImageDataset:
    return ImageDataset(load_images(None, None, str(folder), None, None, None), 16, progress=False, **kwargs)


def test_gray_if_every_image_is_gray(tmp_path):
    PIL.Image.new("L", (16, 16), 7).save(tmp_path / "a.png")
    PIL.Image.new("1", (16, 16), 1).save(tmp_path / "b.png")
    assert dataset(tmp_path).channels == 1
    PIL.Image.new("RGB", (16, 16), "red").save(tmp_path / "c.png")
    images = dataset(tmp_path)
    assert images.channels == 3
    assert images[0].unique().tolist() == [7] and images[2][:, 0, 0].tolist() == [255, 0, 0]
    assert dataset(tmp_path, in_channels=1).channels == 1
    assert dataset(tmp_path, in_channels=4)[2][:, 0, 0].tolist() == [255, 0, 0, 255]


GRAYS = ("L", "1", "LA", "I;16")


def write_mode(path, mode: str, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (20, 18, 4), dtype=np.uint8)
    if mode == "I;16":
        PIL.Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0]).save(path)
    else:
        PIL.Image.fromarray(pixels).convert(mode).save(path)


@pytest.mark.parametrize("most_bytes", [data.MAX_CACHED_BYTES, 8 * 16 * 16])
@pytest.mark.parametrize("skip_broken", [False, True])
@pytest.mark.parametrize("modes, in_channels", [
    (GRAYS, None), ((*GRAYS, "RGB", "L"), None), (("RGBA", *GRAYS), None), ((*GRAYS, "P"), 1), ((*GRAYS, "RGBA"), 4),
])  # fmt: skip
def test_what_is_cached_is_decoded_once_and_as_it_is_later(
    modes, in_channels, skip_broken, most_bytes, tmp_path, monkeypatch
):
    """Gray pictures before the first one in colour too, next to broken ones, and where all fit as gray ones only."""
    monkeypatch.setattr(data, "MAX_CACHED_BYTES", most_bytes)
    rng, decoded = np.random.default_rng(0), []
    for i, mode in enumerate(modes):
        write_mode(tmp_path / f"{i}.png", mode, rng)
    if skip_broken:
        (tmp_path / "0a.png").write_bytes((tmp_path / "0.png").read_bytes()[:-60])
    prepare = PIL.ImageFile.ImageFile.load_prepare
    monkeypatch.setattr(
        PIL.ImageFile.ImageFile, "load_prepare", lambda self: (decoded.append(self.filename), prepare(self))
    )
    images = dataset(tmp_path, in_channels=in_channels, skip_broken=skip_broken)
    assert len(decoded) == len(set(decoded)) == len(modes) + skip_broken
    batch = images.__getitems__(list(range(len(modes))))
    assert batch.shape == (len(modes), in_channels or (1 if set(modes) <= set(GRAYS) else 3), 16, 16)
    images.cache = None
    assert torch.equal(images.__getitems__(list(range(len(modes)))), batch)


def test_sixteen_bits_become_eight(tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    PIL.Image.fromarray(values).save(tmp_path / "a.png")
    assert dataset(tmp_path)[0].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    image = PIL.Image.new(mode, (2, 1), (0,) * len(mode))  # black, wholly transparent
    assert read_picture(image, 3).getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(image, 1).getpixel((0, 0)) == 255
    assert read_picture(image, 4).getpixel((0, 0))[3] == 0


def test_palette_with_transparency_is_laid_on_white(tmp_path):
    image = PIL.Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30] + [0] * 765)
    image.save(tmp_path / "a.png", transparency=0)
    assert dataset(tmp_path)[0][:, 0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("size", [(16, 16), (40, 17), (9, 33), (16, 300)])
def test_shorter_side_is_resized_and_the_center_kept(size):
    image = PIL.Image.new("L", size, 0)
    image.paste(255, (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 3, size[1] // 2 + 3))
    result = np.asarray(to_size(image, 16), dtype=float)
    assert result.shape == (16, 16)
    rows, columns = np.indices(result.shape)
    assert abs((result * rows).sum() / result.sum() - 7.5) < 1.1
    assert abs((result * columns).sum() / result.sum() - 7.5) < 1.1


def test_an_image_of_the_right_size_is_kept_bit_for_bit(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    image = dataset(tmp_path)[0]
    assert image.dtype == torch.uint8 and torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_batch_is_the_stack_of_its_images_cached_or_not(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        PIL.Image.fromarray(rng.integers(0, 256, (20, 18), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    images = dataset(tmp_path)
    batch = images.__getitems__([3, 1])
    assert torch.equal(batch, torch.stack([images[3], images[1]]))
    images.cache = None
    assert torch.equal(images.__getitems__([3, 1]), batch)


def test_photographs_are_turned_upright(tmp_path):
    picture = PIL.Image.new("L", (16, 16), 0)
    picture.paste(255, (0, 0, 16, 8))  # a white top
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to look at"
    picture.save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = dataset(tmp_path)[0][0].float()
    assert image[:, 9:].mean() > 250 and image[:, :7].mean() < 5  # the top has become the right


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_pixels_without_an_agreed_range_are_refused(dtype, mode, tmp_path):
    PIL.Image.fromarray(np.ones((16, 16), dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=rf"1 of 1 images can't be read.*a\.tiff \(mode {mode} has no agreed range"):
        dataset(tmp_path)


def test_sixteen_bits_of_the_other_byte_order(tmp_path):
    values = np.linspace(0, 65535, 256).round().astype(">u2").reshape(16, 16)
    PIL.Image.frombytes("I;16B", (16, 16), values.tobytes()).save(tmp_path / "a.tiff")
    images = dataset(tmp_path)
    assert images.channels == 1 and images[0].flatten().tolist() == list(range(256))
