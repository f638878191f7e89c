"""The files in training/configs are good. Runs of the larger ones are in tests/slow/test_large_configs.py."""

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from config_runs import CONFIGS

import demo
from ecvae_diffusers.training.tasks.networks import build_calibrator, build_energy_model
from ecvae_diffusers.training.tasks.vae import build_vae
from ecvae_diffusers.training.train_ecvae import parse_args


GIVEN = ["--train_data_dir", "images", "--output_dir", "out"]
DATA_SETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", DATA_SETS)
def test_each_parses_and_its_networks_have_the_size_that_the_readme_says(name):
    path = CONFIGS / f"{name}.yaml"
    # Digits and Noto emoji are no data sets of the Hub.
    given = GIVEN[:2] if name in ("digits", "noto_emoji") else []
    args = parse_args(["--config", path, "--output_dir", "x", *given])
    flat, data = args.flat(), args.data
    assert all(flat[name] == value for name, value in yaml.safe_load(path.read_text()).items())
    energy_model = build_energy_model(args.energy, data.resolution, data.in_channels)
    sizes = [f"{n.num_parameters() / 1e6:.1f} M" for n in (build_vae(args, data.in_channels), energy_model)]
    cells = [f"[{name}.yaml]({name}.yaml)", data.resolution, data.in_channels, *sizes, args.optimizer.train_batch_size]
    row = f"| {' | '.join(map(str, [*cells, args.optimizer.max_train_steps]))} |"
    assert row in (CONFIGS / "README.md").read_text()
    if name == "cifar10_published":
        # Of the tolerance of 0.05 at 3x32x32, K b^2 D is the chain's noise, which no generator can lower.
        calibrator = build_calibrator(args.calibration, args.energy, energy_model)
        assert 3 * 32**2 * calibrator.scheduler.noise_variance() == pytest.approx(0.046, abs=1e-4)
        assert calibrator.resolve_tolerance() == 0.05 and not calibrator.relative_dual_step


def test_the_digits_are_those_of_the_demo():
    config = parse_args(["--config", CONFIGS / "digits.yaml", *GIVEN])
    of_demo = parse_args([*demo.ARGUMENTS, *GIVEN, "--max_train_steps", "1500"])
    different = {name for name, value in config.flat().items() if of_demo.flat()[name] != value}
    assert different <= {"in_channels", "checkpointing_steps", "checkpoints_total_limit"}


@pytest.mark.parametrize(
    "name, expected", [("one_gpu", (1, 1, False)), ("eight_gpus", (8, 1, True)), ("two_machines", (16, 2, True))]
)
def test_accelerate_reads_its_configs_and_launches_data_parallel(name, expected):
    """What `accelerate launch` makes of it, up to where it would start processes."""
    path = str(CONFIGS / "accelerate" / f"{name}.yaml")
    argv = ["--config_file", path, "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    assert (args.num_processes, args.num_machines, args.multi_gpu) == expected
    assert args.mixed_precision == "bf16" and not (args.use_deepspeed or args.use_fsdp or args.tpu or args.cpu)
    assert (args.machine_rank, args.main_process_ip) == (1, "10.0.0.7")
