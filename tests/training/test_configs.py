"""The files in training/configs are good, and what --config does with good and with bad ones.

Runs of the larger configs are in tests/slow/test_large_configs.py.
"""

import sys
from argparse import Namespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from config_runs import CONFIGS, two_steps

import demo
from ecvae_diffusers.training.tasks.networks import build_calibrator, build_energy_model
from ecvae_diffusers.training.tasks.vae import build_vae
from ecvae_diffusers.training.train_ecvae import parse_args


GIVEN = ["--train_data_dir", "images", "--output_dir", "out"]
DATA_SETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
LAUNCHES = sorted(CONFIGS.glob("accelerate/*.yaml"))


def test_there_is_a_config_for_each_size():
    assert DATA_SETS == [
        "celeba64", "celebahq256", "cifar10", "cifar10_published", "digits", "fashion_mnist", "imagenet32", "lsun_church64", "stl10",
    ]  # fmt: skip


@pytest.mark.parametrize("name", DATA_SETS)
def test_each_parses_and_its_networks_have_the_size_that_the_readme_says(name):
    path = CONFIGS / f"{name}.yaml"
    # The digits are no data set of the Hub.
    args = parse_args(["--config", path, "--output_dir", "x", *(GIVEN[:2] if name == "digits" else [])])
    flat, data = args.flat(), args.data
    assert all(flat[name] == value for name, value in yaml.safe_load(path.read_text()).items())
    networks = build_vae(args, data.in_channels), build_energy_model(args.energy, data.resolution, data.in_channels)
    sizes = [f"{network.num_parameters() / 1e6:.1f} M" for network in networks]
    cells = [f"[{name}.yaml]({name}.yaml)", data.resolution, data.in_channels, *sizes, args.optimizer.train_batch_size]
    row = f"| {' | '.join(map(str, [*cells, args.optimizer.max_train_steps]))} |"
    assert row in (CONFIGS / "README.md").read_text()


def test_the_published_constants_are_nearly_all_noise():
    """Of the tolerance of 0.05 at 3x32x32, K b^2 D is the chain's noise, which no generator can lower."""
    args = parse_args(["--config", CONFIGS / "cifar10_published.yaml", "--output_dir", "x"])
    entries = 3 * 32**2
    calibrator = build_calibrator(args.calibration, args.energy, build_energy_model(args.energy, 32, 3))
    noise_floor = entries * calibrator.scheduler.noise_variance()
    assert noise_floor == pytest.approx(0.046, abs=1e-4) and calibrator.resolve_tolerance() == 0.05
    assert not calibrator.relative_dual_step


def test_the_digits_are_those_of_the_demo():
    config = parse_args(["--config", CONFIGS / "digits.yaml", *GIVEN])
    of_demo = parse_args([*demo.ARGUMENTS, *GIVEN, "--max_train_steps", "1500"])
    free = {"in_channels", "checkpointing_steps", "checkpoints_total_limit"}
    different = {name for name, value in config.flat().items() if of_demo.flat()[name] != value}
    assert different <= free


def test_digits_train_through_accelerate_launch_with_the_config_of_one_gpu(tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate" / "one_gpu.yaml"))
    two_steps("digits", tmp_path, launcher=(sys.executable, *launch))


def test_fashion_mnist_trains(tmp_path):
    two_steps("fashion_mnist", tmp_path)


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def read(write, text: str, *arguments: str) -> Namespace:
    return Namespace(**parse_args(["--config", write(text), *arguments]).flat())


def test_the_command_line_overrides_the_config(write):
    text = "resolution: 64\nlearning_rate: 1e-4\nblock_out_channels: [8, 16]\nuse_ema: false\ntrain_batch_size: 3"
    args = read(write, text, *GIVEN)
    assert (args.resolution, args.learning_rate, args.block_out_channels) == (64, 1e-4, [8, 16])
    assert args.use_ema is False and args.train_batch_size == 3
    given = ["--resolution", "32", "--learning_rate", "0.5", "--block_out_channels", "4", "--use_ema"]
    args = read(write, text, *given, *GIVEN)
    assert (args.resolution, args.learning_rate, args.block_out_channels) == (32, 0.5, [4])
    assert args.use_ema is True and args.train_batch_size == 3
    # Before --config, and shortened.
    assert parse_args([*given, *GIVEN, "--conf", write(text)]).data.resolution == 32


@pytest.mark.parametrize(
    "text, given, expected",
    [
        ("random_flip: true\nenergy_spectral_norm: false", (), {"random_flip": True, "energy_spectral_norm": False}),
        ("push_to_hub: false\nmax_grad_norm: null", (), {"push_to_hub": False, "max_grad_norm": None}),
        ("random_flip: false", ("--random_flip",), {"random_flip": True}),
        ("random_flip: true", ("--no-random_flip",), {"random_flip": False}),
        ("mixed_precision: no", (), {"mixed_precision": "no"}),
    ],
)
def test_switches_and_words_that_yaml_reads_as_booleans(text, given, expected, write):
    args = vars(read(write, text, *given, *GIVEN))
    assert {name: args[name] for name in expected} == expected


def test_the_data_of_the_command_line_replaces_that_of_the_config(write):
    args = read(write, "dataset_name: a\noutput_dir: -x", "--train_data_dir", "mine")
    assert (args.dataset_name, args.train_data_dir, args.output_dir) == (None, "mine", "-x")
    assert read(write, "train_data_dir: a\noutput_dir: x", "--dataset_name", "theirs").train_data_dir is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("resolution: 32\nrezolution: 32", "holds unknown arguments: rezolution."),
        ("config: other.yaml", "holds unknown arguments: config."),
        ("resolution: big", "argument --resolution: invalid int value: 'big'"),
        ("resolution: true", "resolution must be one value, but is True."),
        ("resolution: [32, 64]", "resolution must be one value, but is [32, 64]."),
        ("random_flip: 'false'", "random_flip must be true or false, but is 'false'."),
        ("use_ema: 1", "use_ema must be true or false, but is 1."),
        ("learning_rate: fast", "argument --learning_rate: invalid float value: 'fast'"),
        ("block_out_channels: [16, wide]", "argument --block_out_channels: invalid int value: 'wide'"),
        ("block_out_channels: []", "argument --block_out_channels: expected at least one argument"),
        ("calibration: sometimes", "argument --calibration: invalid choice: 'sometimes'"),
        ("resolution: 48", "--resolution must be a power of two from 8 to 256, but is 48"),
        ("dataset_name: another", "one of --dataset_name and --train_data_dir must be given, and not both"),
        ("- resolution\n- 32", "must hold `argument: value` lines"),
        ("resolution", "must hold `argument: value` lines"),
        ("# resolution: 32", "must hold `argument: value` lines"),
        ("resolution: [32", "can't be read: while parsing"),
        ("!!python/object/apply:os.getcwd []", "can't be read: could not determine a constructor"),
    ],
)
def test_a_wrong_config_is_refused_in_one_message(write, text, message, capsys):
    # Not on the command line, where one of a pair would replace the other.
    common = "" if text.startswith(("-", "#", "!")) or ":" not in text else "train_data_dir: images\n"
    with pytest.raises(SystemExit) as refusal:
        parse_args(["--config", write(common + text), "--output_dir", "out"])
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [(None, "No such file"), (b"\xff\xfe\x00", "codec can't decode")])
def test_a_file_that_can_not_be_read_is_named(tmp_path, content, message, capsys):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as refusal:
        parse_args(["--config", path, *GIVEN])
    assert refusal.value.code == 2
    error = capsys.readouterr().err
    assert f"--config {str(path)!r} can't be read" in error and message in error


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs_and_launches_data_parallel(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type in (DistributedType.NO, DistributedType.MULTI_GPU)
    assert config.mixed_precision == "bf16" and not config.use_cpu
    assert not (config.deepspeed_config or config.fsdp_config or config.megatron_lm_config)
    # What `accelerate launch` makes of it, up to where it would start processes.
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    )
    expected = {"one_gpu": (1, 1, False), "eight_gpus": (8, 1, True), "two_machines": (16, 2, True)}
    assert (args.num_processes, args.num_machines, args.multi_gpu) == expected[path.stem]
    assert args.mixed_precision == "bf16" and not (args.use_deepspeed or args.use_fsdp or args.tpu)


def test_place_and_address_of_a_machine_may_be_given_on_the_command_line():
    path = str(CONFIGS / "accelerate" / "two_machines.yaml")
    argv = ["--config_file", path, "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    assert (args.machine_rank, args.main_process_ip, args.main_process_port) == (1, "10.0.0.7", 29500)
