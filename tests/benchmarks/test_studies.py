# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the studies are made of, at toy size: rows that are not made twice, runs that resume, peers that train."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import TINY, metrics, write_images

from common import study
from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training.data.digits import DigitFeatures, sample_images
from studies import peers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Disks at 16 px, measured over the features of a classifier that has learned nothing."""
    torch.manual_seed(0)
    images = write_images(tmp_path_factory.mktemp("data") / "images", count=16)
    real = (torch.rand(64, 1, 16, 16) * 255).to(torch.uint8)
    measured = study.reference(DigitFeatures().eval(), real)
    return SimpleNamespace(
        name="disks", device="cpu", num_samples=64, resolution=16, latent_channels=4, channels=(16, 16), learning_rate=5e-4,
        train=real, data_arguments=["--train_data_dir", str(images)], arguments=[*TINY, "--log_steps", "2"],
        measure=lambda samples: study.against(measured, samples),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    study.train(data, folder, 0, 8)
    return folder


def python(code: str, *arguments) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(study.__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_existing_rows_are_not_made_again(tmp_path):
    results, made = study.Results(tmp_path / "new" / "rows.jsonl"), []

    def make(name: str, seed: int) -> dict:
        made.append((name, seed))
        return {"frechet_distance": float(seed)}

    results.fill(["a"], [1], make)
    results.fill(["a", "b"], [2, 1, 0], make)
    assert made == [("a", 1), ("a", 2), ("b", 2), ("b", 1), ("a", 0), ("b", 0)]
    assert [row["seed"] for row in study.Results(results.path).of("a")] == [0, 1, 2]
    assert study.median(results.of("a"), "frechet_distance") == 1


def test_rows_of_other_runs_are_not_taken_for_these(tmp_path):
    """Another length or other arguments are refused, another number of samples measured anew; half a line is no row."""
    path = tmp_path / "rows.jsonl"
    results = study.Results(path, num_samples=32)
    for count in (16, 32, 32):
        row = {"frechet_distance": float(count)}
        made_with = {"iterations": 8, "arguments": {"a": ["--kl_weight", "1"]}}
        study.Results(path, num_samples=count).fill(["a"], [0], lambda name, seed, row=row: row, **made_with)
    assert [row["frechet_distance"] for row in results.rows()] == [32.0]
    for other in ({"iterations": {"a": 9, "b": 8}}, {"arguments": {"a": ["--kl_weight", "2"]}}):
        with pytest.raises(ValueError, match=next(iter(other))):
            results.fill(["a"], [0], lambda name, seed: {}, **other)
    with open(path, "a") as file:
        file.write('{"setting": "b", "se')
    results.fill(["b"], [0], lambda name, seed: {}, iterations=8)
    assert [row["setting"] for row in results.rows()] == ["a", "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_training_ends_with_the_study(tmp_path):
    """However it ends: a restarted study must not find its run being trained still."""
    code = (
        "import subprocess; from common import study\n"
        "child = subprocess.Popen(['sleep', '300'], preexec_fn=study.end_with_parent)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    with python(code) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.is_file() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    raise AssertionError("the child has outlived the study")


def test_a_finished_run_is_not_trained_again_and_a_cut_one_resumes(data, trained, tmp_path):
    written = (trained / "model_index.json").stat().st_mtime_ns
    study.train(data, trained, 0, 8)
    assert (trained / "model_index.json").stat().st_mtime_ns == written
    for other in ([9], [8, "--kl_weight", "2"]):
        with pytest.raises(ValueError, match="run was trained with .*--output_dir"):
            study.train(data, trained, 0, *other)

    arguments = [8, "--checkpointing_steps", "4"]
    study.train(data, tmp_path / "run", 0, *arguments)
    first = metrics(tmp_path / "run")
    (tmp_path / "run" / "model_index.json").unlink()
    study.train(data, tmp_path / "run", 0, *arguments)
    # Saved from its last checkpoint: the steps before it are those of the first time.
    assert metrics(tmp_path / "run") == first and (tmp_path / "run" / "model_index.json").is_file()


def test_a_run_that_another_study_has_is_waited_for(data, tmp_path):
    """It is not removed as a broken one: two studies may resume the same run."""
    code = (
        "import sys, time; from pathlib import Path; from common import study\n"
        "with study.alone(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(4); Path(sys.argv[2]).touch()"
    )
    folder, ended = tmp_path / "runs" / "run", tmp_path / "ended"
    with python(code, tmp_path / "runs" / "run.lock", ended) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(subprocess.CalledProcessError):
            study.train(data, folder, 0, 1, "--no_such_argument")
        assert ended.is_file()


def test_row_of_a_run(data, trained):
    row, last = study.trained_row(data, trained), metrics(trained)[-1]
    assert [row[key] for key in ("dual", "training_seconds")] == [last["dual"], last["training_seconds"]]
    assert row["frechet_distance"] > 0 and row["rollbacks"] == 0
    # New networks' energies are nearly straight over so short a chain, and over one step they are a critic's.
    assert 0.9 < row["cosine_to_critic"] <= 1 + 1e-6
    pipeline = ECVAEPipeline.from_pretrained(trained)
    pipeline.scheduler = type(pipeline.scheduler)(num_steps=1)
    assert study.cosine_to_critic(pipeline) == pytest.approx(1, abs=1e-5)


def test_features_of_the_data_are_remembered_and_know_it_from_noise(data, tmp_path):
    torch.manual_seed(0)
    features, calls = DigitFeatures().eval(), []
    features.register_forward_hook(lambda *_: calls.append(1))
    first, other = (torch.rand(2, 3, 1, 16, 16) * 255).to(torch.uint8)
    expected = features(first)
    for _ in range(2):
        remembered = study.RememberedFeatures(features, tmp_path / "features")
        assert torch.equal(remembered(first), expected)
        assert not torch.equal(remembered(other), expected)
    assert len(calls) == 1 + 2
    distances = [data.measure(images)["frechet_distance"] for images in (data.train, torch.zeros_like(data.train))]
    assert distances[0] < 1e-3 < distances[1]


@pytest.mark.parametrize("weight", [None, 10.0])
def test_adversarial_peers_train_both_networks(data, weight):
    torch.manual_seed(0)
    before = [dict(network.named_parameters()) for network in peers.networks(data)]
    torch.manual_seed(0)
    pipeline, seconds = peers.adversarial(data, "peer", 2, weight, rate=5e-4)
    still = [
        {
            name
            for name, parameter in network.named_parameters()
            if torch.equal(parameter, start[name]) and not name.endswith(("._u", "._v"))
        }
        for network, start in zip((pipeline.vae, pipeline.energy_model), before)
    ]
    # Without an ELBO nothing trains the encoder.
    assert still[0] == ({name for name in before[0] if name.startswith("encoder")} if weight is None else set())
    # While every margin is short, the hinge on data pushes the last bias down as that on samples pushes it up.
    assert still[1] == {"networks.0.conv_out.bias"}
    assert sample_images(pipeline, 6, seed=1).shape == (6, 1, 16, 16) and seconds > 0


def test_the_vaebm_way_freezes_the_vae(data, trained):
    pipeline, _ = peers.vaebm(data, 2, trained, drift=1.0)
    expected = ECVAEPipeline.from_pretrained(trained).vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pipeline.vae.state_dict().items())
    images = peers.refined_images(pipeline, 6, seed=1)
    assert images.shape == (6, 1, 16, 16) and not torch.equal(images, sample_images(pipeline, 6, seed=1))


def test_the_ddpm_has_as_many_parameters_and_trains(data):
    wanted = peers.parameters(*peers.networks(data))
    assert peers.parameters(peers.small_unet(data)) == pytest.approx(wanted, rel=0.2)
    pipeline, _ = peers.ddpm(data, "peer", 2, rate=5e-4)
    images = peers.ddim_images(pipeline, 2, seed=1)
    assert images.shape == (2, 1, 16, 16) and images.dtype == torch.uint8


ROW = {"frechet_distance": 314.7, "training_seconds": 90.0, "kernel_distance": 0.2, "dual": 12.0, "rollbacks": 0}
POSTERIOR = {"importance_weighted": -165.04, "elbo": -167.0, "amortisation_gap": 0.42}
TABLES = {
    "posterior_study": (
        "posterior_digits", 50_000, {"setting": "none", **POSTERIOR},
        "| none | -165.04 | -165.04 | -167.00 | 0.42 | 0.42 | 314.7 | 314.7 | 0.060 |",
    ),
    "flow_study": (
        "flow_16", 5_000, {"setting": "trained on", "bits_per_dimension": 3.5},
        "| trained on | 3.500 | 3.500 | 314.7 | 314.7 | 0.2000 | 12 | | 0 | 0.060 |",
    ),
    "decoder_study": (
        "decoder", 5_000, {"setting": "AutoencoderKL, calibrated", "psnr": 24.0},
        "| AutoencoderKL, calibrated | 314.7 | 314.7 | 0.2000 | 24.00 | 24.00 | 12 |",
    ),
}  # fmt: skip


def printed_by(name: str, monkeypatch, capsys, *arguments) -> str:
    dataset = {"flow_study": ["--fashion_mnist", "nothing"], "decoder_study": ["--cifar10", "nothing"]}
    monkeypatch.setattr(sys, "argv", [name, "--table", *dataset.get(name, []), *map(str, arguments)])
    importlib.import_module(f"studies.{name}").main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_printed_without_the_data(name, tmp_path, capsys, monkeypatch):
    file, num_samples, own, line = TABLES[name]
    rows = [{"seed": 0, "seconds": 1, "iterations": 1500, "num_samples": num_samples, **ROW, **own}]
    study.Results(tmp_path / f"{file}.jsonl").write(rows)
    printed = printed_by(name, monkeypatch, capsys, "--output_dir", tmp_path).splitlines()
    assert printed[2:] == [line] and printed[0].count("|") == printed[1].count("|") == line.count("|")


@pytest.mark.parametrize("picture, said", [("a.png", "there is no trained-on_0"), ("a.picture", "ends in .png")])
def test_pictures_that_can_not_be_made_are_refused(picture, said, tmp_path, capsys, monkeypatch):
    arguments = ["--output_dir", tmp_path, "--picture", tmp_path / picture, "--settings", "trained on"]
    with pytest.raises(SystemExit):
        printed_by("flow_study", monkeypatch, capsys, *arguments)
    assert said in capsys.readouterr().err
