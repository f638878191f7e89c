# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""What the studies are made of, at toy size: rows that are not made twice, runs that go on, peers that train."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
import study
import torch
from training_runs import TINY, metrics, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.training.data.digits import DigitFeatures, sample_images


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Disks at 16 px, measured over the features of a classifier that has learned nothing."""
    torch.manual_seed(0)
    images = write_images(tmp_path_factory.mktemp("data") / "images", count=16)
    real = (torch.rand(64, 1, 16, 16) * 255).to(torch.uint8)
    measured = study.reference(DigitFeatures().eval(), real)
    return SimpleNamespace(
        name="disks", device="cpu", num_samples=64, resolution=16, latent_channels=4, channels=(16, 16), learning_rate=5e-4,
        train=real, data_arguments=["--train_data_dir", str(images)],
        arguments=[*TINY, "--evaluation_steps", "4", "--log_steps", "2", "--evaluation_samples", "12"],
        measure=lambda samples: study.against(measured, samples),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    study.train(data, folder, 0, 8)
    return folder


def test_rows_that_are_there_are_not_made_again(tmp_path):
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
    """Of another length or other arguments they are refused, of another number of samples measured anew; half a line is no row."""
    path = tmp_path / "rows.jsonl"
    results = study.Results(path, num_samples=32)
    for count in (16, 32, 32):
        row = {"num_generated": count, "frechet_distance": float(count)}
        study.Results(path, num_samples=count).fill(["a"], [0], lambda name, seed, row=row: row, iterations=8)
    assert [row["frechet_distance"] for row in results.rows()] == [32.0]
    with pytest.raises(ValueError, match="'a' is to be of 9 iterations, but rows.jsonl holds it after 8"):
        results.fill(["a"], [0], lambda name, seed: {}, iterations={"a": 9, "b": 8})

    def make(name: str, seed: int) -> dict:
        return {"num_generated": 32}

    results.fill(["c"], [0], make, arguments={"c": ["--kl_weight", "1"]})
    with pytest.raises(ValueError, match="'c' is --kl_weight 2, but rows.jsonl holds it with --kl_weight 1"):
        results.fill(["c"], [0], make, arguments={"c": ["--kl_weight", "2"]})
    results.write([row for row in results.rows() if row["setting"] != "c"])
    with open(path, "a") as file:
        file.write('{"setting": "b", "se')
    results.fill(["b"], [0], lambda name, seed: {"num_generated": 32}, iterations=8)
    assert [row["setting"] for row in results.rows()] == ["a", "b"]


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
def test_training_ends_with_the_study(tmp_path):
    """However it ends: a restarted study must not find its run being trained still."""
    code = (
        "import subprocess, sys, study\n"
        "child = subprocess.Popen(['sleep', '300'], preexec_fn=study.end_with_parent)\n"
        "print(child.pid, flush=True); child.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(study.__file__).parent)},
    )  # fmt: skip
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.is_file() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    raise AssertionError("the child has outlived the study")


def test_a_finished_run_is_not_trained_again_and_a_cut_one_goes_on(data, trained, tmp_path):
    written = (trained / "model_index.json").stat().st_mtime_ns
    study.train(data, trained, 0, 8)
    assert (trained / "model_index.json").stat().st_mtime_ns == written

    with pytest.raises(ValueError, match="--pretraining_steps is 9, but run was trained for 8"):
        study.train(data, trained, 0, 9, steps="--pretraining_steps")

    arguments = [8, "--checkpointing_steps", "4"]
    study.train(data, tmp_path / "run", 0, *arguments)
    first = metrics(tmp_path / "run")
    (tmp_path / "run" / "model_index.json").unlink()
    study.train(data, tmp_path / "run", 0, *arguments)
    # Saved from its last checkpoint: the steps before it are those of the first time.
    assert metrics(tmp_path / "run") == first and (tmp_path / "run" / "model_index.json").is_file()


def test_a_run_that_another_study_is_at_is_waited_for(data, tmp_path):
    """Not removed as one that was cut off: rows of two studies may go on from the same run."""
    code = (
        "import sys, time, study; from pathlib import Path\n"
        "with study.alone(Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(4); Path(sys.argv[2]).touch()"
    )
    folder, ended = tmp_path / "runs" / "run", tmp_path / "ended"
    environment = {**os.environ, "PYTHONPATH": str(Path(study.__file__).parent)}
    command = [sys.executable, "-c", code, str(tmp_path / "runs" / "run.lock"), str(ended)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(subprocess.CalledProcessError):
            study.train(data, folder, 0, 1, "--no_such_argument")
        assert ended.is_file()


def test_row_and_curve_of_a_run(data, trained, tmp_path):
    row = study.trained_row(data, trained)
    last = metrics(trained)[-1]
    assert {key: row[key] for key in ("dual", "training_seconds")} == {
        key: last[key] for key in ("dual", "training_seconds")
    }
    assert row["frechet_distance"] > 0 and row["rollbacks"] == 0
    # New networks' energies are nearly straight over so short a chain.
    assert 0.9 < row["cosine_to_critic"] <= 1 + 1e-6

    curve = study.curve(trained)
    assert [point["step"] for point in curve] == [4, 8]
    assert 0 < curve[0]["training_seconds"] < curve[1]["training_seconds"] == last["training_seconds"]
    # So few images have no Frechet distance, which is what is plotted.
    run = shutil.copytree(trained, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    (run / "evaluations.jsonl").write_text(
        "".join(json.dumps(r | {"frechet_distance": 9.0 / r["step"]}) + "\n" for r in rows)
    )
    study.plot_curves({"a": [run, run]}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_one_step_is_a_critic(trained):
    pipeline = ECVAEPipeline.from_pretrained(trained)
    pipeline.scheduler = type(pipeline.scheduler)(num_steps=1)
    assert study.cosine_to_critic(pipeline) == pytest.approx(1, abs=1e-5)


def test_features_of_the_data_are_remembered(tmp_path):
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


def test_the_vaebm_way_holds_the_vae_still(data, trained):
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


def test_measures_know_the_data_from_noise(data):
    measures = [data.measure(images) for images in (data.train, torch.zeros_like(data.train))]
    assert measures[0]["frechet_distance"] < 1e-3 < measures[1]["frechet_distance"]


@pytest.mark.parametrize(
    "name, rows, cells",
    [
        (
            "posterior_study",
            {"posterior_digits": {"setting": "none", "importance_weighted": -165.04, "elbo": -167.0, "num_samples": 50_000,
                                  "amortisation_gap": 0.42, "frechet_distance": 314.7, "training_seconds": 90.0}},
            ["| none | -165.04 | -165.04 | -167.00 | 0.42 | 0.42 | 314.7 | 314.7 | 0.060 |"],
        ),
        (
            "flow_study",
            {"flow_16": {"setting": "trained on", "bits_per_dimension": 3.5, "frechet_distance": 200.0, "kernel_distance": 0.2,
                         "rollbacks": 0, "training_seconds": 300.0, "num_samples": 5_000}},
            ["| trained on | 3.500 | 3.500 | 200.0 | 200.0 | 0.2000 |  |  | 0 | 0.200 |"],
        ),
        (
            "decoder_study",
            {"decoder": {"setting": "AutoencoderKL, calibrated", "frechet_distance": 50.0, "kernel_distance": 0.05,
                         "psnr": 24.0, "dual": 12.0, "num_samples": 5_000}},
            ["| AutoencoderKL | calibrated | 50.0 | 50.0 | 0.0500 | 24.00 | 24.00 | 12 |"],
        ),
    ],
)  # fmt: skip
def test_tables_of_the_extensions(name, rows, cells, tmp_path, capsys, monkeypatch):
    """What a study has found is printed without its data being there."""
    study_script = importlib.import_module(name)
    ((file, row),) = rows.items()
    study.Results(tmp_path / f"{file}.jsonl").write([{"seed": 0, "seconds": 1, "iterations": 1500, **row}])
    data = {"flow_study": ["--fashion_mnist", "nothing"], "decoder_study": ["--cifar10", "nothing"]}.get(name, [])
    monkeypatch.setattr(sys, "argv", [name, "--output_dir", str(tmp_path), "--table", *data])
    study_script.main()
    printed = capsys.readouterr().out.splitlines()
    if name == "flow_study":  # pictures of what is not there are refused
        for argument, said in (
            ("--picture", "there is no trained-on_0"),
            ("--plot", "must be a file that ends in .png"),
            ("--likelihood_rate", "must be a finite number above 0, but is inf"),
        ):
            values = {"--plot": tmp_path / "a.picture", "--likelihood_rate": "inf"}
            more = [argument, str(values.get(argument, tmp_path / "a.png")), "--settings", "trained on"]
            monkeypatch.setattr(sys, "argv", [name, "--output_dir", str(tmp_path), "--table", *data, *more])
            with pytest.raises(SystemExit):
                study_script.main()
            assert said in capsys.readouterr().err
    assert printed[2:] == cells and printed[0].count("|") == printed[1].count("|") == cells[0].count("|")
