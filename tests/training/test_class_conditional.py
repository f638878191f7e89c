# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""`--class_conditional`: where classes come from, that they are learned and resumed, and what is refused."""

import datasets
import PIL.Image
import pytest
import torch
from training_runs import TINY, metrics, train, train_tiny, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training.data.images import load_images
from ecvae_diffusers.training.data.transforms import forget_classes
from ecvae_diffusers.training.randomness import StepNoise
from ecvae_diffusers.training.tasks.vae_config import ClassDataConfig


LEVELS = {"black": 0, "gray": 128, "white": 255}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Plain images of three levels, 4 black, 8 gray and 12 white ones, some in a folder below that of the class."""
    folder = tmp_path_factory.mktemp("data")
    for (name, level), count in zip(LEVELS.items(), (4, 8, 12)):
        (folder / name / "more").mkdir(parents=True)
        for i in range(count):
            place = folder / name / ("more" if i % 2 else "")
            PIL.Image.new("L", (16, 16), level).save(place / f"{i}.png")
    return folder


def mean_levels(pipeline: ECVAEPipeline) -> list[float]:
    images = pipeline(class_labels=[name for name in LEVELS for _ in range(8)], output_type="pt").images
    return [255 * one.mean().item() for one in images.chunk(3)]


def test_learns_the_sub_folders_and_resumes_bit_for_bit(folder, tmp_path):
    """Samples of a class have its level; a run of two parts is the run of one."""
    arguments = ["--class_conditional", "--langevin_steps", 1, "--learning_rate", 5e-3, "--kl_weight", 100]
    arguments += ["--no-use_ema", "--checkpointing_steps", 30]
    train_tiny(folder, tmp_path / "whole", 60, *arguments)
    pipeline = ECVAEPipeline.from_pretrained(tmp_path / "whole")
    config = pipeline.vae.config
    assert config.id2label == {str(i): name for i, name in enumerate(LEVELS)}
    assert config.class_frequencies == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=1e-6)
    black, gray, white = mean_levels(pipeline)
    assert black + 40 < gray < white - 40
    train_tiny(folder, tmp_path / "parts", 30, *arguments)
    train_tiny(folder, tmp_path / "parts", 60, "--resume_from_checkpoint", "latest")
    whole, parts = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [one["dual"] for one in whole] == [one["dual"] for one in parts]
    assert mean_levels(ECVAEPipeline.from_pretrained(tmp_path / "parts")) == [black, gray, white]


@pytest.mark.parametrize("kind", ["labels", "texts", "numbers"])
def test_a_column_of_a_data_set_has_the_classes(kind, tmp_path):
    names = ["zebra", "ant", "zebra", "bee"]
    values = {"labels": [2, 0, 2, 1], "texts": names, "numbers": [30, 10, 30, 20]}[kind]
    feature = (
        datasets.ClassLabel(names=["ant", "bee", "zebra"])
        if kind == "labels"
        else datasets.Value("string" if kind == "texts" else "int32")
    )
    features = datasets.Features({"image": datasets.Image(), "kind": feature, "other": datasets.Value("float32")})
    images = [PIL.Image.new("L", (16, 16), level) for level in (0, 50, 100, 150)]
    rows = {"image": images, "kind": values, "other": [0.0] * 4}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")

    def load(class_column: str | None):
        return load_images(
            ClassDataConfig(dataset_name=str(tmp_path), class_conditional=True, class_column=class_column)
        )

    pictures = load("kind")
    assert pictures.labels == [2, 0, 2, 1]
    assert pictures.class_names == (["10", "20", "30"] if kind == "numbers" else ["ant", "bee", "zebra"])
    assert pictures.select([3, 0]).labels == [1, 2]
    if kind == "labels":
        assert load(None).labels == pictures.labels
    else:
        with pytest.raises(ValueError, match="--class_column"):
            load(None)
    for column in ("other", "image", "nothing"):
        with pytest.raises(ValueError, match="--class_column"):
            load(column)


def test_rows_without_a_class_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [PIL.Image.new("L", (16, 16))] * 2, "label": [0, None]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="--class_column"):
        load_images(ClassDataConfig(dataset_name=str(tmp_path), class_conditional=True))


@pytest.mark.parametrize(
    "extra, named",
    [
        (["--class_column", "label"], "--class_column"),
        (["--class_conditional", "--class_column", "label"], "--class_column"),
        (["--class_conditional", "--calibration", "both"], "--calibration"),
        (["--class_conditional", "--streaming", "--in_channels", 1], "--streaming"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(extra, named, tmp_path, capfd):
    with pytest.raises(SystemExit):
        train_tiny(tmp_path, tmp_path / "out", 1, *extra)
    assert named in capfd.readouterr().err


def test_images_outside_of_the_sub_folders_are_refused(tmp_path):
    data = write_images(tmp_path / "data" / "disks")
    PIL.Image.new("L", (16, 16)).save(data.parent / "outside.png")
    with pytest.raises(SystemExit, match="--train_data_dir"):
        train_tiny(data.parent, tmp_path / "out", 1, "--class_conditional")
    assert not (tmp_path / "out").exists()


def test_a_pretrained_model_must_have_the_classes_of_the_data(folder, images, tmp_path):
    train_tiny(folder, tmp_path / "run", 1, "--class_conditional", "--calibration", "none")
    for data, extra in ((images, []), (folder, []), (folder / "black", ["--class_conditional"])):
        with pytest.raises(SystemExit, match="--pretrained_model_name_or_path|--train_data_dir"):
            arguments = ["--train_batch_size", 4, "--pretrained_model_name_or_path", tmp_path / "run", *extra]
            train_tiny(data, tmp_path / "other", 1, *arguments)


def test_a_share_of_classes_is_forgotten():
    labels = torch.arange(4).repeat(5000)
    found = forget_classes(labels, 0.1, 4, StepNoise(0, 0, 0, 1, torch.device("cpu")))
    assert ((found == labels) | (found == 4)).all()
    assert (found == 4).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_changed_class_is_another_data_set(folder, tmp_path):
    """A resumed run must have the classes that it began with."""
    arguments = ["--train_data_dir", tmp_path / "data", "--output_dir", tmp_path / "run", *TINY, "--class_conditional"]
    for name, level in LEVELS.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            PIL.Image.new("L", (16, 16), level).save(tmp_path / "data" / name / f"{i}.png")
    train(*arguments, "--max_train_steps", 1, "--checkpointing_steps", 1)
    (tmp_path / "data" / "black").rename(tmp_path / "data" / "zinc")
    with pytest.raises(SystemExit, match="hash_of_images"):
        train(*arguments, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
