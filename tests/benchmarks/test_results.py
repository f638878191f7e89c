# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Figures stand in one place, and the pages of docs/results show them digit for digit."""

import json
import sys

import pytest

from common import results


TABLE = {
    "question": "How large?",
    "answer": "Large.",
    "pictures": {"q.png": "A chart"},
    "command": 'python q.py --settings "a, b" "c"; --seeds 1',
    "commit": "abcdef1",
    "machine": "2 cores",
    "versions": "torch",
    "seeds": [0, 1],
    "protocol": "one; two",
    "columns": ["x", "y", "z"],
}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder of figures, with one table, and one of pages."""
    monkeypatch.setattr(results, "FIGURES", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(results, "PAGES", tmp_path / "docs" / "results")
    results.FIGURES.mkdir(parents=True)
    rows = '[["a, b", 0.950, [7.4, -0.0]], [null, 12345, 1e-07]]'
    head = json.dumps(TABLE)
    (results.FIGURES / "q.json").write_text(f'{{"t": {head[:-1]}, "rows": {rows}}}}}')
    return tmp_path


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["results.py", *argv])
    results.main()


def test_pages_show_the_digits_that_were_measured(folders, monkeypatch):
    with pytest.raises(SystemExit, match="q/t.md"):
        run(monkeypatch, "--check")
    run(monkeypatch)
    page = (results.PAGES / "q" / "t.md").read_text()
    assert "| x | y | z |\n|---|---|---|\n| a, b | 0.950 | 7.4, -0.0 |\n| | 12,345 | 1e-07 |\n" in page
    assert "](../../../benchmarks/results/q.png)" in page and 'python q.py --settings "a, b" "c"\n--seeds 1\n' in page
    for key in ("question", "answer", "commit", "machine", "versions"):
        assert TABLE[key] in page
    assert "(q/t.md)" in (results.PAGES / "index.md").read_text()
    run(monkeypatch, "--check")


def test_a_page_that_no_figures_belong_to_goes(folders, monkeypatch):
    run(monkeypatch)
    left = results.PAGES / "q" / "left.md"
    left.write_text("# Of old\n")
    with pytest.raises(SystemExit, match="q/left.md"):
        run(monkeypatch, "--check")
    run(monkeypatch)
    assert not left.exists()


def test_a_table_without_a_question_is_named(folders, monkeypatch):
    path = results.FIGURES / "q.json"
    path.write_text(path.read_text().replace('"question"', '"title"'))
    with pytest.raises(ValueError, match="q.json: t .*question"):
        run(monkeypatch)


def test_no_page_is_older_than_its_figures():
    made = results.pages()
    assert len(made) > 50
    assert not results.stale(made)


def test_pictures_are_there_and_tables_have_answers():
    for topic, tables in results.read_topics().items():
        for name, found in tables.items():
            assert found["answer"].endswith(".") and found["question"].endswith("?"), (topic, name)
            for file, alt in found.get("pictures", {}).items():
                assert (results.FIGURES / file).is_file() and alt, (topic, name)
