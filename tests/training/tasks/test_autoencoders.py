"""Autoencoders of diffusers that are calibrated, and the energy model saved beside one: which load, and which are refused."""

import json

import diffusers
import pytest
import torch
from accelerate import Accelerator
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderOobleck
from safetensors.torch import load_file, save_file
from training_runs import write_autoencoder

from ecvae_diffusers import EnergyModel
from ecvae_diffusers.training.tasks.autoencoders import (
    CalibratedDecoder,
    latent_shape,
    load_autoencoder,
    load_energy_model,
)


@pytest.fixture
def saved(tmp_path):
    """An autoencoder, with an energy model of images of three channels and 16 px beside it."""
    write_autoencoder(tmp_path / "saved")
    config = {"sample_size": 16, "in_channels": 3, "block_out_channels": (16, 16)}
    EnergyModel(**config).save_pretrained(tmp_path / "saved" / "energy_model")
    return tmp_path / "saved"


def test_an_energy_model_of_other_images_is_not_used(saved, caplog, monkeypatch):
    """Nor what somebody has published as `my_vae/energy_model`, for a folder that is named `my_vae`."""
    Accelerator(cpu=True)
    monkeypatch.chdir(saved.parent)
    (saved.parent / "my_vae" / "vae").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(diffusers.configuration_utils, "hf_hub_download", None)  # which is no function to call
        for subfolder in (None, "vae", "gone"):
            assert load_energy_model("my_vae", 16, 3, subfolder=subfolder) is None
    with caplog.at_level("INFO"):
        for folder, resolution, channels in ((saved, 32, 3), (saved, 16, 1), (saved.parent, 16, 3)):
            assert load_energy_model(folder, resolution, channels) is None
            assert repr(str(folder)) in caplog.text
            caplog.clear()
    assert load_energy_model(saved, 16, 3).training
    assert load_energy_model(saved.parent, 16, 3, subfolder="saved").training


def without_encoder(tensors, config):
    for name in [name for name in tensors if name.startswith("encoder.")]:
        del tensors[name]


def not_a_number(tensors, config):
    tensors["decoder.conv_out.bias"][0] = torch.nan


@pytest.mark.parametrize(
    "change, named",
    [
        (without_encoder, "encoder"),
        (not_a_number, "decoder.conv_out.bias"),
        (lambda tensors, config: config.update(block_out_channels=[32, 32]), "size"),
        (lambda tensors, config: config.update(in_channels="3"), ""),
    ],
)
def test_weights_that_are_not_whole_not_finite_or_not_of_the_config_are_refused(saved, change, named):
    tensors = load_file(saved / "diffusion_pytorch_model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, saved / "diffusion_pytorch_model.safetensors")
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"(?s)--pretrained_model_name_or_path .*{named}"):
        load_autoencoder(saved)


def test_autoencoders_of_audio_or_of_two_channels_are_refused(tmp_path):
    models = (
        AutoencoderOobleck(
            encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2], decoder_channels=8,
            decoder_input_channels=4,
        ),
        AutoencoderKL(in_channels=2, out_channels=2, block_out_channels=(8,), norm_num_groups=4),
    )  # fmt: skip
    for model in models:
        name = type(model).__name__
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"must be an autoencoder of images .* is a {name}"):
            load_autoencoder(tmp_path / name)


def test_a_variant_is_loaded_by_name_and_in_float32(saved):
    load_autoencoder(saved).half().save_pretrained(saved / "half", variant="fp16")
    with pytest.raises(ValueError, match="can't be loaded"):
        load_autoencoder(saved / "half")
    loaded = load_autoencoder(saved / "half", variant="fp16")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}


def test_parts_that_decoding_does_not_use_are_frozen():
    """Several processes wait for a gradient of each parameter that has one: this one reads masks, which no one gives it."""
    model = AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 8), layers_per_up_block=1,
        norm_num_groups=4, latent_channels=4, sample_size=16,
    )  # fmt: skip
    decoder = CalibratedDecoder(model, "here")
    decoder(torch.randn(2, *latent_shape(decoder, 16))).square().sum().backward()
    trained = [name for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    assert trained and all(decoder.get_parameter(name).grad is not None for name in trained)
    assert not any("condition_encoder" in name for name in trained)
    assert all(name.split(".")[1] in ("decoder", "post_quant_conv") for name in trained)
    with pytest.raises(ValueError, match="--resolution"):
        latent_shape(decoder, 15)
