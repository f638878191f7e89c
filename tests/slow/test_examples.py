"""The examples run from a fresh clone, and print their figure before and after. Slow: `make test-slow`."""

import re

import fork_server
import pytest
from training_runs import SCRIPTS


FIGURES = {
    "audio_decoder": r"Frechet distance before ([\d.]+), after ([\d.]+)",
    "image_generator": r"Frechet distance before ([\d.]+), after ([\d.]+)",
    "text_decoder": r"different ones before (\d+), after (\d+)",
}


def test_all_examples_are_here():
    assert {path.stem for path in (SCRIPTS / "examples").glob("*.py")} == set(FIGURES)


@pytest.mark.parametrize("name", list(FIGURES))
def test_what_an_example_can_not_do_is_said_before_it_trains(name, tmp_path):
    wrong = [(["--num_steps", "-3"], "--num_steps must be at least 1, but is -3")]
    if name != "text_decoder":
        wrong.append(
            (["--output", str(tmp_path / "gone" / "x.png")], "--output must be a file in a folder that is there")
        )
    for arguments, message in wrong:
        result = fork_server.run(SCRIPTS / "examples" / f"{name}.py", *arguments)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize("name", list(FIGURES))
def test_example_prints_before_and_after(name, tmp_path, monkeypatch):
    """A few steps: the two networks are trained apart from the same start, and measured."""
    monkeypatch.chdir(tmp_path)
    result = fork_server.run(SCRIPTS / "examples" / f"{name}.py", "--num_steps", 20)
    assert result.returncode == 0, result.stderr[-3000:]
    before, after = re.search(FIGURES[name], result.stdout).groups()
    assert float(before) != float(after) or float(before) == 0
