"""The guard against divergence: what it sees, what it goes back to, and runs with a fault in them."""

import math
import os

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from training_runs import TINY, metrics, run_with_fault, succeed, weights, write_images

from ecvae_diffusers.report.verdict import JUDGES, Run, judge_calibration
from ecvae_diffusers.training.optimization import Trained
from ecvae_diffusers.training.run import divergence
from ecvae_diffusers.training.run.divergence import (
    CONFIRMATIONS,
    GRADIENTS,
    LASTING,
    WARMUP,
    DivergenceGuard,
    Recovery,
)
from ecvae_diffusers.training.run.log import read_metrics


HEALTHY = {
    "reconstruction": 20.0, "gradient_norm_max": 100.0, "energy_gradient_norm_max": 3.0, "energy_real": -1.0,
    "energy_targets": -0.5, "constraint_max": 0.03, "dual": 30.0, "constraint": 0.02, "tolerance": 0.015,
    "sample_spread": 0.5, "data_spread": 0.6,
}  # fmt: skip
OFF = {
    "energy_real": -1.0, "energy_samples": 1.0, "energy_targets": 0.9, "energy_real_std": 0.5, "energy_samples_std": 0.5,
    "calibration_gradient_norm": 0.0, "reconstruction_gradient_norm": 10.0, "dual": 0.0,
}  # fmt: skip
# What is divergence only if it lasts, with gradients clipped to 30, and what is said of it.
DOUBTS = {
    "gradient": ({"gradient_norm_max": 1e9}, "gradient_norm_max 1e+09 is far outside"),
    "energy gradient": ({"energy_gradient_norm_max": 1e9}, "energy_gradient_norm_max 1e+09 is far outside"),
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


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dual": 0.5, "calibration_gradient_norm": 0.09},  # under a hundredth of the reconstruction's
        {"dual": 0.0, "calibration_gradient_norm": 0.0, "reconstruction_gradient_norm": 0.0},
    ],
)
def test_a_warning_once_per_time_that_calibration_is_off(changed):
    off = healthy(0, **{**OFF, **changed})
    on = healthy(0, **{**OFF, "dual": 1.0, "calibration_gradient_norm": 0.2})
    guard = watched(0, log_steps=34)
    assert [len(guard.observe(off)[1]) for _ in range(1)] == [0]
    guard = resumed(guard, log_steps=34)  # the count is part of the state
    assert [len(guard.observe(off)[1]) for _ in range(3)] == [1, 0, 0]
    assert [len(guard.observe(scalars)[1]) for scalars in (on, off, off, off)] == [0, 0, 1, 0]
    # If the energy model tells nothing apart, there is nothing to calibrate: samples are like data.
    guard = watched(0, log_steps=100)
    for energy in (-0.6, -5.0):
        assert guard.observe(healthy(0, **{**OFF, "energy_samples": energy})) == ([], [])


def test_a_run_whose_calibration_is_off_says_so(tmp_path):
    """A tolerance far too wide: in the log and the events within 100 steps of lambda at 0, on the bar, and first in the report."""
    data, run = write_images(tmp_path / "images", count=16), tmp_path / "run"
    result = succeed(
        "--train_data_dir", data, "--output_dir", run, *TINY, "--max_train_steps", 130, "--initial_dual", 0.5,
        "--calibration_tolerance", 100.0, "--energy_learning_rate", 2e-3,
    )  # fmt: skip
    first_off = next(record["step"] for record in metrics(run) if not record["calibrating"])
    events = [event for event in read_metrics(run / "events.jsonl") if event["kind"] == "warning"]
    assert len(events) == 1 and first_off <= events[0]["step"] <= first_off + 100
    assert "calibration is off" in result.stderr and "(calibration is off)" in result.stderr
    assert not judge_calibration(Run.read(run)).healthy and JUDGES[0] is judge_calibration


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_seen_at_once(value):
    alarms, _ = DivergenceGuard(100.0).observe(healthy(0, constraint_max=value))
    assert alarms == ["constraint_max not finite"]


@pytest.mark.parametrize(
    "changed, name",
    [
        ({"gradient_norm_max": 5e4}, "gradient_norm_max"),
        ({"energy_gradient_norm_max": 900.0}, "energy_gradient_norm_max"),
        ({"energy_real": -80.0}, "energy_gap"),
        ({"energy_targets": -80.0}, "energy_gap"),
        ({"reconstruction": 5000.0}, "reconstruction"),
        ({"constraint_max": 2.0}, "constraint_max"),
    ],
)
def test_far_outside_the_running_range(changed, name):
    guard = resumed(watched())
    for i in range(5):  # an outlier does not widen the range
        alarms, _ = guard.observe(healthy(i, **changed))
        assert len(alarms) == 1 and alarms[0].startswith(f"{name} ")
    # Not before there is a range; and what is large but not far outside is no reason to go back.
    assert watched(10).observe(healthy(0, **changed)) == ([], [])
    assert watched().observe(healthy(0, gradient_norm_max=400.0, constraint_max=0.1, reconstruction=2.0)) == ([], [])


@pytest.mark.parametrize("changed, said", DOUBTS.values(), ids=DOUBTS.keys())
def test_what_is_divergence_only_if_it_lasts(changed, said):
    guard = watched(max_grad_norm=30.0)
    for _ in range(4):  # a few are chance, and one healthy step starts the count anew
        assert [guard.observe(healthy(i, **changed)) for i in range(LASTING - 1)] == [([], [])] * (LASTING - 1)
        assert guard.doubtful == LASTING - 1
        assert guard.observe(healthy(0)) == ([], []) and guard.doubtful == 0
    for i in range(LASTING - 1):
        guard.observe(healthy(i, **changed))
    (alarm,) = resumed(guard, max_grad_norm=30.0).observe(healthy(0, **changed))[0]  # the count is part of the state
    assert alarm.startswith(said)
    # A network has no range at first, and a decoder that has learned nothing yet gives one image only.
    assert all(watched(0).observe(healthy(i, **changed)) == ([], []) for i in range(WARMUP))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("max_grad_norm", [None, 1e6])
def test_a_gradient_outlier_is_seen_at_once_unless_clipping_brings_it_back(name, max_grad_norm):
    guard = watched(max_grad_norm=max_grad_norm)
    assert [len(guard.observe(healthy(i, **{name: 1e9}))[0]) for i in range(3)] == [1, 1, 1]
    assert guard.doubtful == 0
    # A norm that loss scaling left out is no divergence.
    scalars = {key: value for key, value in healthy(0).items() if key not in GRADIENTS}
    assert guard.observe(scalars) == ([], [])


def test_a_pinned_dual():
    """A warning if the bound is too low; if the chain has run away an alarm, but no second one."""
    pinned = 50
    for ratio, alarms, warnings in ((5.0, 0, 1), (30.0, 1, 0)):
        guard = watched()
        seen = [guard.observe(healthy(i, dual=100.0, constraint=0.015 * ratio)) for i in range(pinned + 5)]
        assert [sum(len(one[kind]) for one in seen) for kind in (0, 1)] == [alarms, warnings]
        message = sum(seen[pinned - 1], [])[0]  # after so many in a row, not before
        assert "lambda" in message and f"{ratio:.1f} times" in message
    guard.pinned_ratios = []
    seen = [guard.observe(healthy(i, dual=100.0, constraint=0.5)) for i in range(pinned)]
    assert sum(len(alarms) for alarms, _ in seen) == 0 and len(seen[-1][1]) == 1
    guard = watched()
    for i in range(200):  # it leaves the bound now and then; one wild value in between is chance
        changed = {"dual": 100.0, "constraint": 9.0 if i == 120 else 0.02} if i % 45 else {}
        assert guard.observe(healthy(i, **changed)) == ([], [])


def build_trained(learning_rate: float = 1e-3, schedule: str = "constant") -> Trained:
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=10)
    return Trained(*Accelerator(cpu=True).prepare(network, optimizer, scheduler), learning_rate)


@pytest.fixture
def build(tmp_path):
    def build(**kwargs) -> Recovery:
        return Recovery(Accelerator(cpu=True), tmp_path, build_trained(), build_trained(), max_dual=100.0, **kwargs)

    return build


def train(trained: Trained, steps: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        trained.network(torch.randn(4, 3, generator=generator)).square().sum().backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
    return trained.network.weight.detach().clone()


def rate(recovery: Recovery) -> float:
    return recovery.lowered.optimizer.param_groups[0]["lr"]


def test_a_restored_state_is_the_state_and_stays_it(build):
    recovery = build(log_steps=1)
    train(recovery.lowered)
    recovery.keep_healthy(100)
    expected = train(recovery.lowered)
    for _ in range(3):  # what was restored is trained on, and is whole the next time
        assert recovery.roll_back(150, ["a fault"]) == (100, True)
        recovery.factor = 1.0
        recovery.lowered.scale_learning_rate(1.0)
        assert torch.equal(train(recovery.lowered), expected)


def test_which_state_is_gone_back_to(build):
    recovery = build(log_steps=10)

    def back_from(step: int) -> int:
        return recovery.roll_back(step, ["a fault"])[0]

    for step in range(0, 350, 50):
        recovery.keep_healthy(step)
    assert [step for step, _ in recovery.states] == [100, 200, 300]
    assert back_from(310) == 200  # 300 has not outlived the confirmation
    assert back_from(210) == 100  # no healthy state since: further back
    assert back_from(110) == 100  # there is none before
    recovery.keep_healthy(200)
    assert back_from(230) == 200


def test_the_rate_recovers_from_a_passing_fault_and_stays_down_otherwise(build):
    recovery = build()
    for step in range(0, 500, 100):
        recovery.keep_healthy(step)
    for _ in range(3):  # one fault that takes three rollbacks
        recovery.roll_back(510, ["a fault"])
    assert recovery.num_rollbacks == 3 and rate(recovery) == pytest.approx(1e-3 / 8)
    for step in range(400, 4000, 100):
        recovery.keep_healthy(step)
    assert rate(recovery) == pytest.approx(1e-3)
    for breakdowns, last in ((2, 9000), (3, 14000)):  # a rate that is too high breaks the run again and again
        recovery.roll_back(last - 5000, ["the same again"])
        for step in range(last - 5000, last, 100):
            recovery.keep_healthy(step)
        assert rate(recovery) == pytest.approx(1e-3 / 2 ** (breakdowns - 1))
    kinds = [event["kind"] for event in read_metrics(recovery.output_dir / "events.jsonl")]
    assert kinds == ["rollback"] * 3 + ["recovery"] + ["rollback"] * 2


def test_a_lowered_rate_follows_its_schedule():
    trained = build_trained(schedule="linear")
    for step in range(1, 5):
        trained.optimizer.step()
        trained.lr_scheduler.step()
        if step == 2:
            trained.scale_learning_rate(0.5)
            assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3 * 0.8)
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3 * 0.6)


def test_a_run_that_was_resumed_amid_doubts_can_go_back(build):
    """The state that it resumes from is all that there is, and is given its time."""
    recovery, fault = build(), {"sample_spread": 0.0}
    for i in range(60):
        assert recovery.judge(10 * i, healthy(i)) == []
    for i in range(3):
        assert recovery.judge(600 + 10 * i, healthy(i, **fault)) == []
    other = build()
    other.load_state_dict(recovery.state_dict())
    other.keep_healthy(620)
    for _ in range(2):
        steps = 0
        while not (alarms := other.judge(630 + 10 * steps, healthy(steps, **fault))):
            other.keep_healthy(630 + 10 * steps)
            steps += 1
        assert other.roll_back(630 + 10 * steps, alarms) == (620, True) and other.guard.doubtful == 0
    assert steps == LASTING - 1  # the second time all observations again, not the two that were left


@pytest.mark.parametrize("log_steps", [1, 10, 50, 100])
@pytest.mark.parametrize("changed, said", [DOUBTS[name] for name in ("gradient", "energy model", "samples")])
def test_no_state_of_a_fault_that_is_seen_late_is_healthy(changed, said, log_steps, build, monkeypatch):
    """What is an alarm when it has lasted is gone back from to before it began, in one step, however seldom is logged."""
    monkeypatch.setattr(divergence, "HEALTHY_STATE_STEPS", log_steps)
    monkeypatch.setattr(divergence, "HEALTHY_STATES", 12)
    recovery = build(max_grad_norm=30.0, log_steps=log_steps, max_rollbacks=3)
    begun, step, went_back, found = 60 * log_steps + 100, 0, [], []
    while len(went_back) < 4:  # it stays until the run is given up
        step += log_steps
        broken = step > begun
        recovery.lowered.network.bias.data.fill_(1.0 if broken else 0.0)
        if alarms := recovery.judge(step, healthy(step, **(changed if broken else {}))):
            found += alarms
            step, _ = recovery.roll_back(step, alarms)
            went_back.append(step)
            assert recovery.lowered.network.bias.eq(0).all() and recovery.guard.doubtful == 0
        else:
            recovery.keep_healthy(step)
    assert all(step <= begun for step in went_back) and went_back[0] > begun - 100 - 2 * log_steps
    # As of the first observation that was doubtful.
    assert went_back[0] <= begun + log_steps - CONFIRMATIONS * log_steps
    assert all(alarm.startswith(said) for alarm in found)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def assert_finite(*folders) -> None:
    assert all(torch.isfinite(value).all() for folder in folders for value in weights(folder).values())


def test_a_gradient_that_is_not_a_number_is_rolled_back(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 15)
    assert result.returncode == 0, result.stderr[-3000:]
    event, recovery = read_metrics(out / "events.jsonl")
    assert recovery["kind"] == "recovery" and recovery["step"] == 16
    assert event["kind"] == "rollback" and "not finite" in event["message"] and event["to_step"] == 12
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(2, 25, 2))  # nothing is left of what was undone
    rates = [record["energy_learning_rate"] for record in records]
    assert rates == [1e-3] * 6 + [5e-4] * 2 + [1e-3] * 4  # lowered until the next healthy state
    assert_finite(out)


def test_a_run_with_a_rollback_resumes_as_such(data, tmp_path):
    """Cut off after its rollback: the data stays in its other order, and the end is the same."""
    arguments = ["--checkpointing_steps", 20]
    assert run_with_fault(data, tmp_path / "whole", 14, 15, *arguments).returncode == 0
    cut = tmp_path / "cut"
    assert run_with_fault(data, cut, 14, 15, *arguments, "--max_train_steps", 20).returncode == 0
    assert run_with_fault(data, cut, 99, 99, *arguments, "--resume_from_checkpoint", "latest").returncode == 0
    expected, found = weights(tmp_path / "whole"), weights(cut)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [record["energy_learning_rate"] for record in metrics(cut)][5:9] == [1e-3, 5e-4, 5e-4, 1e-3]


def test_a_fault_that_stays_ends_the_run_with_healthy_weights(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 999, "--max_rollbacks", 2)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert "after 2 rollbacks" in message and "not finite" in message and "--pretrained_model_name_or_path" in message
    kinds = [event["kind"] for event in read_metrics(out / "events.jsonl")]
    assert kinds == ["rollback", "rollback", "stopped"]
    assert_finite(out)
    # The way on that the message names.
    arguments = ["--train_data_dir", data, *TINY, "--max_train_steps", 1, "--pretrained_model_name_or_path", out]
    succeed(*arguments, "--output_dir", tmp_path / "next")


def test_without_the_guard_the_run_ends(data, tmp_path):
    result = run_with_fault(data, tmp_path / "out", 14, 15, "--no-divergence_guard")
    assert result.returncode == 1 and "step 16" in result.stderr and "--divergence_guard" in result.stderr


def test_nothing_is_saved_of_a_step_that_broke_between_two_logged_ones(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 15, "--log_steps", 20, "--checkpointing_steps", 3)
    assert result.returncode == 0, result.stderr[-3000:]
    event = read_metrics(out / "events.jsonl")[0]
    assert event["kind"] == "rollback" and event["step"] == 15 and event["to_step"] == 0
    pipelines = [*out.glob("checkpoint-*/pipeline"), out]
    assert len(pipelines) >= 9
    assert_finite(*pipelines)


# Python reads it when it starts: the process dies where the checkpoint that was gone back to is to take its place.
KILLED_AT_REPLACE = """
import os

replace = os.replace

def die(source, target):
    if str(target).endswith("checkpoint-8"):
        os._exit(9)
    replace(source, target)

os.replace = die
"""


def test_a_kill_while_it_goes_back_leaves_no_state_that_was_given_up(data, tmp_path):
    """Killed when the later checkpoints are out of the way and the healthy one is not yet there."""
    out = tmp_path / "out"
    (tmp_path / "sitecustomize.py").write_text(KILLED_AT_REPLACE)
    arguments, path = ["--log_steps", 4, "--checkpointing_steps", 13], f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    result = run_with_fault(data, out, 14, 15, *arguments, environment={"PYTHONPATH": path})
    assert result.returncode == 9, result.stderr[-3000:]
    assert not list(out.glob("checkpoint-*")) and list(out.glob(".checkpoint-8"))
    resumed = run_with_fault(data, out, 99, 99, *arguments, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0 and "starting at step 0" in resumed.stderr
    assert not list(out.glob(".*checkpoint-*"))
    assert_finite(out)
