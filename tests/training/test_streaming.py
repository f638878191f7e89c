"""Every image of a stream is there once an epoch, decoded as before training, whoever reads it."""

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
    return StreamedImages(str(folder), None, image_column, None, max_train_samples, resolution, channels, **kwargs)


def numbers(batches, count: int) -> list[int]:
    """The first `count` images' numbers."""
    found = []
    while len(found) < count:
        batch = next(batches)
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 8, 8)
        assert (batch[:, 1] == 255 - batch[:, 0]).all()
        found += batch[:, 0, 0, 0].tolist()
    return found[:count]


def test_every_image_once_an_epoch_in_another_order(data):
    images = stream(data, shuffle_buffer_size=10)
    order = numbers(images.batches(4), 3 * 27)  # batches reach over the ends of epochs
    epochs = [order[:27], order[27:54], order[54:]]
    assert all(sorted(epoch) == list(range(27)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(27)]}) == 4
    assert numbers(stream(data, shuffle_buffer_size=10).batches(9), 3 * 27) == order


def test_the_order_depends_on_seed_reseed_and_first_batch(data):
    images = stream(data)
    orders = [numbers(images.batches(9), 27), numbers(stream(data, seed=1).batches(9), 27)]
    orders += [numbers(images.batches(9, reseed=1), 27), numbers(images.batches(9, first_batch=1), 27)]
    assert all(sorted(order) == list(range(27)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert numbers(images.batches(9, first_batch=1), 27) == orders[3]


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


def test_the_first_samples_only(data):
    images = stream(data, max_train_samples=12)  # more than the first file
    assert images.first(100)[:, 0, 0, 0].tolist() == list(range(12))
    order = numbers(images.batches(5), 24)
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert len(stream(data, max_train_samples=1000).first(1000)) == 27


def test_small_buffer_draws_from_few_images(data):
    order = numbers(stream(data, max_train_samples=27, shuffle_buffer_size=2).batches(27), 27)
    assert sorted(order) == list(range(27)) and all(number <= i + 2 for i, number in enumerate(order))


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
    warned = "--dataloader_num_workers 2 becomes 1: a worker needs files of its own" in caplog.text
    assert warned == (num_processes == 3)


def test_a_limited_stream_has_one_worker(data, caplog):
    order = numbers(stream(data, max_train_samples=12).batches(4, num_workers=2), 12)
    assert sorted(order) == list(range(12))
    assert "--dataloader_num_workers 2 becomes 1" in caplog.text and "--max_train_samples" in caplog.text


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
    for broken in (
        lambda: images.first(9),
        lambda: next(images.batches(9)),
        lambda: next(images.batches(9, num_workers=2)),
    ):
        with pytest.raises(ValueError, match=r"holds images that can't be read, among them: 5\.png \("):
            broken()
    assert len(images.first(5)) == 5


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
    assert "a row without an image (there is none)" in messages[0]
    assert (
        f"an image without a path, SHA-256 {hashlib.sha256(b'no picture').hexdigest()} (cannot identify" in messages[1]
    )
    assert "9.tiff (mode F has no agreed range" in messages[2]


def test_only_the_first_broken_images_are_named(tmp_path, caplog):
    broken = [{"bytes": b"no picture", "path": f"broken{i}.png"} for i in range(MAX_NAMED + 5)]
    images = stream(write_parquet(tmp_path / "data", [*broken, *numbered(2)]), skip_broken=True)
    assert sorted(numbers(images.batches(2), 4)) == [0, 0, 1, 1]
    assert images.num_skipped >= MAX_NAMED + 5
    assert len(caplog.records) == MAX_NAMED and "Further ones are not named." in caplog.records[-1].message


def test_global_generator_is_left_alone(data):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    numbers(stream(data).batches(9), 54)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments_are_named(data, tmp_path):
    with pytest.raises(ValueError, match=r"--image_column must be one of \['picture'\] in .*, but is 'label'"):
        stream(data, image_column="label")
    assert len(stream(data, image_column="picture").first(3)) == 3
    with pytest.raises(ValueError, match="--dataset_name .*nothing.* can't be loaded"):
        stream(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--dataset_name .*empty.* can't be loaded"):
        stream(tmp_path / "empty")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "train.parquet").write_bytes(next(data.iterdir()).read_bytes()[:300])
    with pytest.raises(ValueError, match="--dataset_name .*torn.* can't be (loaded|streamed)"):
        stream(tmp_path / "torn")
    with pytest.raises(ValueError, match="--dataset_name .*rows.* holds no image that can be read"):
        stream(write_parquet(tmp_path / "rows", []))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="--dataset_name .*text.* can't be loaded: it is empty"):
        stream(tmp_path / "text")
    (tmp_path / "text" / "train.jsonl").write_text('{"label": 1}\n')
    with pytest.raises(ValueError, match=r"has the image columns \[\]: choose one with --image_column"):
        stream(tmp_path / "text")


def test_nothing_but_broken_images(tmp_path):
    write_parquet(tmp_path / "data", [{"bytes": b"no picture", "path": f"{i}.png"} for i in range(3)])
    with pytest.raises(ValueError, match=r"--dataset_name .*data.* can't be streamed: .*0\.png"):
        stream(tmp_path / "data")
    with pytest.raises(ValueError, match="--dataset_name .*data.* holds no image that can be read"):
        stream(tmp_path / "data", skip_broken=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fewer_images_than_a_batch(num_workers, data):
    images = stream(data, num_processes=3)
    assert len(next(images.batches(9, num_workers=num_workers))) == 9
    with pytest.raises(ValueError, match=r"--train_batch_size must be at most .* a process \(9\), but is 10"):
        next(images.batches(10, num_workers=num_workers))


def test_process_without_images(tmp_path):
    images = stream(write_parquet(tmp_path / "data", numbered(1)), process_index=1, num_processes=2)
    with pytest.raises(ValueError, match=r"a process \(0\)"):
        next(images.batches(1))
