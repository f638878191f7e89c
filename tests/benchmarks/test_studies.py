# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the studies are made of, at toy size: rows that are not made twice, runs that resume, peers that train."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from training_runs import TINY, metrics, write_images

from common import study
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.data.digits import DigitFeatures, sample_images
from studies import peers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Disks at 16 px, measured over the features of a classifier that has learned nothing."""
    torch.manual_seed(0)
    images = write_images(tmp_path_factory.mktemp("data") / "images", count=16)
    real = (torch.rand(64, 1, 16, 16) * 255).to(torch.uint8)
    return SimpleNamespace(
        name="disks", device="cpu", num_samples=64, resolution=16, latent_channels=4, channels=(16, 16), learning_rate=5e-4,
        train=real, data_arguments=["--train_data_dir", str(images)], arguments=[*TINY, "--log_steps", "2"],
        metrics=study.reference(DigitFeatures().eval(), real),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"

    def run(command: list[str], check: bool) -> None:
        """A script in this process, as if it was the first."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        train_ecvae.main(command[2:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study.subprocess, "run", run)
        study.train(data, folder, 0, 8, "--checkpointing_steps", "4")
        yield folder


def test_existing_rows_are_not_made_again_and_not_taken_for_others(tmp_path):
    results, made = study.Results(tmp_path / "new" / "rows.jsonl"), []

    def make(name: str, seed: int) -> dict:
        made.append((name, seed))
        return {"frechet_distance": float(seed)}

    results.fill(["a"], [1], make, iterations=8, arguments={"a": ["--kl_weight", "1"]})
    with open(results.path, "a") as file:
        file.write('{"setting": "b", "se')  # cut off by a kill
    results.fill(["a", "b"], [2, 1, 0], make, iterations={"a": 8, "b": 9})
    assert made == [("a", 1), ("a", 2), ("b", 2), ("b", 1), ("a", 0), ("b", 0)]
    assert [row["seed"] for row in study.Results(results.path).of("a")] == [0, 1, 2]
    columns = {"each": study.each("frechet_distance", ".1f"), "median": study.middle("frechet_distance", ".1f")}
    assert results.table("setting", ["a", "c"], columns).splitlines()[2:] == ["| a | 0.0, 1.0, 2.0 | 1.0 |"]
    for other in ({"iterations": 9}, {"arguments": {"a": ["--kl_weight", "2"]}}):
        with pytest.raises(ValueError, match=next(iter(other))):
            results.fill(["a"], [1], make, **other)


def test_a_finished_run_is_not_trained_again_and_a_cut_one_resumes(data, trained):
    arguments = [8, "--checkpointing_steps", "4"]
    index, first = trained / "model_index.json", metrics(trained)
    written = index.stat().st_mtime_ns
    study.train(data, trained, 0, *arguments)
    assert index.stat().st_mtime_ns == written
    for other in ([9, *arguments[1:]], [*arguments, "--kl_weight", "2"]):
        with pytest.raises(ValueError, match="run was trained with .*--output_dir"):
            study.train(data, trained, 0, *other)
    index.unlink()
    study.train(data, trained, 0, *arguments)
    # Saved from its last checkpoint: the steps before it are those of the first time.
    assert metrics(trained) == first and index.is_file()


def test_row_of_a_run(data, trained):
    row, last = study.trained_row(data, trained), metrics(trained)[-1]
    assert [row[key] for key in ("dual", "training_seconds")] == [last["dual"], last["training_seconds"]]
    assert row["frechet_distance"] > 0 and row["rollbacks"] == 0
    # New networks' energies are nearly straight over so short a chain, and over one step they are a critic's.
    assert 0.9 < row["cosine_to_critic"] <= 1 + 1e-6
    pipeline = ECVAEPipeline.from_pretrained(trained)
    pipeline.scheduler = type(pipeline.scheduler)(num_steps=1)
    assert study.cosine_to_critic(pipeline) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("weight", [None, 10.0])
def test_adversarial_peers_train_both_networks(data, weight):
    torch.manual_seed(0)
    before = [dict(network.named_parameters()) for network in peers.networks(data)]
    torch.manual_seed(0)
    pipeline = peers.adversarial(data, 2, weight, rate=5e-4)
    still = [
        {name for name, parameter in network.named_parameters() if torch.equal(parameter, start[name])}
        for network, start in zip((pipeline.vae, pipeline.energy_model), before)
    ]
    # Without an ELBO nothing trains the encoder.
    assert still[0] == ({name for name in before[0] if name.startswith("encoder")} if weight is None else set())
    # While every margin is short, the hinge on data pushes the last bias down as that on samples pushes it up.
    assert {name for name in still[1] if not name.endswith(("._u", "._v"))} == {"networks.0.conv_out.bias"}
    assert sample_images(pipeline, 6, seed=1).shape == (6, 1, 16, 16)


def test_the_vaebm_way_freezes_the_vae(data, trained):
    pipeline = peers.vaebm(data, 2, trained, drift=1.0)
    expected = ECVAEPipeline.from_pretrained(trained).vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pipeline.vae.state_dict().items())
    images = peers.sample_in_steps(pipeline, 6, num_refinement_steps=peers.TEST_STEPS)
    assert images.shape == (6, 1, 16, 16) and not torch.equal(images, sample_images(pipeline, 6, seed=1))


def test_the_ddpm_has_as_many_parameters_and_trains(data):
    wanted = sum(network.num_parameters() for network in peers.networks(data))
    pipeline = peers.ddpm(data, 2, rate=5e-4)
    assert pipeline.unet.num_parameters() == pytest.approx(wanted, rel=0.2)
    images = peers.sample_in_steps(pipeline, 2, num_inference_steps=3)
    assert images.shape == (2, 1, 16, 16) and images.dtype == torch.uint8


@pytest.mark.parametrize(
    "name, file, own, line",
    [
        ("chain_study", "chain_digits", {"setting": "K 1"}, "| K 1 | 314.7 | 314.7 | | | 12 | | | 0 |"),
        ("fault_study", "faults_digits", {"setting": "undisturbed"}, "| undisturbed | 314.7 | 314.7 | 1.00 | 0 | |"),
        (
            "flow_study --fashion_mnist nothing", "flow_16", {"setting": "trained on", "bits_per_dimension": 3.5},
            "| trained on | 3.500 | 3.500 | 314.7 | 314.7 | 0.2000 | 12 | | 0 | 0.060 |",
        ),
        (
            "decoder_study --cifar10 nothing", "decoder", {"setting": "AutoencoderKL, calibrated", "psnr": 24.0},
            "| AutoencoderKL, calibrated | 314.7 | 314.7 | 0.2000 | 24.00 | 24.00 | 12 |",
        ),
    ],
)  # fmt: skip
def test_a_table_is_printed_without_the_data(name, file, own, line, tmp_path, capsys, monkeypatch):
    row = {"frechet_distance": 314.7, "kernel_distance": 0.2, "dual": 12.0, "rollbacks": 0, "training_seconds": 90.0}
    results = study.Results(tmp_path / f"{file}.jsonl")
    results.fill([own["setting"]], [0], lambda name, seed: row | own, iterations=1500)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*name.split(), "--table", "--output_dir", str(tmp_path)])
    importlib.import_module(f"studies.{name.split()[0]}").main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[2:] == [line] and printed[0].count("|") == printed[1].count("|") == line.count("|")
