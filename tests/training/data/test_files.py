"""Every script finds the same pictures in a folder, each once, and says what was left out."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from data_sets import feed_of

from ecvae_diffusers.evaluation.evaluate_restoration import choose_clean
from ecvae_diffusers.evaluation.pictures import open_source
from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data.files import HASH_BYTES, content_hash, find_images, local_data_files
from ecvae_diffusers.training.data.images import CheckedPictures, decode_pictures, load_images, open_folder


def save(path: Path, level: int = 0, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", (16, 16), level).save(path, **kwargs)
    return path


def names(folder: Path) -> list[str]:
    return [os.path.relpath(picture["path"], folder) for picture in find_images(folder)]


def checked(folder: Path) -> CheckedPictures:
    return CheckedPictures(open_folder(str(folder), "train_data_dir"), progress=False)


def levels(pictures) -> list[int]:
    """The one level of each picture: which pictures they are."""
    return decode_pictures(pictures, 1, 16, progress=False)[:, 0, 0, 0].tolist()


# Every way in which a script comes to its pictures.
READERS = {
    "train_data_dir": lambda folder, cache: levels(load_images(DataConfig(train_data_dir=folder))),
    "dataset_name": lambda folder, cache: levels(open_source("dataset_name", folder, "train", None, None, cache)),
    "streaming": lambda folder, cache: feed_of(folder, size=16, channels=1).first(9)[:, 0, 0, 0].tolist(),
    "image_dir": lambda folder, cache: levels(choose_clean(folder, 100).pictures),
}


@pytest.fixture
def data(tmp_path) -> Path:
    """Six pictures of six levels, among what is none of the data."""
    data = tmp_path / "data"
    for level in range(6):
        save(data / ("a" if level < 3 else "b") / f"{level}.png", level)
    run = data / "train_run"  # a name that `datasets` would take for a split
    for folder in ("samples", "reconstructions", "chain", "neighbours", "made_by_hand"):
        save(run / folder / "step-000000.png", 100)
    (run / "training_args.json").write_text("{}")
    save(data / "a" / "samples.png", 110)
    save(data / "a" / "neighbours.png", 111)
    (data / "a" / "evaluation.json").write_text("{}")
    save(data / "restored" / "restoration_noise-0.05.png", 112)
    (data / "restored" / "restoration.json").write_text("{}")
    save(data / "published" / "curves.png", 113)
    (data / "published" / "model_index.json").write_text("{}")
    save(data / ".parts" / "hidden.png", 114)
    (data / "b" / "up").symlink_to(data)
    (data / "b" / "out").symlink_to(tmp_path)
    (data / "b" / "here").symlink_to(".")
    (data / "latest").symlink_to("b")
    (data / "z.png").symlink_to("a/0.png")
    (data / "sheets").symlink_to(run / "samples")
    return data


@pytest.mark.parametrize("reader", READERS)
def test_every_script_finds_the_same_pictures(reader, data, tmp_path):
    """No sheet of a run, no picture twice; cycles would go on for ever, since there are two."""
    assert sorted(READERS[reader](str(data), str(tmp_path / "cache"))) == list(range(6))


def test_links_are_followed_to_what_is_elsewhere(tmp_path):
    data = tmp_path / "data"
    save(data / "a.png")
    save(tmp_path / "elsewhere" / "b.PNG")
    save(tmp_path / "store" / "0123", format="PNG")
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "c.png").symlink_to(tmp_path / "store" / "0123")
    (data / "gone.png").symlink_to(tmp_path / "gone")
    assert names(data) == ["a.png", "c.png", "gone.png", "linked/b.PNG"]
    with pytest.raises(ValueError, match="1 of 4 .*gone.png"):
        checked(data)
    # The folder of pictures may itself be a link, and hold one to itself.
    (tmp_path / "alias").symlink_to(data)
    (data / "up").symlink_to(tmp_path / "alias")
    assert len(find_images(tmp_path / "alias")) == 4


def test_what_is_left_out_is_counted(data):
    for i in range(8):
        (data / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 64)
    for name in ("paper.pdf", "features.h5", "film.mpg", "no_extension"):
        (data / name).write_text("no picture")
    frames = [PIL.Image.new("L", (16, 16), level) for level in range(8)]
    frames[0].save(data / "stack.tif", save_all=True, append_images=frames[1:])
    frames[0].save(data / "film.gif", save_all=True, append_images=frames[1:3])
    pictures = checked(data)
    assert len(pictures) == 8
    text = pictures.left_out()
    for part in ("9 further frame", "2 file", "12 file", "8 .heic", "1 .h5", "a/samples.png", "1 hidden", "5 link"):
        assert part in text, (part, text)
    assert str(data) not in text and text in pictures.describe(1)
    # Of a data set, whose files `datasets` reads, pictures that can't be read are told as well.
    assert "8 .heic" in local_data_files(str(data))[1][0]


def test_names_that_are_not_utf_8_are_read(tmp_path):
    for level, name in enumerate((b"\xff\xfe.png", "Größe.png".encode("latin-1"), "Größe.png".encode())):
        PIL.Image.new("L", (16, 16), level).save(tmp_path / "a.png")
        os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/" + name)
    assert sorted(levels(find_images(tmp_path))) == [0, 1, 2]
    # Not by `datasets`: the file is named.
    with pytest.raises(ValueError, match=r"--dataset_name .*\.png"):
        load_images(DataConfig(dataset_name=str(tmp_path)))


@pytest.mark.parametrize("folder", ["", "nowhere"])
@pytest.mark.parametrize("argument", ["train_data_dir", "image_dir"])
def test_no_folder_is_refused_and_never_the_working_directory(argument, folder, tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=argument):
        open_source(argument, folder, "train", None, None, None)


def test_a_data_set_keeps_its_splits_and_its_order_when_a_run_lies_in_it(data, tmp_path):
    """So that a run in the folder of its data set can be resumed."""
    plain = tmp_path / "plain"
    for level in range(12):
        for folder in (plain, data):
            save(folder / ("train" if level < 8 else "test") / "x" / f"{level}.png", level)
    cache = str(tmp_path / "cache")
    for split, count in (("train", 8), ("test", 4)):
        of_both = [levels(open_source("dataset_name", str(f), split, None, None, cache)) for f in (plain, data)]
        assert of_both[0] == of_both[1] and len(of_both[0]) == count


def test_hashes_tell_pictures_apart_by_what_they_show(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)
    picture = PIL.Image.fromarray(pixels)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png")
    picture.convert("RGB").save(tmp_path / "b.bmp")
    picture.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "c.png", exif=exif)
    picture.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "d.png")
    pixels[0, 0] ^= 1
    PIL.Image.fromarray(pixels).save(tmp_path / "e.png")
    hashes = checked(tmp_path).hashes
    assert hashes[0] == hashes[1] == hashes[2] and len(set(hashes)) == 3 and len(hashes[0]) == HASH_BYTES
    # Not by their bytes alone: of another shape they show something else.
    assert content_hash(PIL.Image.new("RGB", (2, 8))) != content_hash(PIL.Image.new("RGB", (8, 2)))


def test_conversions_are_told(tmp_path):
    save(tmp_path / "gray.png")
    assert checked(tmp_path).channels == 1 and checked(tmp_path).converted(1) is None
    PIL.Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    PIL.Image.new("RGBA", (16, 20)).save(tmp_path / "clear.png")
    pictures = checked(tmp_path)
    assert pictures.channels == 3 and (pictures.num_gray, pictures.num_transparent) == (1, 1)
    assert "2 of 3" in pictures.converted(1) and "1 of 3" in pictures.converted(3)
    assert "2 of 16x16" in pictures.describe(3) and "1 of 16x20" in pictures.describe(3)
    assert pictures.left_out() is None and local_data_files(str(tmp_path)) == (None, [])
