"""The training loop: what a run writes and shows of itself, its optimizers and its average, and how it resumes."""

import json
import logging

import numpy as np
import PIL.Image
import pytest
import torch
from training_runs import assert_same_weights, metrics, train_tiny, weights, without_end

from ecvae_diffusers import ECVAEPipeline
from ecvae_diffusers.metrics import GenerationMetrics, lite0_features
from ecvae_diffusers.training import trainer as trainer_module
from ecvae_diffusers.training.run.log import read_metrics
from ecvae_diffusers.training.tasks import vae


TIMES = {"images_per_second": 0, "training_seconds": 0, "peak_memory_gib": 0}


@pytest.fixture(scope="module")
def watched(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "watched"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "AMORTISATION_STEPS", 2)
        train_tiny(
            images, out, 10, "--log_steps", 2, "--save_images_steps", 5, "--evaluation_steps", 5, "--evaluation_samples", 24,
            "--report_to", "tensorboard", "--langevin_drift_step", "auto", "--drift_tolerance", 0.01, "--kl_warmup_steps", 10,
            "--checkpointing_steps", 10,
        )  # fmt: skip
    return out


def test_every_logged_step_has_what_a_healthy_run_is_known_by(watched):
    records = metrics(watched)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10]
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
    assert [record["kl_weight"] for record in records] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    # The chain is saved as it was adapted.
    steps = [record["langevin_drift_step"] for record in records]
    config = ECVAEPipeline.from_pretrained(watched).scheduler.config
    assert len(set(steps)) > 1 and config.drift_step_size == pytest.approx(steps[-1])


def test_pictures_and_energies(watched):
    for kind, size in {
        "samples": (8 * 17 - 1, 2 * 17 - 1),
        "reconstructions": (8 * 17 - 1, 2 * 17 - 1),
        "chain": (7 * 17 - 1, 8 * 17 - 1),  # G(z), five steps, where it moved; eight images
        "neighbours": (6 * 17 - 1, 8 * 17 - 1),  # a sample and five neighbours; eight samples
    }.items():
        steps = (5, 10) if kind == "neighbours" else (1, 5, 10)
        files = sorted((watched / kind).iterdir())
        assert [path.name for path in files] == [f"step-{step:06d}.png" for step in steps]
        for path in files:
            with PIL.Image.open(path) as picture:
                # Images of 16 px are magnified to 64.
                assert picture.size == (4 * size[0], 4 * size[1]) and np.asarray(picture).std() > 1
    lines = read_metrics(watched / "energies.jsonl")
    assert [line["step"] for line in lines] == [5, 10]
    assert [len(lines[0][kind]) for kind in ("data", "samples", "targets")] == [8, 8, 8]
    # A chain goes downhill: the calibrated samples lie lower than those that it started from.
    assert np.mean(lines[-1]["targets"]) < np.mean(lines[-1]["samples"])


def test_an_evaluation_is_what_the_library_measures_and_the_best_is_kept(watched, images):
    """The last one, made again from the saved pipeline. Of fewer images than features the kernel distance decides."""
    lines = read_metrics(watched / "evaluations.jsonl")
    rows = [(line["step"], line["features"], line["frechet_distance"]) for line in lines]
    assert rows == [(5, "lite0", None), (10, "lite0", None)]
    measure = GenerationMetrics(lite0_features())
    files = [np.array(PIL.Image.open(path)) for path in sorted(images.iterdir())]
    measure.update(torch.from_numpy(np.stack(files))[:, None], real=True)
    latents = torch.randn(24, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    made = ECVAEPipeline.from_pretrained(watched)(latents=latents, output_type="pt").images
    measure.update((made * 255).round().to(torch.uint8), real=False)
    expected = measure.compute()
    for name in ("kernel_distance", "precision", "recall", "density", "coverage"):
        assert lines[-1][name] == pytest.approx(expected[name], rel=2e-2, abs=1e-3), name
    best = min(lines, key=lambda line: line["kernel_distance"])
    found = weights(watched / "best")
    assert (best["step"] == 10) == all(torch.equal(value, found[key]) for key, value in weights(watched).items())


def test_tensorboard_gets_what_the_files_get(watched):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "logs" / "ecvae"))
    events.Reload()
    evaluations = read_metrics(watched / "evaluations.jsonl")
    for prefix, name, records in (
        ("", "reconstruction", metrics(watched)), ("", "dual", metrics(watched)), ("evaluation/", "kernel_distance", evaluations),
    ):  # fmt: skip
        found = {event.step: event.value for event in events.Scalars(prefix + name)}
        assert found == pytest.approx({record["step"]: record[name] for record in records})


def test_a_run_that_is_replaced_leaves_nothing(watched, images):
    assert json.loads((watched / "training_args.json").read_text())["report_to"] == ["tensorboard"]
    (line,) = train_tiny(images, watched, 1, "--overwrite_output_dir", "--calibration", "none")
    left = {path.name for path in watched.iterdir()}
    assert not left & {"best", "logs", "neighbours", "chain", "energies.jsonl", "evaluations.jsonl", "energy_model"}
    assert [path.name for path in (watched / "samples").iterdir()] == ["step-000001.png"]
    assert "dual" not in line


def test_networks_optimizers_and_calibration_are_as_the_flags_say(images, tmp_path):
    records = train_tiny(
        images, tmp_path, 4, "--layers_per_block", 2, "--energy_block_out_channels", 8, 16, 16, "--energy_spectral_norm", "--energy_num_scales", 2,
        "--langevin_steps", 3, "--langevin_drift_step", 0.3, "--langevin_noise", 0.01, "--calibration_tolerance", 0.5,
        "--initial_dual", 3, "--max_dual", 4, "--dual_learning_rate", 5, "--adam_beta1", 0.5, "--adam_beta2", 0.95,
        "--learning_rate", 1e-3, "--energy_learning_rate", 2e-3, "--dataloader_num_workers", 1, "--checkpointing_steps", 4,
        "--kl_weight", 0.5, "--conditioning_weight", 0.1, "--gradient_checkpointing", "--random_flip", "--max_grad_norm", 1000,
    )  # fmt: skip
    assert [record["epoch"] for record in records] == [0, 0, 0, 1]  # 24 images, batches of 8
    pipeline = ECVAEPipeline.from_pretrained(tmp_path)
    assert pipeline.vae.config.layers_per_block == 2
    energy, chain = pipeline.energy_model.config, pipeline.scheduler.config
    assert (list(energy.block_out_channels), energy.spectral_norm, energy.num_scales) == ([8, 16, 16], True, 2)
    assert (chain.num_steps, chain.drift_step_size) == (3, 0.3)
    assert (chain.noise_scale, chain.conditioning_weight) == (0.01, 0.1)
    for record in records:
        assert record["tolerance"] == 0.5 and record["kl_weight"] == 0.5 and 0 <= record["dual"] <= 4
        assert record["learning_rate"] == 1e-3 and record["energy_learning_rate"] == 2e-3
    # lambda is what the dual step makes of the constraint that stands beside it.
    violation = min(records[0]["constraint"] / 0.5 - 1, 1)
    assert records[0]["dual"] == pytest.approx(min(4, max(0, 3 + 5 * violation)), rel=1e-4)
    for file, betas in (("optimizer.bin", (0.5, 0.95)), ("optimizer_1.bin", (0.0, 0.99))):
        (group,) = torch.load(tmp_path / "checkpoint-4" / file, weights_only=True)["param_groups"]
        assert (group["betas"], group["weight_decay"]) == (betas, 0.0)


def test_the_average_forgets_at_its_decay(images, tmp_path):
    """Decay 0: the average is the last weights, which a run without one saves."""
    averages = {"average": ["--ema_max_decay", 0], "last": ["--no-use_ema"], "slow": ["--ema_max_decay", 0.9]}
    for name, arguments in averages.items():
        train_tiny(images, tmp_path / name, 3, "--calibration", "none", *arguments)
    average, last, slow = (weights(tmp_path / name) for name in averages)
    assert all(torch.allclose(average[key], last[key], atol=1e-7) for key in last)
    assert not all(torch.allclose(slow[key], last[key], atol=1e-7) for key in last)


def test_a_run_cut_in_two_equals_a_run_in_one(images, tmp_path, caplog):
    """
    Cut inside of its second epoch, and between two logged steps, with accumulation: what is logged of several steps, as the largest
    norms, is that of the run in one. Not in another precision.
    """
    arguments = [
        "--log_steps", 3, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    with caplog.at_level("INFO"):
        whole = train_tiny(images, tmp_path / "whole", 4, *arguments)
        assert "starting at step 0" in caplog.text
        cut = without_end(tmp_path / "whole", tmp_path / "cut", 4)
        records = train_tiny(images, cut, 4, *arguments)
        assert "Resuming from checkpoint-2" in caplog.text
    assert [{**record, **TIMES} for record in whole] == [{**record, **TIMES} for record in records]
    assert whole[0]["step"] == 3 and "gradient_norm_max" in whole[0]
    assert_same_weights(tmp_path / "whole", cut)
    with pytest.raises(SystemExit, match="mixed_precision"):
        train_tiny(images, cut, 5, *arguments, "--mixed_precision", "bf16")


def test_tells_what_to_expect_after_its_first_steps(images, tmp_path, monkeypatch, caplog):
    """Of the steps since it was started. Networks that are large for a CPU are told."""
    monkeypatch.setattr(trainer_module, "WARMUP_STEPS", 2)
    monkeypatch.setattr(trainer_module, "LARGE_WIDTH", 16)
    arguments = ["--calibration", "none", "--checkpointing_steps", 3, "--save_images_steps", 7]
    with caplog.at_level(logging.INFO):
        train_tiny(images, tmp_path / "run", 3, *arguments)
        train_tiny(images, tmp_path / "run", 6, *arguments, "--resume_from_checkpoint", "latest")
    told = [message for message in caplog.messages if str(tmp_path / "run" / "samples") in message]
    assert len(told) == 2
    assert sum("--block_out_channels" in message for message in caplog.messages) == 2
