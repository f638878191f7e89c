"""Configurations: ranges, and defaults that depend on other fields."""

from dataclasses import fields

import pytest

from ecvae_diffusers.training import calibrate_decoder, train_ecvae, train_flow
from ecvae_diffusers.training.options import ConfigError
from ecvae_diffusers.training.tasks.vae_config import ECVAEConfig
from ecvae_diffusers.training.train_ecvae import parse_args


GIVEN = ["--train_data_dir", "images", "--output_dir", "out"]
CONFIGS = {
    train_ecvae: ECVAEConfig, train_flow: train_flow.ECFlowConfig, calibrate_decoder: calibrate_decoder.ECDecoderConfig,
}  # fmt: skip
FROZEN, START = "--freeze_decoder --calibration posterior", "--pretrained_model_name_or_path x"


@pytest.mark.parametrize(
    "arguments, name",
    [
        ("--dataset_name x", "train_data_dir"),
        ("--resolution 25", "resolution"),
        ("--resolution 24 25", "resolution"),
        ("--resolution 2 16", "resolution"),
        ("--resolution 16 16 16", "resolution"),
        ("--resolution 24 40 --block_out_channels 8 8 8 8", "block_out_channels"),
        ("--resolution 24 40 --image_size 20", "image_size"),
        ("--resolution 20 --patch_size 4 --block_out_channels 8 8", "block_out_channels"),
        ("--resolution 22 --patch_size 4", "patch_size"),
        ("--in_channels 17", "in_channels"),
        ("--image_size 16", "image_size"),
        ("--block_out_channels 8 0", "block_out_channels"),
        ("--block_out_channels 8 8 8 8 8", "block_out_channels"),
        ("--energy_block_out_channels 8 8 8 8 8", "energy_block_out_channels"),
        ("--energy_num_scales 5", "energy_num_scales"),
        ("--initial_dual 200", "initial_dual"),
        ("--conditioning_weight 6", "conditioning_weight"),
        ("--learning_rate 0", "learning_rate"),
        ("--calibration_tolerance some", "calibration_tolerance"),
        ("--drift_tolerance 0 --langevin_noise 0 --langevin_drift_step 0.1", "drift_tolerance"),
        (FROZEN, "pretrained_model_name_or_path"),
        (f"--freeze_decoder {START}", "calibration"),
        (f"{FROZEN} {START} --posterior_decoder_weight 0.1", "posterior_decoder_weight"),
        (f"{FROZEN} {START} --evaluation_steps 5 --early_stopping_patience 2", "early_stopping_patience"),
        ("--early_stopping_patience 2", "evaluation_steps"),
        ("--evaluation_samples 5", "evaluation_samples"),
        ("--calibration both --kl_weight 0", "kl_weight"),
        ("--seed 4294967296", "seed"),
        ("--lr_warmup_steps 5", "lr_warmup_steps"),
        ("--streaming", "streaming"),
        ("--hub_model_id me/run", "push_to_hub"),
        ("--report_to tensorboard wandb", "report_to"),
        ("--num_epochs 3", "num_epochs"),
    ],
)
def test_wrong_values_are_one_line(arguments, name, capsys):
    with pytest.raises(SystemExit) as refusal:
        parse_args([*GIVEN, *arguments.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert refusal.value.code == 2 and f"--{name}" in line


@pytest.mark.parametrize("script", CONFIGS, ids=lambda script: script.__name__.rpartition(".")[2])
def test_numbers_are_finite(script, capsys):
    flags = [own for group in CONFIGS[script].groups().values() for own in fields(group) if own.metadata["flag"]]
    names = [own.name for own in flags if "float" in str(own.type)]
    assert len(names) > 15
    for name in names:
        with pytest.raises(SystemExit):
            script.parse_args([*GIVEN, "--pretrained_model_name_or_path", "model", f"--{name}", "nan"])
        assert f"--{name}" in capsys.readouterr().err


def test_a_configuration_made_in_python_is_checked_too():
    given = {"output_dir": "out", "train_data_dir": "images"}
    for values, named in (
        ({}, "output_dir"),
        ({"output_dir": "out"}, "dataset_name"),
        (given | {"kl_weight": -1.0}, "kl_weight"),
    ):
        with pytest.raises(ConfigError, match=named):
            ECVAEConfig.from_flat(values).resolved().check()


def test_defaults_follow_other_fields():
    config = parse_args([*GIVEN, "--resolution", "64"])
    assert config.model.block_out_channels == config.energy.energy_block_out_channels == [64, 128, 256, 256, 256]
    assert config.optimizer.lr_warmup_steps == 0 and config.model.posterior_decoder_weight == 0.1
    config = parse_args([*GIVEN, "--block_out_channels", "8", "8", "--lr_scheduler", "cosine"])
    assert config.energy.energy_block_out_channels == [8, 8] and config.optimizer.lr_warmup_steps == 100
    flow = train_flow.parse_args([*GIVEN])
    assert (flow.optimizer.learning_rate, flow.optimizer.lr_warmup_steps) == (3e-3, 100)
    pretrained = train_flow.parse_args([*GIVEN, "--pretrained_model_name_or_path", "flow"])
    assert pretrained.optimizer.learning_rate == 5e-4
    # In proportion to the loss, but for an autoencoder without a prior.
    for arguments, dual in (
        ("", 1000),
        ("--kl_weight 0.1", 100),
        ("--max_posterior_dual 3", 3),
        ("--kl_weight 0", 1000),
    ):
        assert parse_args([*GIVEN, *arguments.split()]).model.max_posterior_dual == pytest.approx(dual)
