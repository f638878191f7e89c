"""A run that is resumed keeps its own arguments, whatever the defaults are by now."""

import json

import pytest

from ecvae_diffusers.training.arguments.vae import parse_args


GIVEN = ["--train_data_dir", "images", "--resume_from_checkpoint", "latest"]


@pytest.fixture
def run(tmp_path):
    """A run of before the gradient penalty existed, with a drift tolerance per pixel, and a checkpoint."""
    own = vars(
        parse_args([*GIVEN, "--output_dir", str(tmp_path), "--drift_tolerance", "0.0074", "--kl_weight", "0.5"])
    )
    del own["energy_gradient_penalty"]
    (tmp_path / "training_args.json").write_text(json.dumps({**own, "component": "vae", "launch": {}}))
    (tmp_path / "checkpoint-5").mkdir()
    return tmp_path


def test_what_is_not_given_is_as_the_run_has_it(run):
    args = parse_args([*GIVEN, "--output_dir", str(run)])
    assert (args.drift_tolerance, args.kl_weight, args.energy_gradient_penalty) == (0.0074, 0.5, 0.0)
    assert not hasattr(args, "component")


def test_what_is_given_goes_first(run, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("kl_weight: 2.0")
    args = parse_args([*GIVEN, "--output_dir", str(run), "--drift_tolerance", "0.01", "--config", str(config)])
    assert (args.drift_tolerance, args.kl_weight) == (0.01, 2.0)


def test_what_may_change_is_not_taken_from_the_run(run):
    path = run / "training_args.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_train_steps": 7, "log_steps": 3}))
    args = parse_args([*GIVEN, "--output_dir", str(run)])
    assert (args.max_train_steps, args.log_steps) == (10_000, 10)


@pytest.mark.parametrize("change", ["no checkpoint", "damaged"])
def test_defaults_without_a_run_to_resume(run, change):
    if change == "damaged":
        (run / "training_args.json").write_text("{")
    else:
        (run / "checkpoint-5").rmdir()
    assert parse_args([*GIVEN, "--output_dir", str(run)]).drift_tolerance is None
