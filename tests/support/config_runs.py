"""Short runs of the configs in training/configs, on images made here."""

from pathlib import Path

import torch
import yaml
from training_runs import SCRIPT, succeed, write_images

from ecvae_diffusers import ECVAEPipeline


CONFIGS = SCRIPT.parent / "configs"


def two_steps(name: str, folder: Path, *extra, **kwargs) -> str:
    """
    Two steps of a config's own networks at its own resolution, with an evaluation, in full precision; the saved
    pipeline then samples one image. Returns what the run printed.
    """
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    channels, resolution = config["in_channels"], config["resolution"]
    images = write_images(folder / "images", count=8, mode="L" if channels == 1 else "RGB", size=resolution)
    # Only a data set can be streamed, which a folder of images is too.
    source = "--dataset_name" if config.get("streaming") else "--train_data_dir"
    evaluation = ["--evaluation_samples", 8] if "evaluation_steps" in config else []
    result = succeed(
        "--config", CONFIGS / f"{name}.yaml", source, images, "--output_dir", folder / "out", "--max_train_steps", 2,
        "--mixed_precision", "no", "--train_batch_size", 8, *evaluation, *extra, **kwargs,
    )  # fmt: skip
    sample = ECVAEPipeline.from_pretrained(folder / "out")(output_type="pt").images
    assert sample.shape == (1, channels, resolution, resolution) and torch.isfinite(sample).all()
    return result.stdout
