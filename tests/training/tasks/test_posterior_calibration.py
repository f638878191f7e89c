"""`--calibration posterior` and `both`, and an encoder that is trained alone."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from training_runs import assert_same_weights, metrics, weights, without_end
from training_runs import train_tiny as train

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline
from ecvae_diffusers.posterior import posterior_chain, stationary_constraint
from ecvae_diffusers.training.randomness import StepNoise
from ecvae_diffusers.training.run.log import read_metrics
from ecvae_diffusers.training.tasks import vae
from ecvae_diffusers.training.tasks.posterior import PosteriorCalibration
from ecvae_diffusers.training.tasks.vae_config import VAEConfig


STEPS = 4
BOTH = ("--calibration", "both", "--max_posterior_dual", 10, "--checkpointing_steps", STEPS // 2)
SMALL = {"sample_size": 16, "in_channels": 1, "latent_channels": 4, "block_out_channels": (16, 16)}
RESUMED = ("--resume_from_checkpoint", "latest")


@pytest.fixture(scope="module")
def both(images, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("runs") / "both"
    train(images, output_dir, STEPS, *BOTH)
    return output_dir


def test_both_constraints_have_a_dual_variable_each(both):
    lines = metrics(both)
    assert all({"constraint", "dual", "posterior_constraint", "posterior_dual"} <= line.keys() for line in lines)
    duals = [line["posterior_dual"] for line in lines]
    assert all(0 <= dual <= 10 for dual in duals) and len(set(duals)) > 1, duals
    # On the way to the posterior, a chain's ends are decoded with a smaller error.
    assert sum(line["refined_reconstruction"] < line["reconstruction"] for line in lines) > STEPS / 2
    assert ECVAEPipeline.from_pretrained(both).energy_model is not None


def test_a_run_cut_in_two_equals_a_run_in_one(both, images, tmp_path):
    """The posterior's dual variable is in the checkpoint too."""
    cut = without_end(both, tmp_path / "cut", STEPS)
    lines = train(images, cut, STEPS, *BOTH, *RESUMED)
    assert lines[-1]["posterior_dual"] == metrics(both)[-1]["posterior_dual"]
    assert_same_weights(both, cut)


def encoder_alone(start: Path, calibration: str) -> tuple:
    return ("--pretrained_model_name_or_path", start, "--freeze_decoder", "--calibration", calibration)


def test_an_encoder_alone_leaves_the_decoder_bit_for_bit(both, images, tmp_path):
    """Its energy model and chain stay with it, also when the run is resumed, whatever else it is given by then."""
    arguments = ("--checkpointing_steps", 1)
    train(images, tmp_path / "whole", 2, *encoder_alone(both, "posterior"), *arguments)
    before, after = weights(both), weights(tmp_path / "whole")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("vae/encoder.") for key in changed)
    for name in ("energy_model/config.json", "scheduler/scheduler_config.json"):
        assert (both / name).read_text() == (tmp_path / "whole" / name).read_text()
    cut = without_end(tmp_path / "whole", tmp_path / "cut", 2)
    shutil.copytree(both, tmp_path / "other")
    path = tmp_path / "other" / "energy_model" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(path).items()}, path)
    train(images, cut, 2, *encoder_alone(tmp_path / "other", "posterior"), *arguments, *RESUMED)
    assert_same_weights(tmp_path / "whole", cut)


def test_evaluations_of_an_encoder_alone(both, images, tmp_path, monkeypatch):
    """Samples stay as they are, and so none of its steps is the best. An autoencoder alone has nothing beside it."""
    monkeypatch.setattr(vae, "AMORTISATION_STEPS", 2)
    arguments = ("--evaluation_steps", 1, "--evaluation_samples", 12)
    train(images, tmp_path / "run", 2, *encoder_alone(both / "vae", "none"), *arguments)
    evaluations = read_metrics(tmp_path / "run" / "evaluations.jsonl")
    assert len({row["kernel_distance"] for row in evaluations}) == 1 and len({row["elbo"] for row in evaluations}) == 2
    assert not (tmp_path / "run" / "best").exists()
    assert ECVAEPipeline.from_pretrained(tmp_path / "run").energy_model is None


def test_bf16(both, images, tmp_path):
    """The first step is that of float32, but for rounding; all chains keep their state in float32."""
    (line,) = train(images, tmp_path / "run", 1, *BOTH, "--mixed_precision", "bf16")
    expected = metrics(both)[0]
    for name in ("reconstruction", "kl", "refined_reconstruction"):
        assert line[name] == pytest.approx(expected[name], rel=0.05), name
    # A small difference of large ones.
    assert line["posterior_constraint"] == pytest.approx(expected["posterior_constraint"], rel=0.2)
    assert line["gradient_norm"] != expected["gradient_norm"]


def test_the_chain_follows_the_weight_of_the_step(images, tmp_path):
    """At half of beta the likelihood is twice as sharp, and the chain's step half as long."""
    state = PosteriorCalibration(VAEConfig().resolved(16), AutoencoderEC(**SMALL), 0.1)
    (whole, remainder), (half, rest) = state.chain(1.0), state.chain(0.5)
    assert half.config.drift_step_size == whole.config.drift_step_size / 2 and 0 < rest < remainder
    # At a thousandth a whole step would move latents by hundreds of sigma.
    lines = train(images, tmp_path / "run", 2, "--calibration", "posterior", "--kl_warmup_steps", 3000)
    assert lines[0]["kl_weight"] == pytest.approx(1 / 3000)
    assert all(line["posterior_constraint"] < 100 for line in lines)
    assert all(line["refined_reconstruction"] < 1.05 * line["reconstruction"] for line in lines)


def test_the_encoder_learns_from_generated_images_too():
    """Their constraint counts as that of data does; it moves the encoder, and neither the decoder nor the images."""
    torch.manual_seed(0)
    model = AutoencoderEC(**SMALL)
    real, start = torch.rand(6, 1, 16, 16) * 2 - 1, torch.randn(6, 4, 1, 1)

    state = PosteriorCalibration(VAEConfig().resolved(16), model, 0.1)
    refined = state.refine(real, start, StepNoise(0, 1, 0, 1, torch.device("cpu")), 1.0, Accelerator(cpu=True))
    output = model(real, True, posterior_noise=start, extra_sample=refined.generated)
    posteriors = output.latent_dist, output.extra_latent_dist
    for posterior in posteriors:
        posterior.parameters.retain_grad()
    calibration = state.constrain(output, refined)
    calibration.loss.backward()
    of_data, of_generated = (posterior.parameters.grad for posterior in posteriors)
    assert refined.generated.shape == real.shape and not refined.generated.requires_grad
    assert (refined.generated - real).abs().mean() > 0.1
    assert len(refined.ends) == len(refined.noise) == 12 and len(refined.latents) == 6
    assert torch.equal(refined.noise[:6], start) and not torch.equal(refined.noise[6:], start)
    assert of_data.abs().max() > 0 and of_generated.abs().max() > 0
    assert all(p.grad is None or not p.grad.any() for p in model.decoder.parameters())
    assert any(p.grad.any() for p in model.encoder.parameters())
    # -log q of the ends under its own q, less that of the reference, over both halves.
    u = 0.5 * (refined.ends.square() - refined.reference.square()).flatten(1).sum(1)
    remainder = stationary_constraint(posterior_chain(1, 0.01), 4)
    torch.testing.assert_close(calibration.constraint, u.mean() + remainder, rtol=1e-3, atol=1e-5)


def test_batch_normalization_is_refused(images, tmp_path):
    AutoencoderEC(**SMALL, norm_type="batch").save_pretrained(tmp_path / "batch")
    for extra in (["--calibration", "both"], ["--freeze_decoder", "--calibration", "none"]):
        with pytest.raises(SystemExit, match="pretrained_model_name_or_path"):
            train(images, tmp_path / "run", 1, "--pretrained_model_name_or_path", tmp_path / "batch", *extra)
    assert not (tmp_path / "run").exists()


def test_the_posterior_alone_has_no_energy_model(images, tmp_path):
    """With the decoder left out and a weight next to 0 the loss is that without calibration."""
    off = ("--posterior_decoder_weight", 0, "--max_posterior_dual", "1e-30")
    (line,) = train(images, tmp_path / "off", 1, "--calibration", "posterior", *off)
    assert "constraint" not in line and "refined_reconstruction" not in line
    pipe = ECVAEPipeline.from_pretrained(tmp_path / "off")
    assert pipe.energy_model is None and pipe.scheduler is None
    (plain,) = train(images, tmp_path / "none", 1, "--calibration", "none")
    for name in ("reconstruction", "kl", "gradient_norm"):
        assert line[name] == pytest.approx(plain[name], rel=1e-4)
