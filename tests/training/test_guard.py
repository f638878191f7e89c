"""The guard against divergence: what it sees, what it goes back to, and a run with a fault in it."""

import math

import pytest
import torch
from accelerate import Accelerator
from training_runs import TINY, metrics, run_with_fault, succeed, weights, write_images

from ecvae_diffusers.report.verdict import JUDGES, Run, judge_calibration
from ecvae_diffusers.training.arguments.vae import parse_args
from ecvae_diffusers.training.optimization import build_trained
from ecvae_diffusers.training.run.divergence import CONFIRMATIONS, DivergenceGuard, Recovery
from ecvae_diffusers.training.run.log import read_metrics
from ecvae_diffusers.training.run.UNKNOWN import GuardLimits, HealthyStates


HEALTHY = {
    "reconstruction": 20.0, "gradient_norm_max": 100.0, "energy_gradient_norm_max": 3.0, "energy_real": -1.0,
    "energy_targets": -0.5, "constraint_max": 0.03, "dual": 30.0, "constraint": 0.02, "tolerance": 0.015,
    "sample_spread": 0.5, "data_spread": 0.6,
}  # fmt: skip


def healthy(i: int, **changed) -> dict:
    """Scalars that vary by a tenth, as those of a run do."""
    factor = 1 + 0.1 * math.sin(i)
    moving = ("reconstruction", "gradient_norm_max", "energy_gradient_norm_max", "constraint_max")
    return {**HEALTHY, **{name: HEALTHY[name] * factor for name in moving}, **changed}


def watched(count: int = 60) -> DivergenceGuard:
    guard = DivergenceGuard(max_dual=100.0)
    for i in range(count):
        assert guard.observe(healthy(i)) == ([], [])
    return guard


OFF = {
    "energy_real": -1.0, "energy_samples": 1.0, "energy_targets": 0.9, "energy_real_std": 0.5, "energy_samples_std": 0.5,
    "calibration_gradient_norm": 0.0, "reconstruction_gradient_norm": 10.0, "dual": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"dual": 0.5, "calibration_gradient_norm": 0.09},  # under a hundredth of the reconstruction's
        {"dual": 0.0, "calibration_gradient_norm": 0.0, "reconstruction_gradient_norm": 0.0},
    ],
)
def test_calibration_that_is_off_is_told_once_and_again_after_it_was_on(changed):
    guard = DivergenceGuard(100.0, GuardLimits(off=3))
    off = healthy(0, **{**OFF, **changed})
    on = healthy(0, **{**OFF, "dual": 1.0, "calibration_gradient_norm": 0.2})
    assert [len(guard.observe(off)[1]) for _ in range(2)] == [0, 0]
    # The count is part of the state.
    resumed = DivergenceGuard(100.0, GuardLimits(off=3))
    resumed.load_state_dict(guard.state_dict())
    assert [len(resumed.observe(off)[1]) for _ in range(3)] == [1, 0, 0]
    assert [len(resumed.observe(on)[1]), *[len(resumed.observe(off)[1]) for _ in range(3)]] == [0, 0, 0, 1]


def test_calibration_may_be_off_where_the_energy_model_tells_nothing_apart():
    """Then there is nothing to calibrate: the constraint is kept because samples are like data."""
    guard = DivergenceGuard(100.0, GuardLimits(off=1))
    assert guard.observe(healthy(0, **{**OFF, "energy_samples": -0.6})) == ([], [])
    assert guard.observe(healthy(0, **{**OFF, "energy_samples": -5.0})) == ([], [])


def test_a_run_whose_calibration_is_off_says_so(tmp_path):
    """A tolerance far too wide: in the log and the events within 100 steps of lambda at 0, on the bar, and first in the report."""
    data, run = write_images(tmp_path / "images", count=16), tmp_path / "run"
    result = succeed(
        "--train_data_dir", data, "--output_dir", run, *TINY, "--max_train_steps", 130, "--initial_dual", 0.5,
        "--calibration_tolerance", 100.0, "--energy_learning_rate", 2e-3,
    )  # fmt: skip
    logged = metrics(run)
    first_off = next(record["step"] for record in logged if not record["calibrating"])
    events = [event for event in read_metrics(run / "events.jsonl") if event["kind"] == "warning"]
    assert len(events) == 1 and first_off <= events[0]["step"] <= first_off + 100
    assert "calibration is off" in result.stderr and "(calibration is off)" in result.stderr
    finding = judge_calibration(Run.read(run))
    assert not finding.healthy and JUDGES[0] is judge_calibration


CLIPPED = {"gradient_norm_max": 100.0, "energy_gradient_norm_max": 30.0}  # at or near what they usually are


@pytest.mark.parametrize("name", DivergenceGuard.GRADIENTS)
def test_a_clipped_gradient_is_divergence_only_where_it_lasts(name):
    """
    A single one moves the weights no further than others do. Without clipping, or where what is left after it is far outside itself,
    the first is an alarm.
    """
    enormous = {name: 1e9}
    lasting = [False] * 4 + [True]
    for max_norm, expected in ((None, [True] * 5), (1e6, [True] * 5), (CLIPPED[name], lasting)):
        guard = DivergenceGuard(100.0, max_grad_norm=max_norm)
        for i in range(60):
            guard.observe(healthy(i))
        assert [bool(guard.observe(healthy(i, **enormous))[0]) for i in range(5)] == expected
        assert guard.doubtful == (5 if expected is lasting else 0)
        # One that is back in range starts the count anew, and the count is part of the state.
        assert guard.observe(healthy(0)) == ([], []) and guard.doubtful == 0
        for i in range(4):
            guard.observe(healthy(i, **enormous))
        resumed = DivergenceGuard(100.0, max_grad_norm=max_norm)
        resumed.load_state_dict(guard.state_dict())
        alarms, _ = resumed.observe(healthy(0, **enormous))
        assert len(alarms) == 1 and alarms[0].startswith(f"{name} 1e+09 is far outside")
        assert resumed.observe(healthy(0, **{name: math.inf}))[0] == [f"{name} not finite"]


def test_clipped_gradients_are_counted_a_network():
    guard = DivergenceGuard(100.0, max_grad_norm=30.0)
    for i in range(60):
        guard.observe(healthy(i))
    for i in range(9):  # now one, now the other
        assert guard.observe(healthy(i, **{DivergenceGuard.GRADIENTS[i % 2]: 1e9})) == ([], [])
    alarms, _ = guard.observe(healthy(9, **{DivergenceGuard.GRADIENTS[1]: 1e9}))
    assert alarms == ["something was doubtful at each of 10 logged steps, lastly energy_gradient_norm_max"]


def test_a_run_that_was_resumed_amid_doubts_can_go_back(recovery):
    """The state that it resumes from is all that there is, and is given its time."""
    fault = {"sample_spread": 0.0}
    for i in range(60):
        assert recovery.judge(10 * i, healthy(i)) == []
    for i in range(3):
        assert recovery.judge(600 + 10 * i, healthy(i, **fault)) == []
    other = Recovery(recovery.args, recovery.accelerator, *recovery.networks)
    other.load_state_dict(recovery.state_dict())
    other.keep_healthy(620)
    for _ in range(2):
        steps = 0
        while not (alarms := other.judge(630 + 10 * steps, healthy(steps, **fault))):
            other.keep_healthy(630 + 10 * steps)
            steps += 1
        assert other.roll_back(630 + 10 * steps, alarms) == (620, True) and other.guard.doubtful == 0
    assert steps == 4  # the second time five observations again, not the two that were left


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
    alarms, _ = watched().observe(healthy(0, **changed))
    assert len(alarms) == 1 and alarms[0].startswith(f"{name} ") and "far outside" in alarms[0]
    # Not before there is a range; and what is large but not far outside is no reason to go back.
    assert watched(10).observe(healthy(0, **changed)) == ([], [])
    assert watched().observe(healthy(0, gradient_norm_max=400.0, constraint_max=0.1, reconstruction=2.0)) == ([], [])


def test_an_outlier_does_not_widen_the_range():
    guard = watched()
    for i in range(5):
        assert guard.observe(healthy(i, gradient_norm_max=5e4))[0]


def test_a_pinned_dual():
    """A warning where the bound is too low; where the chain has run away an alarm, but no second one."""
    limits = GuardLimits()
    for ratio, alarms, warnings in ((5.0, 0, 1), (30.0, 1, 0)):
        guard = watched()
        seen = [guard.observe(healthy(i, dual=100.0, constraint=0.015 * ratio)) for i in range(limits.pinned + 5)]
        assert [sum(len(one[kind]) for one in seen) for kind in (0, 1)] == [alarms, warnings]
        message = sum(seen[limits.pinned - 1], [])[0]  # after so many in a row, not before
        assert "lambda has been at its bound (100) for 50 logged steps" in message and f"{ratio:.1f} times" in message
    guard.pinned_ratios = []
    seen = [guard.observe(healthy(i, dual=100.0, constraint=0.5)) for i in range(limits.pinned)]
    assert sum(len(alarms) for alarms, _ in seen) == 0 and len(seen[-1][1]) == 1
    guard = watched()
    for i in range(200):  # it leaves the bound now and then; one wild value in between is chance
        changed = {"dual": 100.0, "constraint": 9.0 if i == 120 else 0.02} if i % 45 else {}
        assert guard.observe(healthy(i, **changed)) == ([], [])


def test_a_norm_that_loss_scaling_left_out_is_no_divergence():
    guard = watched()
    scalars = healthy(0)
    del scalars["energy_gradient_norm_max"], scalars["gradient_norm_max"]
    assert guard.observe(scalars) == ([], [])


def test_dead_samples():
    guard, limits = watched(), GuardLimits()
    seen = [guard.observe(healthy(i, sample_spread=0.02))[0] for i in range(limits.lasting)]
    assert seen[:-1] == [[]] * (limits.lasting - 1) and "samples are all alike" in seen[-1][0]
    new = DivergenceGuard(100.0)  # a decoder that has learned nothing yet gives one image only
    assert all(new.observe(healthy(i, sample_spread=0.0)) == ([], []) for i in range(limits.warmup))


def test_a_dead_energy_model():
    """One with spectral normalization doesn't explode: its gradient vanishes, and stays away."""
    guard, limits = watched(), GuardLimits()
    seen = [guard.observe(healthy(i, energy_gradient_norm_max=0.02))[0] for i in range(limits.lasting)]
    assert seen[:-1] == [[]] * (limits.lasting - 1) and "the energy model is dead" in seen[-1][0]
    guard = watched()  # one step with hardly a gradient is chance
    seen = [guard.observe(healthy(i, energy_gradient_norm_max=0.02 if i % 4 else 3.0))[0] for i in range(20)]
    assert seen == [[]] * 20


def test_a_guard_goes_on_from_its_state(tmp_path):
    torch.save(watched().state_dict(), tmp_path / "guard.pt")
    guard = DivergenceGuard(100.0)
    guard.load_state_dict(torch.load(tmp_path / "guard.pt", weights_only=True))
    assert guard.observe(healthy(0, constraint_max=2.0))[0]


class Regression:
    """A network that learns, so that its state is another at each step."""

    def __init__(self):
        torch.manual_seed(0)
        self.network = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1)

    def train(self, steps: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            self.network(torch.randn(4, 3, generator=generator)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.network.weight.detach().clone()


def test_a_restored_state_is_the_state_and_stays_it():
    run = Regression()
    states = HealthyStates({"network": run.network, "optimizer": run.optimizer}, limit=3, confirmation=20)
    run.train(3)
    states.take(100)
    expected = run.train(5)
    for _ in range(3):  # what was restored is trained on, and is whole the next time
        states.restored = None
        assert states.restore(150) == 100
        assert torch.equal(run.train(5), expected)


def test_which_state_is_gone_back_to():
    run = Regression()
    states = HealthyStates({"network": run.network}, limit=3, confirmation=20)
    for step in (0, 100, 200, 300):
        states.take(step)
        run.train(1)
    assert [step for step, _ in states.states] == [100, 200, 300]
    assert states.was_healthy and states.restore(310) == 200  # 300 has not outlived the confirmation
    assert not states.was_healthy and states.restore(210) == 100  # no healthy state since: further back
    assert states.restore(110) == 100  # there is none before
    states.take(200)
    assert states.was_healthy and states.restore(230) == 200


@pytest.fixture
def recovery(tmp_path):
    args = parse_args(["--train_data_dir", "x", "--output_dir", str(tmp_path), "--lr_scheduler", "constant"])
    accelerator = Accelerator(cpu=True)
    networks = [torch.nn.Linear(2, 2) for _ in range(2)]
    generator, energy = (build_trained(args, accelerator, network, 1e-3, (0.0, 0.9), 100) for network in networks)
    made = Recovery(args, accelerator, generator, energy)
    made.networks = generator, energy
    return made


def rate(recovery) -> float:
    return recovery.lowered.optimizer.param_groups[0]["lr"]


def test_the_rate_recovers_from_a_passing_fault_and_stays_down_else(recovery):
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


LASTING = [
    ({"gradient_norm_max": 1e6}, "gradient_norm_max 1e+06 is far outside"),
    ({"energy_gradient_norm_max": 1e-6}, "the energy model is dead"),
    ({"sample_spread": 0.0}, "samples are all alike"),
]


@pytest.mark.parametrize("log_steps", [1, 10, 50, 100])
@pytest.mark.parametrize("fault, said", LASTING)
def test_no_state_of_a_fault_that_is_seen_late_is_healthy(tmp_path, fault, said, log_steps):
    """What is an alarm when it has lasted is gone back from to before it began, in one step, however seldom is logged."""
    arguments = ["--lr_scheduler", "constant", "--max_grad_norm", 100, "--log_steps", log_steps, "--max_rollbacks", 3]
    arguments += ["--healthy_state_steps", min(log_steps, 100), "--healthy_states", 12]
    args = parse_args(["--train_data_dir", "x", "--output_dir", str(tmp_path), *map(str, arguments)])
    networks = [torch.nn.Linear(2, 2) for _ in range(2)]
    accelerator = Accelerator(cpu=True)
    generator, energy = (build_trained(args, accelerator, network, 1e-3, (0.0, 0.9), 100) for network in networks)
    recovery = Recovery(args, accelerator, generator, energy)
    begun, step, went_back, found = 60 * log_steps + 100, 0, [], []
    while not went_back or len(went_back) < 4:  # it stays until the run is given up
        step += log_steps
        broken = step > begun
        networks[0].bias.data.fill_(1.0 if broken else 0.0)
        if alarms := recovery.judge(step, healthy(step, **(fault if broken else {}))):
            found += alarms
            step, _ = recovery.roll_back(step, alarms)
            went_back.append(step)
            assert networks[0].bias.eq(0).all() and recovery.guard.doubtful == 0
        else:
            recovery.keep_healthy(step)
    assert all(step <= begun for step in went_back) and went_back[0] > begun - 100 - 2 * log_steps
    # As of the first observation that was doubtful.
    assert went_back[0] <= begun + log_steps - CONFIRMATIONS * log_steps
    assert all(alarm.startswith(said) for alarm in found)


def test_a_lowered_rate_follows_its_schedule(tmp_path):
    args = parse_args(["--train_data_dir", "x", "--output_dir", str(tmp_path), "--lr_scheduler", "linear"])
    trained = build_trained(args, Accelerator(cpu=True), torch.nn.Linear(2, 2), 1e-3, (0.0, 0.9), 10)
    for step in range(1, 5):
        trained.optimizer.step()
        trained.lr_scheduler.step()
        if step == 2:
            trained.scale_learning_rate(0.5)
            assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3 * 0.8)
    assert trained.optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3 * 0.6)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images")


def test_a_gradient_that_is_not_a_number_is_rolled_back(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 15)
    assert result.returncode == 0, result.stderr[-3000:]
    event, recovery = read_metrics(out / "events.jsonl")
    assert recovery["kind"] == "recovery" and recovery["step"] == 16
    assert event["kind"] == "rollback" and "not finite: back to step 12" in event["message"] and event["to_step"] == 12
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(2, 25, 2))  # nothing is left of what was undone
    rates = [record["energy_learning_rate"] for record in records]
    assert rates == [5e-4] * 6 + [2.5e-4] * 2 + [5e-4] * 4  # lowered until the next healthy state
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_a_run_with_a_rollback_is_gone_on_with_as_such(data, tmp_path):
    """Cut off after its rollback: the data stays in its other order, and the end is the same."""
    arguments = ["--checkpointing_steps", 20]
    assert run_with_fault(data, tmp_path / "whole", 14, 15, *arguments).returncode == 0
    cut = tmp_path / "cut"
    assert run_with_fault(data, cut, 14, 15, *arguments, "--max_train_steps", 20).returncode == 0
    assert run_with_fault(data, cut, 99, 99, *arguments, "--resume_from_checkpoint", "latest").returncode == 0
    expected, found = weights(tmp_path / "whole"), weights(cut)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert [record["energy_learning_rate"] for record in metrics(cut)][5:9] == [5e-4, 2.5e-4, 2.5e-4, 5e-4]


def test_a_fault_that_stays_ends_the_run_with_healthy_weights(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 999, "--max_rollbacks", 2)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert "after 2 rollbacks" in message and "not finite" in message and "--pretrained_model_name_or_path" in message
    kinds = [event["kind"] for event in read_metrics(out / "events.jsonl")]
    assert kinds == ["rollback", "rollback", "stopped"]
    assert all(torch.isfinite(value).all() for value in weights(out).values())
    # The way on that the message names.
    arguments = ["--train_data_dir", data, *TINY, "--max_train_steps", 1, "--pretrained_model_name_or_path", out]
    succeed(*arguments, "--output_dir", tmp_path / "next")


def test_without_the_guard_the_run_ends(data, tmp_path):
    result = run_with_fault(data, tmp_path / "out", 14, 15, "--no-divergence_guard")
    assert result.returncode == 1 and "training has diverged at step 16" in result.stderr


def test_nothing_is_saved_of_a_step_that_broke_between_two_logged_ones(data, tmp_path):
    out = tmp_path / "out"
    result = run_with_fault(data, out, 14, 15, "--log_steps", 20, "--checkpointing_steps", 3)
    assert result.returncode == 0, result.stderr[-3000:]
    event = read_metrics(out / "events.jsonl")[0]
    assert event["kind"] == "rollback" and event["step"] == 15 and event["to_step"] == 0
    pipelines = [*out.glob("checkpoint-*/pipeline"), out]
    assert len(pipelines) >= 9
    assert all(torch.isfinite(value).all() for path in pipelines for value in weights(path).values())


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
    arguments = ["--log_steps", 4, "--checkpointing_steps", 13]
    result = run_with_fault(data, out, 14, 15, *arguments, environment={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 9, result.stderr[-3000:]
    assert not list(out.glob("checkpoint-*")) and list(out.glob(".checkpoint-8"))
    resumed = run_with_fault(data, out, 99, 99, *arguments, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0 and "starting at step 0" in resumed.stderr
    assert not list(out.glob(".*checkpoint-*"))
    assert all(torch.isfinite(value).all() for value in weights(out).values())
