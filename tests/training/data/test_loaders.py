"""
Each image of a stream comes once per epoch, decoded as before training, whichever process or worker reads it; and no run resumes on
other images than it began with.
"""

import hashlib
import itertools
import zipfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_sets import encoded, feed_of, numbered, write_parquet
from training_runs import TINY, TINY_DECODER, train, train_tiny, write_autoencoder, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training.data import loaders
from ecvae_diffusers.training.data.files import find_images, trained_hashes
from ecvae_diffusers.training.data.images import decode_pictures


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch):
    """`datasets` waits 5 seconds at each end of a stream of Parquet files, for the sake of the interpreter's exit."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """27 images in 3 files."""
    return write_parquet(tmp_path_factory.mktemp("stream") / "data", numbered(27), num_files=3)


def numbers(feed, count: int, first_batch: int = 0, reseed: int = 0) -> list[int]:
    """The first `count` images' numbers."""
    found, batches = [], feed.batches(first_batch, reseed)
    while len(found) < count:
        batch, labels = next(batches)
        assert labels is None
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 8, 8)
        assert (batch[:, 1] == 255 - batch[:, 0]).all()
        found += batch[:, 0, 0, 0].tolist()
    return found[:count]


def test_every_image_once_per_epoch_in_another_order(data, monkeypatch):
    monkeypatch.setattr(loaders, "SHUFFLE_BUFFER_SIZE", 10)
    order = numbers(feed_of(data, 4), 3 * 27)  # batches reach over the ends of epochs
    epochs = [order[:27], order[27:54], order[54:]]
    assert all(sorted(epoch) == list(range(27)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(27)]}) == 4
    assert numbers(feed_of(data, 9), 3 * 27) == order
    monkeypatch.setattr(loaders, "SHUFFLE_BUFFER_SIZE", 2)
    order = numbers(feed_of(data, 27, max_train_samples=27), 27)
    assert sorted(order) == list(range(27)) and all(number <= i + 2 for i, number in enumerate(order))


def test_the_order_depends_on_seed_reseed_and_first_batch(data):
    feed, state = feed_of(data, 9), torch.get_rng_state()
    orders = [numbers(feed, 27), numbers(feed_of(data, 9, seed=1), 27)]
    orders += [numbers(feed, 27, reseed=1), numbers(feed, 27, first_batch=1)]
    assert all(sorted(order) == list(range(27)) for order in orders) and len(set(map(tuple, orders))) == 4
    assert numbers(feed, 27, first_batch=1) == orders[3]
    assert torch.equal(torch.get_rng_state(), state)  # and not on the global generator


@pytest.mark.parametrize("ranks, workers, max_train_samples", [(2, 2, None), (3, 2, None), (3, 0, 20), (1, 2, 12)])
def test_shares_are_disjoint_and_together_whole(ranks, workers, max_train_samples, data, caplog):
    """Two processes share the images of three files, three have a file and one worker each; with a limit, all share the images."""
    total, shares = max_train_samples or 27, []
    for i in range(ranks):
        feed = feed_of(data, workers=workers, max_train_samples=max_train_samples, rank=i, ranks=ranks, seed=3)
        size = len(range(i, total, ranks))
        both = numbers(feed, 2 * size)
        shares.append([both[:size], both[size:]])
        assert feed.first(100)[:, 0, 0, 0].tolist() == list(range(total))
    for epoch in zip(*shares):
        assert sorted(itertools.chain(*epoch)) == list(range(total))
    fewer_workers = workers == 2 and (ranks == 3 or max_train_samples is not None)
    assert ("--dataloader_num_workers 2 becomes 1" in caplog.text) == fewer_workers


def write_folder(folder: Path) -> list[Path]:
    """Images of several modes and sizes, in classes."""
    rng, turned = np.random.default_rng(0), PIL.Image.Exif()
    pixels = rng.integers(0, 256, (20, 33, 4), dtype=np.uint8)
    turned[0x0112] = 6
    pictures = {
        "a/rgba.png": PIL.Image.fromarray(pixels),
        "b/sixteen.png": PIL.Image.fromarray(rng.integers(0, 65536, (16, 40), dtype=np.uint16)),
        "b/turned.jpg": PIL.Image.fromarray(pixels[:, :, :3]),
    }
    for name, picture in pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, **({"exif": turned} if name == "b/turned.jpg" else {}))
    return [folder / name for name in pictures]


@pytest.mark.parametrize("channels", [1, 4])
def test_decoded_as_before_training(channels, tmp_path):
    """From a folder, an archive, and the bytes in Parquet files."""
    files = write_folder(tmp_path / "folder")
    expected = decode_pictures(find_images(tmp_path / "folder"), channels, 16, progress=False)
    (tmp_path / "archive").mkdir()
    with zipfile.ZipFile(tmp_path / "archive" / "train.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(tmp_path / "folder"))
    write_parquet(tmp_path / "parquet", [{"bytes": file.read_bytes(), "path": file.name} for file in files], 2)
    for name in ("folder", "archive", "parquet"):
        feed = feed_of(tmp_path / name, 3, size=16, channels=channels)
        assert feed.channels == channels and torch.equal(feed.first(3), expected)
        batch, _ = next(feed.batches(0, 0))
        assert all((image == batch).flatten(1).all(1).any() for image in expected)


def test_linked_images(tmp_path, monkeypatch, caplog):
    """Read from where they lie, and passed over if they don't exist, but not if they can't be reached."""
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 1)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_RETRY_INTERVAL", 0)
    (tmp_path / "data").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("0.png", numbered(1)[0]["bytes"])
    schema = datasets.Features({"picture": datasets.Image()}).arrow_schema
    there, missing = (f"zip://{name}.png::{tmp_path / 'images.zip'}" for name in ("0", "missing"))

    def feed_of_links(*links: str):
        rows = pyarrow.table({"picture": [{"bytes": None, "path": link} for link in links]}, schema)
        pyarrow.parquet.write_table(rows, tmp_path / "data" / "train.parquet")
        return feed_of(tmp_path / "data", skip_broken=True)

    assert numbers(feed_of_links(there, missing), 2) == [0, 0]
    assert len(caplog.records) == 1 and f"{missing} (" in caplog.text
    with pytest.raises(Exception) as caught:
        numbers(feed_of_links(there, "http://127.0.0.1:1/1.png"), 2)
    assert not isinstance(caught.value, ValueError)


def test_broken_images_are_named_and_refused_or_passed_over(tmp_path, caplog):
    """Damaged bytes, no image at all, pixels without a range."""
    sources = numbered(12)
    sources[0] = None
    sources[4] = {"bytes": b"no picture", "path": None}
    sources[9] = {"bytes": encoded(PIL.Image.new("F", (8, 8)), "tiff"), "path": "9.tiff"}
    whole = [1, 2, 3, 5, 6, 7, 8, 10, 11]
    folder = write_parquet(tmp_path / "data", sources, 2)
    with pytest.raises(ValueError, match="data.* row"):
        feed_of(folder)
    feed = feed_of(folder, 3, workers=2, skip_broken=True)
    assert feed.first(12)[:, 0, 0, 0].tolist() == whole
    order = numbers(feed, 27)
    assert sorted(order[:9]) == sorted(order[9:18]) == sorted(order[18:]) == whole
    messages = [record.message for record in caplog.records]
    parts = ("row", hashlib.sha256(b"no picture").hexdigest(), "9.tiff")
    assert all(part in message for part, message in zip(parts, messages, strict=True))
    # Of the second file, and so not among the first images.
    sources = numbered(8)
    sources[5]["bytes"] = sources[5]["bytes"][:40]
    feed = feed_of(write_parquet(tmp_path / "later", sources, 2), 4, workers=2)
    with pytest.raises(ValueError, match=r"later.* 5\.png \("):
        numbers(feed, 8)


def test_data_without_images_are_refused(data, tmp_path):
    folder = tmp_path / "folder"
    torn = next(data.iterdir()).read_bytes()[:300]
    with pytest.raises(ValueError, match="dataset_name .*folder"):
        feed_of(folder)
    folder.mkdir()
    for name, content, argument in (
        ("train.parquet", torn, "dataset_name"), ("train.jsonl", b"", "dataset_name"), ("train.jsonl", b'{"label": 1}\n', "image_column"),
    ):  # fmt: skip
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=argument):
            feed_of(folder)
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"image_column .*\['picture'\].*'label'"):
        feed_of(data, image_column="label")
    assert len(feed_of(data, image_column="picture").first(3)) == 3


def test_fewer_images_than_a_batch(data, tmp_path):
    """Of all files, or of those of this process."""
    with pytest.raises(ValueError, match=r"train_batch_size .*\(9\).* 10"):
        feed_of(data, 10, ranks=3)
    folder = write_parquet(tmp_path / "data", numbered(7), 1)
    write_parquet(folder / "more", numbered(1), 1)
    feed = feed_of(folder, 4, workers=1, rank=0, ranks=2)
    with pytest.raises(ValueError, match=r"train_batch_size .*\(1\)"):
        numbers(feed, 8)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_resumes_on_its_own_images_alone(streaming, tmp_path):
    """In the folder of its own data set, where its pictures are no data."""
    data = write_images(tmp_path / "data", count=8)
    out = data / "train_run"
    given = [
        *TINY, "--dataset_name", data, "--in_channels", 1, "--output_dir", out, "--resume_from_checkpoint", "latest",
        "--checkpointing_steps", 1, "--streaming" if streaming else "--no-streaming", "--calibration", "none",
    ]  # fmt: skip
    train(*given, "--max_train_steps", 1)
    hashes = trained_hashes(out)
    assert hashes is None if streaming else len(hashes) == 8
    train(*given, "--max_train_steps", 2)
    assert (out / "checkpoint-2").is_dir() and trained_hashes(out) == hashes
    image = PIL.Image.open(data / "003.png")
    image.putpixel((0, 0), 255 - image.getpixel((0, 0)))
    image.save(data / "003.png")
    with pytest.raises(SystemExit, match="hash_of_images"):
        train(*given, "--max_train_steps", 3)
    assert not (out / "checkpoint-3").exists()
    if not streaming:
        # Another run, from this one: what that was trained on counts for its model as well.
        train_tiny(data, tmp_path / "further", 1, "--pretrained_model_name_or_path", out)
        assert trained_hashes(tmp_path / "further" / "vae") > hashes


def test_a_vae_and_a_decoder_train_on_a_stream(data, tmp_path):
    stream = ["--dataset_name", data, "--streaming", "--dataloader_num_workers", 2, "--max_train_steps", 1]
    train(*stream, *TINY, "--in_channels", 3, "--output_dir", tmp_path / "vae")
    assert ECVAEPipeline.from_pretrained(tmp_path / "vae").vae.config.reconstruction_variance > 0
    # In its own channels.
    start = ["--pretrained_model_name_or_path", write_autoencoder(tmp_path / "model")]
    train(*stream, *TINY_DECODER, *start, "--output_dir", tmp_path / "decoder", script="calibrate_decoder")
    assert (tmp_path / "decoder" / "energy_model").is_dir()
