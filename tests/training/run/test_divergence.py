"""The guard against divergence: what it sees, what it goes back to, and runs with a fault in them."""

import math

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from training_runs import TINY, metrics, run_with_fault, weights, write_images

from ecvae_diffusers import EnergyCalibrator, LangevinScheduler
from ecvae_diffusers.report.read import Run
from ecvae_diffusers.report.verdict import findings
from ecvae_diffusers.training import train_ecvae
from ecvae_diffusers.training.run import divergence, launch
from ecvae_diffusers.training.run.divergence import (
    CONFIRMATIONS,
    LASTING,
    WARMUP,
    DivergenceGuard,
    Recovery,
    calibration_state,
)
from ecvae_diffusers.training.run.log import read_metrics
from ecvae_diffusers.training.tasks.networks import Trained


HEALTHY = {
    "reconstruction": 20.0, "gradient_norm_max": 100.0, "energy_gradient_norm_max": 3.0, "energy_real": -1.0,
    "energy_real_std": 0.4, "energy_targets": -0.5, "energy_targets_std": 0.4, "constraint_max": 0.03, "dual": 30.0, "constraint": 0.02, "tolerance": 0.015,
    "sample_spread": 0.5, "data_spread": 0.6,
}  # fmt: skip
# What is divergence only if it lasts, with gradients clipped to 30, and what is said of it.
DOUBTS = {
    "gradient": ({"gradient_norm_max": 1e9}, "gradient_norm_max 1e+09 is far outside"),
    "energy model": ({"energy_gradient_norm_max": 0.02}, "the energy model is dead"),
    "samples": ({"sample_spread": 0.02}, "samples are all alike"),
}


def healthy(i: int, **changed) -> dict:
    """Scalars that vary by a tenth, as those of a run do."""
    moving = ("reconstruction", "gradient_norm_max", "energy_gradient_norm_max", "constraint_max")
    return {**HEALTHY, **{name: HEALTHY[name] * (1 + 0.1 * math.sin(i)) for name in moving}, **changed}


def watched(count: int = 60, **kwargs) -> DivergenceGuard:
    guard = DivergenceGuard(max_dual=100.0, **kwargs)
    for i in range(count):
        assert guard.observe(healthy(i)) == ([], [])
    return guard


def resumed(guard: DivergenceGuard, **kwargs) -> DivergenceGuard:
    new = DivergenceGuard(max_dual=100.0, **kwargs)
    new.load_state_dict(guard.state_dict())
    return new


def test_when_calibration_is_off():
    scalars = {
        "energy_real": -1.0,
        "energy_real_std": 0.5,
        "energy_samples_std": 0.5,
        "reconstruction_gradient_norm": 10.0,
    }
    for dual, gradient, energy, expected in (
        (0.0, 0.0, 1.0, [0, 1]),
        (0.5, 0.09, 1.0, [0, 1]),  # under a hundredth of the reconstruction's
        (0.5, 0.11, 1.0, [1, 0]),
        (0.0, 0.0, -0.6, [0, 0]),  # the energy model tells nothing apart: samples are like data
    ):
        scalars |= {"dual": dual, "calibration_gradient_norm": gradient, "energy_samples": energy}
        assert list(calibration_state(scalars).values()) == expected
    # One warning per time, after 100 steps.
    guard = watched(0, interval=34)
    assert guard.observe(healthy(0, calibration_off=1)) == ([], [])
    guard = resumed(guard, interval=34)  # the count is part of the state
    for off, warnings in ((1, 1), (1, 0), (0, 0), (1, 0), (1, 1), (1, 0)):
        assert len(guard.observe(healthy(0, calibration_off=off))[1]) == warnings


FAR_OUTSIDE = {
    "gradient_norm_max": {"gradient_norm_max": 5e4},
    "energy_gradient_norm_max": {"energy_gradient_norm_max": 900.0},
    "energy_gap": {"energy_targets": -80.0},
    "reconstruction": {"reconstruction": 5000.0},
    "constraint_max": {"constraint_max": 2.0},
}


@pytest.mark.parametrize("name", FAR_OUTSIDE)
def test_far_outside_the_running_range(name):
    # A gradient that clipping does not bring back into its range is as one that is not clipped.
    for max_grad_norm in (None, 1e6):
        guard = resumed(watched(), max_grad_norm=max_grad_norm)
        for i in range(5):  # an outlier does not widen the range
            alarms, _ = guard.observe(healthy(i, **FAR_OUTSIDE[name]))
            assert len(alarms) == 1 and alarms[0].startswith(f"{name} ")
    # Not before there is a range; and what is large but not far outside is no reason to go back.
    assert watched(10).observe(healthy(0, **FAR_OUTSIDE[name])) == ([], [])
    assert watched().observe(healthy(0, gradient_norm_max=400.0, constraint_max=0.1, reconstruction=2.0)) == ([], [])


@pytest.mark.parametrize("changed, said", DOUBTS.values(), ids=DOUBTS.keys())
def test_what_is_divergence_only_if_it_lasts(changed, said):
    guard = watched(max_grad_norm=30.0)
    for _ in range(4):  # a few are chance, and one healthy step starts the count anew
        assert [guard.observe(healthy(i, **changed)) for i in range(LASTING - 1)] == [([], [])] * (LASTING - 1)
        assert guard.observe(healthy(0)) == ([], [])
    for i in range(LASTING - 1):
        guard.observe(healthy(i, **changed))
    (alarm,) = resumed(guard, max_grad_norm=30.0).observe(healthy(0, **changed))[0]  # the count is part of the state
    assert alarm.startswith(said)
    # A network has no range at first, and a decoder that has learned nothing yet gives one image only.
    assert all(watched(0).observe(healthy(i, **changed)) == ([], []) for i in range(WARMUP))


def test_an_energy_model_that_is_worse_than_a_constant_one():
    """The loss that it is judged by is the one that it is trained on, and no running range is needed."""
    torch.manual_seed(0)
    regularization = 0.1
    real, targets = 3 * torch.randn(64) - 2, 2 * torch.randn(64) + 1
    calibrator = EnergyCalibrator(None, LangevinScheduler(), energy_regularization=regularization)
    scalars = {}
    for name, energies in (("energy_real", real), ("energy_targets", targets)):
        scalars |= {name: energies.mean().item(), f"{name}_std": energies.std(correction=0).item()}
    expected = calibrator.contrast(real, targets).loss.item()
    assert divergence.energy_loss(scalars, regularization) == pytest.approx(expected, rel=1e-5)
    # The best loss, of energies -1 / (2 alpha) and 1 / (2 alpha), and the worst one that is no doubt.
    for gap, energies, is_broken in ((1, 5.0, False), (-1, 2.0, False), (-1, 2.1, True), (-1, 5e3, True)):
        guard = watched(0, energy_regularization=regularization)
        changed = {"energy_real": -gap * energies, "energy_targets": gap * energies}
        assert [guard.observe(healthy(i, **changed)) for i in range(LASTING - 1)] == [([], [])] * (LASTING - 1)
        assert bool(guard.observe(healthy(0, **changed))[0]) == is_broken
    # Without regularization, energies have no scale.
    assert all(watched(0).observe(healthy(i, **changed)) == ([], []) for i in range(WARMUP))


def test_a_pinned_dual():
    """A warning if the bound is too low; if the chain has run away an alarm, but no second one."""
    for ratio, alarms, warnings in ((5.0, 0, 1), (30.0, 1, 0)):
        guard = watched()
        # One step below it in between changes nothing.
        constraints = [0.015 * (4.0 if i == 20 else ratio) for i in range(55)]
        seen = [
            guard.observe(healthy(i, dual=100.0, constraint=constraint)) for i, constraint in enumerate(constraints)
        ]
        assert [sum(len(one[kind]) for one in seen) for kind in (0, 1)] == [alarms, warnings]
        assert seen[49] != ([], [])  # after so many in a row, not before
    guard.observe(healthy(0))
    assert not any(guard.observe(healthy(i, dual=100.0, constraint=0.5))[0] for i in range(50))
    guard = watched()
    for i in range(200):  # it leaves the bound now and then; one wild value in between is chance
        changed = {"dual": 100.0, "constraint": 9.0 if i == 120 else 0.02} if i % 45 else {}
        assert guard.observe(healthy(i, **changed)) == ([], [])


def build_trained(learning_rate: float = 1e-3, schedule: str = "constant") -> Trained:
    network, accelerator = torch.nn.Linear(3, 2), Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=10)
    return Trained(accelerator, None, *accelerator.prepare(network, optimizer, scheduler))


@pytest.fixture
def build(tmp_path):
    def build(*arguments) -> Recovery:
        given = ["--train_data_dir", "images", "--output_dir", tmp_path, "--max_dual", 100, *arguments]
        config = train_ecvae.parse_args(given)
        return Recovery(config, Accelerator(cpu=True), build_trained(), build_trained())

    return build


def train(trained: Trained, steps: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        trained.step(trained.network(torch.randn(4, 3, generator=generator)).square().sum())
    return trained.network.weight.detach().clone()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_seen_at_once(value, build):
    for complete in (True, False):
        assert build().judge(1, healthy(0, constraint_max=value), complete) == ["constraint_max not finite"]
        with pytest.raises(FloatingPointError, match="constraint_max"):
            build("--no-divergence_guard").judge(1, healthy(0, constraint_max=value), complete)
    recovery = build()
    recovery.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert recovery.judge(1, healthy(0, gradient_norm_max=value)) == []  # what loss scaling left out


def test_a_restored_state_is_the_state_and_stays_it(build):
    recovery = build("--log_steps", 1)
    train(recovery.lowered)
    recovery.keep_healthy(100)
    expected = train(recovery.lowered)
    for _ in range(3):  # what was restored is trained on, and is whole the next time
        assert recovery.roll_back(150, ["a fault"]) == (100, True)
        recovery.factor = 1.0
        recovery.lowered.scale_learning_rate(1.0)
        assert torch.equal(train(recovery.lowered), expected)


def test_which_state_is_gone_back_to(build):
    recovery = build()
    for step in range(0, 350, 50):
        recovery.keep_healthy(step)
    # Three are kept, of which 300 has not outlived the confirmation; then none was healthy since; then there is none before.
    for step, expected in ((310, 200), (210, 100), (110, 100)):
        assert recovery.roll_back(step, ["a fault"])[0] == expected
    recovery.keep_healthy(200)
    assert recovery.roll_back(230, ["a fault"])[0] == 200


def test_the_rate_recovers_from_a_passing_fault_and_stays_down_otherwise(build):
    recovery = build()

    def go_on(first: int, last: int) -> float:
        for step in range(first, last, 100):
            recovery.keep_healthy(step)
        return recovery.lowered.optimizer.param_groups[0]["lr"]

    go_on(0, 500)
    for _ in range(3):  # one fault that takes three rollbacks
        recovery.roll_back(510, ["a fault"])
    assert recovery.num_rollbacks == 3 and go_on(400, 400) == pytest.approx(1e-3 / 8)
    assert go_on(400, 4000) == pytest.approx(1e-3)
    for breakdowns, step in ((2, 4000), (3, 9000)):  # a rate that is too high breaks the run again and again
        recovery.roll_back(step, ["the same again"])
        assert go_on(step, step + 5000) == pytest.approx(1e-3 / 2 ** (breakdowns - 1))
    kinds = [event["kind"] for event in read_metrics(recovery.output_dir / "events.jsonl")]
    assert kinds == ["rollback"] * 3 + ["recovery"] + ["rollback"] * 2


def test_a_lowered_rate_follows_its_schedule():
    trained = build_trained(schedule="linear")
    train(trained, 2)
    trained.scale_learning_rate(0.5)
    for step in (2, 4):
        assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3 * (1 - step / 10))
        train(trained, 2)


def test_a_run_that_was_resumed_amid_doubts_can_go_back(build):
    """The state that it resumes from is all that there is, and is given its time."""
    recovery, other, fault = build(), build(), {"sample_spread": 0.0}
    for i in range(63):
        assert recovery.judge(10 * i, healthy(i, **(fault if i >= 60 else {}))) == []
    other.load_state_dict(recovery.state_dict())
    other.keep_healthy(620)
    for observations in (LASTING - 3, LASTING):  # the second time all, not the two that were left
        for i in range(observations):
            alarms = other.judge(630 + 10 * i, healthy(i, **fault))
            assert bool(alarms) == (i == observations - 1)
        assert other.roll_back(620 + 10 * observations, alarms) == (620, True)


@pytest.mark.parametrize("log_steps", [1, 50])
@pytest.mark.parametrize("name", ["gradient", "energy model", "samples"])
def test_no_state_of_a_fault_that_is_seen_late_is_healthy(name, log_steps, build, monkeypatch):
    """What is an alarm when it has lasted is gone back from to before it began, in one step, however seldom is logged."""
    interval = min(log_steps, divergence.INTERVAL)
    monkeypatch.setattr(divergence, "HEALTHY_STATE_STEPS", interval)
    monkeypatch.setattr(divergence, "HEALTHY_STATES", 12)
    changed, said = DOUBTS[name]
    recovery = build("--max_grad_norm", 30.0, "--log_steps", log_steps, "--max_rollbacks", 3)
    begun, step, went_back = 60 * interval + 100, 0, []
    while len(went_back) < 4:  # it stays until the run is given up
        step += interval
        broken = step > begun
        recovery.lowered.network.bias.data.fill_(1.0 if broken else 0.0)
        if alarms := recovery.judge(step, healthy(step, **(changed if broken else {}))):
            assert all(alarm.startswith(said) for alarm in alarms)
            step, _ = recovery.roll_back(step, alarms)
            went_back.append(step)
            assert recovery.lowered.network.bias.eq(0).all()
        else:
            recovery.keep_healthy(step)
    assert all(step <= begun for step in went_back) and went_back[0] > begun - 100 - 2 * interval
    # As of the first observation that was doubtful.
    assert went_back[0] <= begun + interval - CONFIRMATIONS * interval


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def test_a_run_whose_calibration_is_off_says_so(data, tmp_path, monkeypatch, capsys):
    """A tolerance far too wide: in the events and on the bar, and first in the report."""
    monkeypatch.setattr(divergence, "OFF_STEPS", 20)
    arguments = [
        "--train_data_dir", data, "--output_dir", tmp_path / "run", *TINY, "--max_train_steps", 60, "--initial_dual", 0.5,
        "--calibration_tolerance", 100.0, "--energy_learning_rate", 5e-3,
    ]  # fmt: skip
    train_ecvae.run(train_ecvae.parse_args(arguments))
    (event,) = read_metrics(tmp_path / "run" / "events.jsonl")
    assert event["kind"] == "warning" and "calibration is off" in event["message"]
    assert "(calibration is off)" in capsys.readouterr().err
    first = findings(Run.read(tmp_path / "run"))[0]
    assert first.name == "Calibration" and not first.healthy


def test_a_run_that_seldom_logs_goes_back_as_soon(data, tmp_path, monkeypatch):
    """An energy model that breaks down early, and whose range would be that of its breakdown. The log is that of a healthy run."""

    class FaultyTrainer(launch.Trainer):
        iteration, norms = 0, []

        def train_step(self, batches):
            if self.iteration == 11:
                with torch.no_grad():
                    self.task.energy_model.networks[0].conv_out.weight *= 1e4
            self.iteration += 1
            scalars = super().train_step(batches)
            self.norms.append(scalars["energy_gradient_norm"].item())
            return scalars

    monkeypatch.setattr(launch, "Trainer", FaultyTrainer)
    arguments = ["--train_data_dir", data, "--output_dir", tmp_path / "run", *TINY, "--max_train_steps", 60]
    train_ecvae.run(train_ecvae.parse_args([*arguments, "--log_steps", 1000, "--no-energy_spectral_norm"]))
    rollback = read_metrics(tmp_path / "run" / "events.jsonl")[0]
    assert rollback["kind"] == "rollback" and rollback["to_step"] == 0
    assert rollback["step"] == 20 + 10 * (LASTING - 1)
    (record,) = metrics(tmp_path / "run")
    assert record["step"] == 60 and abs(record["energy_real"]) < 10
    # The largest norm since the state that was gone back to.
    assert record["energy_gradient_norm_max"] == pytest.approx(max(FaultyTrainer.norms[-60:]))


def assert_finite(*folders) -> None:
    assert all(torch.isfinite(value).all() for folder in folders for value in weights(folder).values())


def test_a_rollback_and_a_run_that_is_resumed_after_it(data, tmp_path):
    """A gradient that is not a number, once. If cut off later, the data stays in its other order, and the end is the same."""
    whole, cut, arguments = tmp_path / "whole", tmp_path / "cut", ["--checkpointing_steps", 20]
    result = run_with_fault(data, whole, 14, 15, *arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    event, recovery = read_metrics(whole / "events.jsonl")
    assert recovery["kind"] == "recovery" and recovery["step"] == 16
    assert event["kind"] == "rollback" and "not finite" in event["message"] and event["to_step"] == 12
    records = metrics(whole)
    assert [record["step"] for record in records] == list(range(2, 25, 2))  # nothing is left of what was undone
    rates = [record["energy_learning_rate"] for record in records]
    assert rates == [1e-3] * 6 + [5e-4] * 2 + [1e-3] * 4  # lowered until the next healthy state
    assert_finite(whole)
    assert run_with_fault(data, cut, 14, 15, *arguments, "--max_train_steps", 20).returncode == 0
    assert run_with_fault(data, cut, 99, 99, *arguments, "--resume_from_checkpoint", "latest").returncode == 0
    expected, found = weights(whole), weights(cut)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [record["energy_learning_rate"] for record in metrics(cut)] == rates


def test_a_fault_that_stays_ends_the_run_with_healthy_weights(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 999, "--max_rollbacks", 2)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert "not finite" in message and "--pretrained_model_name_or_path" in message
    kinds = [event["kind"] for event in read_metrics(out / "events.jsonl")]
    assert kinds == ["rollback", "rollback", "stopped"]
    assert_finite(out)
    # The way on that the message names.
    given = ["--train_data_dir", data, "--output_dir", tmp_path / "next", *TINY, "--max_train_steps", 1]
    train_ecvae.run(train_ecvae.parse_args([*given, "--pretrained_model_name_or_path", out]))


def test_nothing_is_saved_of_a_step_that_broke_between_two_logged_ones(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 15, "--log_steps", 20, "--checkpointing_steps", 3)
    assert result.returncode == 0, result.stderr[-3000:]
    event = read_metrics(out / "events.jsonl")[0]
    assert event["kind"] == "rollback" and event["step"] == 15 and event["to_step"] == 0
    pipelines = [*out.glob("checkpoint-*/pipeline"), out]
    assert len(pipelines) >= 9
    assert_finite(*pipelines)


# The process dies where the checkpoint that was gone back to is to take its place.
KILLED_AT_REPLACE = """
import os
replace = os.replace
os.replace = lambda source, target: os._exit(9) if str(target).endswith("checkpoint-8") else replace(source, target)
"""


def test_a_kill_while_it_goes_back_leaves_no_state_that_was_given_up(data, tmp_path):
    """Killed when the later checkpoints are out of the way and the healthy one is not yet there."""
    out, arguments = tmp_path / "out", ["--log_steps", 4, "--checkpointing_steps", 13]
    result = run_with_fault(data, out, 14, 15, *arguments, before=KILLED_AT_REPLACE)
    assert result.returncode == 9, result.stderr[-3000:]
    assert not list(out.glob("checkpoint-*")) and list(out.glob(".checkpoint-8"))
    resumed = run_with_fault(data, out, 99, 99, *arguments, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0 and "starting at step 0" in resumed.stderr
    assert not list(out.glob(".*checkpoint-*"))
    assert_finite(out)
