"""Small data sets in Parquet files, and feeds of them."""

import io
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import torch

from ecvae_diffusers.training.config import DataConfig
from ecvae_diffusers.training.data.loaders import StreamFeed


def encoded(image: PIL.Image.Image, kind: str = "png") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def numbered(count: int) -> list[dict]:
    """Images that carry their number in their first channel."""
    return [
        {"bytes": encoded(PIL.Image.new("RGB", (8, 8), (i, 255 - i, 7))), "path": f"{i}.png"} for i in range(count)
    ]


def write_parquet(folder: Path, sources: list[dict | None], num_files: int = 1) -> Path:
    """A data set with a column `picture`, and one of labels."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
    for i, part in enumerate(np.array_split(np.arange(len(sources)), num_files)):
        rows = {"picture": [sources[k] for k in part], "label": part.tolist()}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{i:05}-of-{num_files:05}.parquet")
    return folder


def feed_of(
    folder: str | Path, batch_size=1, size=8, channels=3, skip_broken=False, workers=0, seed=0, rank=0, ranks=1, **data
) -> StreamFeed:
    """A feed of a stream, as process `rank` of `ranks` has it."""
    data |= {"dataset_name": str(folder), "streaming": True, "resolution": size, "in_channels": channels}
    config = DataConfig(skip_broken_images=skip_broken, dataloader_num_workers=workers, **data)
    process = SimpleNamespace(
        process_index=rank, num_processes=ranks, is_main_process=rank == 0, device=torch.device("cpu")
    )
    return StreamFeed(config, process, batch_size, seed)
