"""Bars name their work, and the stopwatch counts training only."""

from ecvae_diffusers.training.run import progress as module
from ecvae_diffusers.training.run.progress import Stopwatch, progress


def test_a_bar_names_its_work(capsys):
    assert list(progress("Chains", range(3), delay=0)) == [0, 1, 2]
    assert "Chains: " in capsys.readouterr().err
    assert list(progress("Chains", range(3))) == [0, 1, 2]  # short work
    assert list(progress("Chains", range(3), shown=False, delay=0)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_the_stopwatch_counts_only_while_it_runs_and_continues_after_loading(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: now)
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
