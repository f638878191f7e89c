"""What a run shows of itself: scalars, pictures, energies, evaluations, trackers."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from training_runs import TINY, metrics, succeed, weights, write_images

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import GenerationMetrics, lite0_features
from ecvae_diffusers.training.data.transforms import batch_spread
from ecvae_diffusers.training.run.log import read_metrics, reduce_scalars
from ecvae_diffusers.training.run.pictures import chain_strip, pairs_grid
from ecvae_diffusers.training.train_ecvae import parse_args


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", count=32)


@pytest.fixture(scope="module")
def watched(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "watched"
    result = succeed(
        "--train_data_dir", images, "--output_dir", out, *TINY, "--max_train_steps", 12, "--log_steps", 2,
        "--save_images_steps", 6, "--evaluation_steps", 4, "--evaluation_samples", 24, "--report_to", "tensorboard",
        "--langevin_drift_step", "auto", "--drift_tolerance", 0.01, "--kl_warmup_steps", 10, "--checkpointing_steps", 6,
    )  # fmt: skip
    # At 100% nothing is left to do.
    assert 0 < result.stderr.index("Saving: ") < result.stderr.index(" 12/12 ")
    return out


def test_every_logged_step_has_what_a_healthy_run_is_known_by(watched):
    records = metrics(watched)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    names = {
        "reconstruction", "kl", "active_units", "constraint", "noise_floor", "drift", "dual", "tolerance", "energy_real",
        "energy_real_std", "energy_samples", "energy_samples_std", "energy_targets", "energy_targets_std", "gradient_norm",
        "energy_gradient_norm", "sample_spread", "data_spread", "images_per_second", "training_seconds", "peak_memory_gib", "kl_weight",
    }  # fmt: skip
    for record in records:
        assert names <= set(record) and all(np.isfinite(value) for value in record.values())
        # Each part of the constraint is there to be told apart.
        drift = max(record["constraint"] - record["noise_floor"], 0) / 256
        assert record["drift"] == pytest.approx(drift**0.5, rel=1e-3)
        assert 0.05 < record["peak_memory_gib"] < 8
    assert [record["kl_weight"] for record in records] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert len({record["langevin_drift_step"] for record in records}) > 1


def test_the_chain_is_saved_as_it_was_adapted(watched):
    scheduler = ECVAEPipeline.from_pretrained(watched).scheduler
    assert scheduler.config.drift_step_size == pytest.approx(metrics(watched)[-1]["langevin_drift_step"])


def test_pictures_and_energies(watched):
    for kind, size in {
        "samples": (8 * 17 - 1, 8 * 17 - 1),
        "reconstructions": (8 * 17 - 1, 8 * 17 - 1),
        "chain": (7 * 17 - 1, 8 * 17 - 1),  # G(z), five steps, where it moved; eight images
        "neighbours": (6 * 17 - 1, 8 * 17 - 1),  # a sample and five neighbours; eight samples
    }.items():
        steps = (4, 8, 12) if kind == "neighbours" else (1, 6, 10, 12)
        files = sorted((watched / kind).iterdir())
        assert [path.name for path in files] == [f"step-{step:06d}.png" for step in steps]
        for path in files:
            with PIL.Image.open(path) as picture:
                assert picture.size == size
                assert np.asarray(picture).std() > 1
    lines = read_metrics(watched / "energies.jsonl")
    assert [line["step"] for line in lines] == [6, 12]
    assert [len(lines[0][kind]) for kind in ("data", "samples", "targets")] == [32, 256, 256]
    # A chain goes downhill: the calibrated samples lie lower than those that it started from.
    assert np.mean(lines[-1]["targets"]) < np.mean(lines[-1]["samples"])


def test_evaluations(watched):
    lines = read_metrics(watched / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert line["features"] == "lite0" and line["num_real"] == line["num_generated"] == 24
        # Of fewer images than features there is none, and the kernel distance tells which is the best.
        assert line["frechet_distance"] is None and 0 <= line["coverage"] <= 1
    assert len({line["kernel_distance"] for line in lines}) == 3
    best = min(lines, key=lambda line: line["kernel_distance"])
    expected, found = weights(watched), weights(watched / "best")
    assert best["step"] != 12 or all(torch.equal(expected[key], found[key]) for key in expected)


def test_an_evaluation_is_what_the_library_measures(watched, images):
    """The last one, made again from the saved pipeline."""
    measure = GenerationMetrics(lite0_features())
    files = [np.array(PIL.Image.open(path)) for path in sorted(images.iterdir())]
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:24]
    measure.update(torch.from_numpy(np.stack(files))[order, None], real=True)
    latents = torch.randn(24, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    made = ECVAEPipeline.from_pretrained(watched)(latents=latents, output_type="pt").images
    measure.update((made * 255).round().to(torch.uint8), real=False)
    expected, found = measure.compute(), read_metrics(watched / "evaluations.jsonl")[-1]
    for name in ("kernel_distance", "precision", "recall", "density", "coverage"):
        assert found[name] == pytest.approx(expected[name], rel=2e-2, abs=1e-3), name


def test_tensorboard_gets_what_the_file_gets(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "logs" / "ecvae"))
    events.Reload()
    records, evaluations = metrics(watched), read_metrics(watched / "evaluations.jsonl")
    for name in ("reconstruction", "dual", "energy_samples_std"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({record["step"]: record[name] for record in records})
    found = {event.step: event.value for event in events.Scalars("evaluation/kernel_distance")}
    assert found == pytest.approx({line["step"]: line["kernel_distance"] for line in evaluations})


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--report_to", "trackio"], "--report_to trackio"),
        (["--report_to", "tensorboard", "wandb"], "--report_to wandb"),
        (["--report_to", "paper"], "--report_to"),
        (["--evaluation_steps", "5", "--evaluation_features", "inception"], "--evaluation_features inception"),
        (["--early_stopping_patience", "3"], "--early_stopping_patience"),
        (["--evaluation_samples", "5"], "--evaluation_samples"),
        (["--evaluation_steps", "0"], "--evaluation_steps"),
        (["--max_rollbacks", "-1"], "--max_rollbacks"),
        (["--lr_warmup_steps", "5"], "--lr_warmup_steps"),
        (["--langevin_noise", "0", "--drift_tolerance", "0"], "--drift_tolerance"),
        (["--kl_warmup_steps", "-1"], "--kl_warmup_steps"),
        (["--langevin_drift_step", "none"], "--langevin_drift_step"),
        (["--langevin_drift_step", "auto", "--drift_tolerance", "0"], "--drift_tolerance"),
        (["--streaming"], "--streaming"),
    ],
)
def test_refused_before_anything_is_done(arguments, named, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--train_data_dir", "images", "--output_dir", "out", *arguments])
    assert named in capsys.readouterr().err


def test_spread_of_energies_over_processes_comes_from_moments():
    class TwoProcesses:
        """The mean over this process and one with twice its values."""

        @staticmethod
        def reduce(values, reduction):
            first, second = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 7.0])
            both = [torch.stack([part.double().mean(), part.double().square().mean()]) for part in (first, second)]
            assert reduction == "mean" and torch.allclose(values, both[0])
            return torch.stack(both).mean(0)

    first = torch.tensor([1.0, 3.0])
    logged = reduce_scalars(TwoProcesses(), {"energy": first.mean(), "energy_square": first.square().mean()})
    whole = torch.tensor([1.0, 3.0, 5.0, 7.0])
    assert logged == pytest.approx({"energy": whole.mean().item(), "energy_std": whole.std(correction=0).item()})


def test_scalars_on_mps(like_mps):
    accelerator, values = Accelerator(cpu=True), torch.tensor([1.0, 3.0])
    with like_mps():
        logged = reduce_scalars(accelerator, {"energy": values.mean(), "energy_square": values.square().mean()})
    assert logged == pytest.approx({"energy": 2.0, "energy_std": 1.0})


def test_grids():
    assert batch_spread(torch.ones(4, 1, 2, 2)) == 0
    assert batch_spread(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])) == 0.5
    pairs = np.asarray(pairs_grid(torch.zeros(16, 1, 4, 4), torch.ones(16, 1, 4, 4)))
    assert pairs.shape == (4 * 5 - 1, 8 * 5 - 1)
    assert [pairs[row * 5, 0] for row in range(4)] == [128, 255, 128, 255]
    assert pairs_grid(torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4)).size == (3 * 5 - 1, 2 * 5 - 1)
    states = torch.zeros(3, 2, 4, 4, 4)
    states[1:, 0, 0] = 0.01
    strip = np.asarray(chain_strip(states))
    assert strip.shape == (2 * 5 - 1, 4 * 5 - 1, 4)
    # Where it moved most is white in that channel, grey elsewhere, and opaque.
    assert strip[0, 15].tolist() == [255, 128, 128, 255] and strip[5, 15].tolist() == [128, 128, 128, 255]


def test_what_is_left_of_a_run_that_is_replaced(watched, images):
    """Overwritten: not one picture or line of the old run stays."""
    arguments = json.loads((watched / "training_args.json").read_text())
    assert arguments["report_to"] == ["tensorboard"]
    succeed(
        "--train_data_dir", images, "--output_dir", watched, *TINY, "--max_train_steps", 1, "--overwrite_output_dir",
        "--calibration", "none",
    )  # fmt: skip
    left = {path.name for path in watched.iterdir()}
    assert not left & {"best", "logs", "neighbours", "chain", "energies.jsonl", "evaluations.jsonl", "energy_model"}
    assert [path.name for path in (watched / "samples").iterdir()] == ["step-000001.png"]
    assert "dual" not in metrics(watched)[0]
