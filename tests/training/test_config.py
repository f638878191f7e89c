"""Configurations: ranges, defaults that depend on other fields, retired flags, and what a resumed run keeps."""

import json
from dataclasses import fields

import pytest

from ecvae_diffusers.training import calibrate_decoder, train_ecvae, train_flow
from ecvae_diffusers.training.command_line import REFUSED, RETIRED
from ecvae_diffusers.training.config import ConfigError
from ecvae_diffusers.training.train_ecvae import ECVAEConfig, parse_args


GIVEN = ["--train_data_dir", "images", "--output_dir", "out"]
RESUMED = ["--train_data_dir", "images", "--resume_from_checkpoint", "latest", "--output_dir"]
CONFIGS = {
    train_flow: train_flow.ECFlowConfig,
    calibrate_decoder: calibrate_decoder.ECDecoderConfig,
    train_ecvae: train_ecvae.ECVAEConfig,
}
# Those of each script, shared ones once.
FLOATS = {
    own.name: module
    for module, config in CONFIGS.items()
    for group in config.groups().values()
    for own in fields(group)
    if "float" in str(own.type) and own.metadata["flag"]
}
FROZEN = "--freeze_decoder --calibration posterior"


@pytest.mark.parametrize(
    "arguments, name",
    [
        ("--dataset_name x", "train_data_dir"),
        ("--resolution 48", "resolution"),
        ("--resolution 512", "resolution"),
        ("--image_size 16", "image_size"),
        ("--langevin_steps 0", "langevin_steps"),
        ("--max_train_steps -5", "max_train_steps"),
        ("--langevin_drift_step -0.1", "langevin_drift_step"),
        ("--kl_weight inf", "kl_weight"),
        ("--learning_rate 0", "learning_rate"),
        ("--energy_learning_rate -1", "energy_learning_rate"),
        ("--calibration_tolerance 0", "calibration_tolerance"),
        ("--calibration_tolerance some", "calibration_tolerance"),
        ("--calibration posteriors", "calibration"),
        ("--drift_tolerance 0", "drift_tolerance"),
        ("--drift_tolerance 0 --langevin_noise 0 --langevin_drift_step 0.1", "drift_tolerance"),
        (FROZEN, "pretrained_model_name_or_path"),
        ("--freeze_decoder --pretrained_model_name_or_path x", "calibration"),
        (f"{FROZEN} --pretrained_model_name_or_path x --posterior_decoder_weight 0.1", "posterior_decoder_weight"),
        (
            f"{FROZEN} --pretrained_model_name_or_path x --evaluation_steps 5 --early_stopping_patience 2",
            "early_stopping_patience",
        ),
        ("--early_stopping_patience 2", "evaluation_steps"),
        ("--posterior_decoder_weight -1", "posterior_decoder_weight"),
        ("--calibration both --kl_weight 0", "kl_weight"),
        ("--initial_dual 200", "initial_dual"),
        ("--adam_beta1 1", "adam_beta1"),
        ("--ema_max_decay 1.5", "ema_max_decay"),
        ("--seed -1", "seed"),
        ("--seed 4294967296", "seed"),
        ("--block_out_channels 8 8 8 8 8", "block_out_channels"),
        ("--block_out_channels 8 0", "block_out_channels"),
        ("--energy_num_scales 9", "energy_num_scales"),
        ("--lr_scheduler sometimes", "lr_scheduler"),
        ("--lr_warmup_steps 5", "lr_warmup_steps"),
        ("--conditioning_weight 6", "conditioning_weight"),
        ("--streaming", "streaming"),
        ("--hub_model_id me/run", "push_to_hub"),
        ("--report_to notebook", "report_to"),
        *((f"--{name} 3", name) for name in REFUSED),
        *((f"--{name} nan", name) for name in FLOATS if FLOATS[name] is train_ecvae),
    ],
)
def test_wrong_values_are_one_line(arguments, name, capsys):
    with pytest.raises(SystemExit) as refusal:
        parse_args([*GIVEN, *arguments.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert refusal.value.code == 2 and f"--{name}" in line


@pytest.mark.parametrize("name", [name for name, module in FLOATS.items() if module is not train_ecvae])
def test_numbers_of_the_other_scripts_are_finite(name, capsys):
    with pytest.raises(SystemExit):
        FLOATS[name].parse_args([*GIVEN, "--pretrained_model_name_or_path", "model", f"--{name}", "nan"])
    assert f"--{name}" in capsys.readouterr().err


def test_no_data_or_no_folder():
    for given in (GIVEN[:2], GIVEN[2:]):
        with pytest.raises(SystemExit):
            parse_args(given)


def test_a_configuration_made_in_python_is_checked_too():
    with pytest.raises(ConfigError, match="output_dir"):
        ECVAEConfig().resolved().check()
    config = ECVAEConfig.from_flat({"output_dir": "out", "train_data_dir": "images", "kl_weight": -1.0})
    with pytest.raises(ConfigError, match="kl_weight"):
        config.resolved().check()


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


@pytest.mark.parametrize(
    "arguments, dual",
    [("", 1000), ("--kl_weight 0.1", 100), ("--max_posterior_dual 3", 3), ("--kl_weight 0", 1000)],
)
def test_the_posterior_dual_variable_is_in_proportion_to_the_loss(arguments, dual):
    assert parse_args([*GIVEN, *arguments.split()]).model.max_posterior_dual == pytest.approx(dual)


@pytest.mark.parametrize("name", sorted(RETIRED.keys() - REFUSED))
def test_a_retired_flag_warns_and_changes_nothing(name, capsys):
    assert parse_args([*GIVEN, f"--{name}", "2"]) == parse_args(GIVEN)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--{name}" in line


@pytest.fixture
def run(tmp_path):
    """A run of before the gradient penalty existed, with a drift tolerance per pixel, and a checkpoint."""
    own = parse_args([*GIVEN, "--drift_tolerance", "0.0074", "--kl_weight", "0.5"]).flat() | {"energy_adam_beta2": 0.5}
    del own["energy_gradient_penalty"]
    (tmp_path / "training_args.json").write_text(json.dumps({**own, "component": "vae", "launch": {}}))
    (tmp_path / "checkpoint-5").mkdir()
    return tmp_path


def test_a_resumed_run_keeps_its_own_arguments(run, tmp_path):
    """What is given, also in a file, comes first; where things lie and how long a run lasts is never taken from the run."""
    path = run / "training_args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_train_steps": 7, "log_steps": 3}))
    config = parse_args([*RESUMED, str(run)])
    assert (config.calibration.drift_tolerance, config.model.kl_weight) == (0.0074, 0.5)
    assert (config.energy.energy_gradient_penalty, config.optimizer.energy_adam_beta2) == (0.0, 0.5)
    assert (config.optimizer.max_train_steps, config.run.log_steps) == (10_000, 10)
    file = tmp_path / "config.yaml"
    file.write_text("kl_weight: 2.0")
    config = parse_args([*RESUMED, str(run), "--drift_tolerance", "0.01", "--config", str(file)])
    assert (config.calibration.drift_tolerance, config.model.kl_weight) == (0.01, 2.0)


@pytest.mark.parametrize("change", ["no checkpoint", "damaged"])
def test_defaults_without_a_run_to_resume(run, change):
    if change == "damaged":
        (run / "training_args.json").write_text("{")
    else:
        (run / "checkpoint-5").rmdir()
    assert parse_args([*RESUMED, str(run)]).calibration.drift_tolerance is None
