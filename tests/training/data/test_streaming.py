"""Each image of a stream comes once per epoch, decoded as before training, whichever process or worker reads it."""

import hashlib
import io
import itertools
import zipfile

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch

from ecvae_diffusers.training.data import streaming
from ecvae_diffusers.training.data.images import ImageDataset, load_images
from ecvae_diffusers.training.data.streaming import MAX_NAMED, StreamedImages


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    """`datasets` waits 5 seconds at each end of a stream of Parquet files, for the sake of the interpreter's exit."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def encoded(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_parquet(folder, sources: list[dict | None], num_files: int = 1):
    """A data set with a column `picture`, and one of labels."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    for i, part in enumerate(np.array_split(np.arange(len(sources)), num_files)):
        rows = {"picture": [sources[k] for k in part], "label": part.tolist()}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{i:05}-of-{num_files:05}.parquet")
    return folder


def numbered(count: int) -> list[dict]:
    """Images that carry their number in their first channel."""
    return [
        {"bytes": encoded(PIL.Image.new("RGB", (8, 8), (i, 255 - i, 7))), "path": f"{i}.png"} for i in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """27 images in 3 files."""
    return write_parquet(tmp_path_factory.mktemp("stream") / "data", numbered(27), num_files=3)


def stream(folder, image_column=None, max_train_samples=None, resolution=8, channels=3, **kwargs) -> StreamedImages:
    return StreamedImages(str(folder), None, image_column, max_train_samples, resolution, channels, **kwargs)


def numbers(batches, count: int) -> list[int]:
    """The first `count` images' numbers."""
    found = []
    while len(found) < count:
        batch = next(batches)
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 8, 8)
        assert (batch[:, 1] == 255 - batch[:, 0]).all()
        found += batch[:, 0, 0, 0].tolist()
    return found[:count]


def test_every_image_once_per_epoch_in_another_order(data, monkeypatch):
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER_SIZE", 10)
    order = numbers(stream(data).batches(4), 3 * 27)  # batches reach over the ends of epochs
    epochs = [order[:27], order[27:54], order[54:]]
    assert all(sorted(epoch) == list(range(27)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(27)]}) == 4
    assert numbers(stream(data).batches(9), 3 * 27) == order
    monkeypatch.setattr(streaming, "SHUFFLE_BUFFER_SIZE", 2)
    order = numbers(stream(data, max_train_samples=27).batches(27), 27)
    assert sorted(order) == list(range(27)) and all(number <= i + 2 for i, number in enumerate(order))


def test_the_order_depends_on_seed_reseed_and_first_batch(data):
    images = stream(data)
    state = torch.get_rng_state()
    orders = [numbers(images.batches(9), 27), numbers(stream(data, seed=1).batches(9), 27)]
    orders += [numbers(images.batches(9, reseed=1), 27), numbers(images.batches(9, first_batch=1), 27)]
    assert all(sorted(order) == list(range(27)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert numbers(images.batches(9, first_batch=1), 27) == orders[3]
    assert torch.equal(torch.get_rng_state(), state)  # and not on the global generator


@pytest.mark.parametrize("max_train_samples", [None, 20])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_shares_are_disjoint_and_together_whole(num_processes, max_train_samples, data):
    """Two processes share the images of three files, three have a file each; with a limit, all share the images."""
    total = max_train_samples or 27
    shares = []
    for i in range(num_processes):
        images = stream(
            data, max_train_samples=max_train_samples, process_index=i, num_processes=num_processes, seed=3
        )
        batches, size = images.batches(1), len(range(i, total, num_processes))
        shares.append([numbers(batches, size) for _ in range(2)])
        assert images.first(5)[:, 0, 0, 0].tolist() == list(range(5))
    for epoch in zip(*shares):
        assert sorted(itertools.chain(*epoch)) == list(range(total))


def test_the_first_samples_only(data, caplog):
    images = stream(data, max_train_samples=12)  # more than the first file
    assert images.first(100)[:, 0, 0, 0].tolist() == list(range(12))
    for num_workers in (0, 2):
        order = numbers(images.batches(5, num_workers=num_workers), 24)
        assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert "--dataloader_num_workers 2 becomes 1" in caplog.text and "--max_train_samples" in caplog.text
    assert len(stream(data, max_train_samples=1000).first(1000)) == 27


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_workers_read_the_same_images(num_processes, data, caplog):
    """Two workers share three files; each of three processes has one file, so one worker."""
    shares = []
    for i in range(num_processes):
        images = stream(data, process_index=i, num_processes=num_processes)
        batches, size = images.batches(1, num_workers=2), len(range(27)[i::num_processes])
        shares.append([numbers(batches, size) for _ in range(2)])
    for epoch in zip(*shares):
        assert sorted(itertools.chain(*epoch)) == list(range(27))
    assert ("--dataloader_num_workers 2 becomes 1" in caplog.text) == (num_processes == 3)


def write_folder(folder):
    """Images of many modes and sizes, in classes."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 33, 4), dtype=np.uint8)
    palette = PIL.Image.fromarray(pixels[:, :, :3]).quantize(16)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    pictures = {
        "a/gray.png": PIL.Image.fromarray(pixels[:, :, 0]),
        "a/rgb.png": PIL.Image.fromarray(pixels[:, :, :3]),
        "a/rgba.png": PIL.Image.fromarray(pixels),
        "b/palette.png": palette,
        "b/sixteen.png": PIL.Image.fromarray(rng.integers(0, 65536, (16, 40), dtype=np.uint16)),
        "b/turned.jpg": PIL.Image.fromarray(pixels[:, :, :3]),
        "b/whole.bmp": PIL.Image.fromarray(pixels[:16, :16, :3]),
    }
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, **({"exif": turned} if name == "b/turned.jpg" else {}))
    return [folder / name for name in pictures]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_decoded_as_before_training(channels, tmp_path):
    """From a folder of images, from an archive of them, and from the bytes in Parquet files."""
    files = write_folder(tmp_path / "folder")
    expected = ImageDataset(
        load_images(None, None, str(tmp_path / "folder"), None, None, None), 16, channels, progress=False
    )
    expected = expected.__getitems__(range(7))
    (tmp_path / "archive").mkdir()
    with zipfile.ZipFile(tmp_path / "archive" / "train.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(tmp_path / "folder"))
    write_parquet(tmp_path / "parquet", [{"bytes": file.read_bytes(), "path": file.name} for file in files], 2)
    for name in ("folder", "archive", "parquet"):
        images = stream(tmp_path / name, resolution=16, channels=channels)
        assert images.channels == channels
        assert torch.equal(images.first(7), expected)
        batch = next(images.batches(7))
        assert all((image == batch).flatten(1).all(1).any() for image in expected)


def test_linked_images(tmp_path, monkeypatch, caplog):
    """Read from where they lie, and passed over if they don't exist, but not if they can't be reached."""
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_RETRY_INTERVAL", 0)
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("0.png", numbered(1)[0]["bytes"])
    schema = datasets.Features({"picture": datasets.Image()}).arrow_schema
    links = [f"zip://{name}.png::{tmp_path / 'images.zip'}" for name in ("0", "missing")]

    def write(links: list[str]) -> None:
        rows = pyarrow.table({"picture": [{"bytes": None, "path": link} for link in links]}, schema)
        pyarrow.parquet.write_table(rows, tmp_path / "data" / "train.parquet")

    write(links)
    assert numbers(stream(tmp_path / "data", skip_broken=True).batches(1), 2) == [0, 0]
    assert len(caplog.records) == 1 and f"{links[1]} (" in caplog.text
    write([links[0], "http://127.0.0.1:1/1.png"])
    images = stream(tmp_path / "data", skip_broken=True)
    with pytest.raises(Exception) as caught:
        numbers(images.batches(1), 2)
    assert not isinstance(caught.value, ValueError) and images.num_skipped == 0


def test_broken_image_is_refused_and_named(tmp_path):
    sources = numbered(9)
    sources[5]["bytes"] = sources[5]["bytes"][:40]
    images = stream(write_parquet(tmp_path / "data", sources, 3))
    assert len(images.first(5)) == 5
    with pytest.raises(ValueError, match=r"data.* 5\.png \("):
        images.first(9)
    for num_workers in (0, 2):
        with pytest.raises(ValueError, match=r"data.* 5\.png \("):
            next(images.batches(9, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_passed_over_and_counted(num_workers, tmp_path, caplog):
    """Damaged bytes, no image at all, pixels without a range."""
    sources = numbered(12)
    sources[0] = None
    sources[4] = {"bytes": b"no picture", "path": None}
    tiff = io.BytesIO()
    PIL.Image.new("F", (8, 8)).save(tiff, "tiff")
    sources[9] = {"bytes": tiff.getvalue(), "path": "9.tiff"}
    images = stream(write_parquet(tmp_path / "data", sources, 2), skip_broken=True)
    whole = [1, 2, 3, 5, 6, 7, 8, 10, 11]
    assert images.first(12)[:, 0, 0, 0].tolist() == whole
    assert images.num_skipped == 0  # counts what `batches` passes over
    order = numbers(images.batches(3, num_workers=num_workers), 30)
    assert sorted(order[:9]) == sorted(order[9:18]) == sorted(order[18:27]) == whole
    assert 9 <= images.num_skipped <= 12  # anew in each epoch, and the fourth has begun
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    assert (
        "row" in messages[0] and hashlib.sha256(b"no picture").hexdigest() in messages[1] and "9.tiff" in messages[2]
    )


def test_only_the_first_broken_images_are_named(tmp_path, caplog):
    broken = [{"bytes": b"no picture", "path": f"broken{i}.png"} for i in range(MAX_NAMED + 5)]
    images = stream(write_parquet(tmp_path / "data", [*broken, *numbered(2)]), skip_broken=True)
    assert sorted(numbers(images.batches(2), 4)) == [0, 0, 1, 1]
    assert images.num_skipped >= MAX_NAMED + 5
    assert len(caplog.records) == MAX_NAMED


def test_data_without_images_are_refused(data, tmp_path):
    folder = tmp_path / "folder"
    torn = next(data.iterdir()).read_bytes()[:300]
    with pytest.raises(ValueError, match="dataset_name .*folder"):
        stream(folder)
    with pytest.raises(ValueError, match="dataset_name .*folder"):
        stream(write_parquet(folder, []))
    for name, content, argument in (
        ("train.parquet", torn, "dataset_name"), ("train.jsonl", b"", "dataset_name"), ("train.jsonl", b'{"label": 1}\n', "image_column"),
    ):  # fmt: skip
        for path in folder.iterdir():
            path.unlink()
        with pytest.raises(ValueError, match="dataset_name .*folder"):
            stream(folder)
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=argument):
            stream(folder)


def test_a_column_without_images_is_refused(data):
    with pytest.raises(ValueError, match=r"image_column .*\['picture'\].*'label'"):
        stream(data, image_column="label")
    assert len(stream(data, image_column="picture").first(3)) == 3


def test_nothing_but_broken_images(tmp_path):
    write_parquet(tmp_path / "data", [{"bytes": b"no picture", "path": f"{i}.png"} for i in range(3)])
    for skip_broken, named in ((False, r".*0\.png"), (True, "")):
        with pytest.raises(ValueError, match=f"dataset_name .*data.*{named}"):
            stream(tmp_path / "data", skip_broken=skip_broken)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fewer_images_than_a_batch(num_workers, data, tmp_path):
    images = stream(data, num_processes=3)
    assert len(next(images.batches(9, num_workers=num_workers))) == 9
    with pytest.raises(ValueError, match=r"train_batch_size .*\(9\).* 10"):
        next(images.batches(10, num_workers=num_workers))
    images = stream(write_parquet(tmp_path / "data", numbered(1)), process_index=1, num_processes=2)
    with pytest.raises(ValueError, match=r"train_batch_size .*\(0\)"):
        next(images.batches(1))
