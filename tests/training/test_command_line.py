"""Flags, YAML files, retired flags, and the arguments that a resumed run keeps."""

import json

import pytest

from ecvae_diffusers.training.command_line import REFUSED, RETIRED
from ecvae_diffusers.training.train_ecvae import parse_args


GIVEN = ["--train_data_dir", "images", "--output_dir", "out"]
RESUMED = ["--train_data_dir", "images", "--resume_from_checkpoint", "latest", "--output_dir"]


@pytest.fixture
def read(tmp_path):
    """Reads the text of a YAML file, and arguments."""

    def read(text: str, *arguments: str) -> dict:
        (tmp_path / "config.yaml").write_text(text)
        return parse_args(["--conf", tmp_path / "config.yaml", *arguments]).flat()

    return read


def test_the_command_line_overrides_the_file(read):
    """Also lists and switches; `no` is a word, and `null` nothing."""
    text = "resolution: 64\nlearning_rate: 1e-4\nblock_out_channels: [8, 16]\nuse_ema: false\ntrain_batch_size: 3\n"
    text += "random_flip: true\nmax_grad_norm: null\nmixed_precision: no\noutput_dir: -x"
    expected = {
        "resolution": 64,
        "learning_rate": 1e-4,
        "block_out_channels": [8, 16],
        "use_ema": False,
        "train_batch_size": 3,
    }
    expected |= {"random_flip": True, "max_grad_norm": None, "mixed_precision": "no", "output_dir": "-x"}
    assert expected.items() <= read(text, "--train_data_dir", "images").items()
    given = "--resolution 32 --learning_rate 0.5 --block_out_channels 4 --use_ema --no-random_flip".split()
    expected |= {
        "resolution": 32,
        "learning_rate": 0.5,
        "block_out_channels": [4],
        "use_ema": True,
        "random_flip": False,
    }
    assert (expected | {"output_dir": "out"}).items() <= read(text, *given, *GIVEN).items()


def test_the_data_of_the_command_line_replaces_that_of_the_file(read):
    args = read("dataset_name: a\noutput_dir: x", "--train_data_dir", "mine")
    assert (args["dataset_name"], args["train_data_dir"]) == (None, "mine")
    assert read("train_data_dir: a\noutput_dir: x", "--dataset_name", "theirs")["train_data_dir"] is None


@pytest.mark.parametrize(
    "text, named",
    [
        ("rezolution: 32", "rezolution"),
        ("resolution: big", "--resolution"),
        ("resolution: true", "--resolution"),
        ("random_flip: 'false'", "--random_flip"),
        ("push_to_hub: true\nhub_model_id: no", "--hub_model_id"),
        ("train_data_dir: [a, b]", "--train_data_dir"),
        ("block_out_channels: [16, wide]", "--block_out_channels"),
        ("calibration: sometimes", "--calibration"),
        ("resolution: 25\ntrain_data_dir: images", "--resolution"),
        ("dataset_name: a\ntrain_data_dir: b", "--dataset_name"),
        ("- resolution\n- 32", "--config"),
        ("resolution: [32", "--config"),
        ("!!python/object/apply:os.getcwd []", "--config"),
        (b"\xff\xfe\x00", "--config"),
        (None, "--config"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, text, named, capsys):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as refusal:
        parse_args(["--config", path, "--output_dir", "out"])
    (line,) = capsys.readouterr().err.splitlines()
    assert refusal.value.code == 2 and named in line


def test_retired_flags_warn_and_change_nothing(read, capsys):
    for name in sorted(RETIRED.keys() - REFUSED):
        assert parse_args([*GIVEN, f"--{name}", "2"]) == parse_args(GIVEN)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--{name}" in line
    assert read("norm_type: group\nnum_epochs: 3", *GIVEN, "--max_train_steps", "5")["max_train_steps"] == 5
    assert "--norm_type" in capsys.readouterr().err


@pytest.fixture
def run(tmp_path):
    """A run of before the gradient penalty existed, with a drift tolerance per pixel, and a checkpoint."""
    own = parse_args([*GIVEN, "--drift_tolerance", "0.0074", "--kl_weight", "0.5"]).flat() | {"energy_adam_beta2": 0.5}
    del own["energy_gradient_penalty"]
    own |= {"component": "vae", "launch": {}, "max_train_steps": 7, "log_steps": 3}
    (tmp_path / "training_args.json").write_text(json.dumps(own))
    (tmp_path / "checkpoint-5").mkdir()
    return tmp_path


def test_a_resumed_run_keeps_its_own_arguments(run, read):
    """What is given, also in a file, comes first. Where things lie is never taken from the run."""
    config = parse_args([*RESUMED, str(run)])
    assert (config.calibration.drift_tolerance, config.model.kl_weight) == (0.0074, 0.5)
    assert (config.energy.energy_gradient_penalty, config.optimizer.energy_adam_beta2) == (0.0, 0.5)
    assert (config.optimizer.max_train_steps, config.run.log_steps) == (7, 3)
    args = read("kl_weight: 2.0", *RESUMED, str(run), "--drift_tolerance", "0.01")
    assert (args["drift_tolerance"], args["kl_weight"]) == (0.01, 2.0)


@pytest.mark.parametrize("change", ["no checkpoint", "damaged"])
def test_defaults_without_a_run_to_resume(run, change):
    if change == "damaged":
        (run / "training_args.json").write_text("{")
    else:
        (run / "checkpoint-5").rmdir()
    assert parse_args([*RESUMED, str(run)]).calibration.drift_tolerance is None


@pytest.mark.parametrize(
    "arguments, resolution",
    [
        ("my_images --resolution 24 40 --output_dir out", [24, 40]),
        ("--resolution 24 40 my_images --output_dir out", [24, 40]),
        ("--resolution 16 my_images --output_dir out", 16),
        ("--resolution=16 my_images --output_dir out", 16),
        ("--resolution 64 --output_dir out --resolution 24 40 my_images", [24, 40]),
    ],
)
def test_a_resolution_takes_its_numbers_and_not_the_data(arguments, resolution):
    data = parse_args(arguments.split()).data
    assert data.resolution == resolution and "my_images" in (data.train_data_dir, data.dataset_name)
