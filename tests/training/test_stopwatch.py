from ecvae_diffusers.training.run import stopwatch
from ecvae_diffusers.training.run.progress import Stopwatch


def test_it_counts_only_while_it_runs_and_goes_on_after_loading(monkeypatch):
    now = 100.0
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now)
    watch = Stopwatch()
    assert watch.seconds == 0
    watch.start()
    now += 2
    with watch.paused():
        now += 50
        assert watch.seconds == 2
        state = watch.state_dict()
    now += 3
    assert watch.seconds == 5

    resumed = Stopwatch()
    resumed.load_state_dict(state)
    now += 10
    assert resumed.seconds == 2
    resumed.start()
    now += 1
    assert resumed.seconds == 3
