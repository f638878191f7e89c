"""Models of images of another size: which weights they start with."""

import re

import pytest
import torch
from accelerate import Accelerator
from training_runs import train_tiny, write_images

from ecvae_diffusers import AutoencoderEC, ECVAEPipeline, EnergyModel
from ecvae_diffusers.training.tasks.resizing import freeze_coarse_blocks, resize


@pytest.fixture(autouse=True)
def accelerate_state():
    """Its logger asks for it."""
    Accelerator(cpu=True)


def autoencoder(size, **config) -> AutoencoderEC:
    return AutoencoderEC(sample_size=size, in_channels=1, block_out_channels=(8, 16), latent_channels=4, **config)


def energy(size, **config) -> EnergyModel:
    return EnergyModel(sample_size=size, in_channels=1, block_out_channels=(8, 16), **config)


@pytest.mark.parametrize("build", [autoencoder, energy])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_larger_model_is_the_smaller_one_with_a_finer_block(build, layers):
    """Without its new block, it computes what the smaller one did. Dropping the block again gives the smaller one."""
    model = build(16, layers_per_block=layers)
    larger = resize(model, 32)
    assert larger.config.sample_size == 32 and list(larger.config.block_out_channels) == [8, 8, 16]
    again = resize(larger, 16).state_dict()
    # Only the convolutions at the fine end, which met the new block, are not those of before.
    assert all(torch.equal(again[name], weight) for name, weight in model.state_dict().items())


def test_coarse_blocks_see_what_they_saw():
    model, hidden = autoencoder(16).eval(), torch.randn(2, 8, 16, 16)
    larger = resize(model, 32).eval()
    for own, others in zip(model.encoder.blocks[0], larger.encoder.blocks[1][1:], strict=True):
        torch.testing.assert_close(own(hidden), others(hidden))
    latents = torch.randn(2, 4, 1, 1)
    coarse = [network.decoder.blocks[0](network.decoder.conv_in(latents)) for network in (model, larger)]
    torch.testing.assert_close(*coarse)
    model, larger = energy(16).eval(), resize(energy(16), 32).eval()
    larger = resize(model, 32).eval()
    for own, others in zip(model.networks[0].blocks, larger.networks[0].blocks[1:], strict=True):
        torch.testing.assert_close(own(hidden), others(hidden))
        hidden = own(hidden)


def test_measurements_of_the_other_size_are_forgotten():
    model = autoencoder(16)
    model.register_to_config(reconstruction_variance=0.1, posterior_directions=[[1.0] * 4])
    config = resize(model, 32).config
    assert config.reconstruction_variance is None and config.posterior_directions is None


@pytest.mark.parametrize(
    "size, other, channels",
    [
        (16, [16, 32], [8, 16]), (16, 24, [8, 8, 16]), (32, 8, [16]), ([16, 32], [32, 64], [8, 8, 16]), (16, 20, [8, 16]),
        (16, 128, [8, 8, 8, 8, 16]), (16, 6, [16]),
    ],
)  # fmt: skip
def test_sizes_that_are_no_powers_of_two(size, other, channels):
    vae, energy_model = resize(autoencoder(size), other), resize(energy(size, num_scales=2), other)
    assert list(vae.config.block_out_channels) == list(energy_model.config.block_out_channels) == channels
    images = vae.decode(torch.zeros(1, 4, 1, 1)).sample
    assert energy_model(images).energy.shape == (1,)


def test_a_run_continues_at_another_size(tmp_path):
    images = write_images(tmp_path / "images", count=16)
    train_tiny(images, tmp_path / "small", 2)
    start = ("--pretrained_model_name_or_path", tmp_path / "small", "--resolution", 32, "--no-use_ema")
    lines = train_tiny(images, tmp_path / "large", 2, *start, "--freeze_energy_blocks", 1)
    assert lines[-1]["constraint"] > 0
    pipe = ECVAEPipeline.from_pretrained(tmp_path / "large")
    assert pipe(output_type="pt").images.shape[-2:] == (32, 32)
    before = ECVAEPipeline.from_pretrained(tmp_path / "small").energy_model
    own, other = before.networks[0].blocks[-1].state_dict(), pipe.energy_model.networks[0].blocks[-1].state_dict()
    trained = [name for name in own if not name.endswith(("_u", "_v")) and not torch.equal(own[name], other[name])]
    assert not trained
    assert not torch.equal(before.networks[0].conv_out.bias, pipe.energy_model.networks[0].conv_out.bias)


def test_only_coarse_blocks_are_frozen():
    model = energy(16, layers_per_block=2, num_scales=2)
    freeze_coarse_blocks(model, 1)
    weights = [(name, weight) for name, weight in model.named_parameters() if not name.endswith(("_u", "_v"))]
    frozen = {re.split(r"\.(conv|shortcut)", name)[0] for name, weight in weights if not weight.requires_grad}
    assert frozen == {"networks.0.blocks.2", "networks.0.blocks.3", "networks.1.blocks.0", "networks.1.blocks.1"}


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--freeze_energy_blocks", 1], "--freeze_energy_blocks"),
        (
            [
                "--pretrained_model_name_or_path",
                "small",
                "--resolution",
                32,
                "--freeze_decoder",
                "--calibration",
                "none",
            ],
            "--resolution",
        ),
    ],
)
def test_wrong_arguments(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "images", count=8)
    pipeline = ECVAEPipeline(autoencoder(16), energy(16))
    pipeline.save_pretrained("small")
    with pytest.raises(SystemExit) as refusal:
        train_tiny(images, tmp_path / "run", 1, *arguments)
    assert named in capsys.readouterr().err + str(refusal.value) and not (tmp_path / "run").exists()


def test_blocks_of_a_new_energy_model_are_not_frozen(tmp_path):
    images = write_images(tmp_path / "images", count=8)
    ECVAEPipeline(autoencoder(16)).save_pretrained(tmp_path / "plain")
    start = ("--pretrained_model_name_or_path", tmp_path / "plain", "--freeze_energy_blocks", 1)
    with pytest.raises(SystemExit, match="--freeze_energy_blocks"):
        train_tiny(images, tmp_path / "run", 1, *start)
