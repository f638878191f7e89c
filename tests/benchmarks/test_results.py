# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Figures stand in one place, and the tables of RESULTS.md show them digit for digit."""

import json
import sys

import pytest

from common import results


def test_tables_show_the_digits_that_were_measured(tmp_path, monkeypatch):
    rows = '[["a, b", 0.950, [7.4, -0.0]], [null, 12345, 1e-07]]'
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "q.json").write_text(f'{{"t": {{"columns": ["x", "y", "z"], "rows": {rows}}}}}')
    page = tmp_path / "RESULTS.md"
    page.write_text("before\n<!-- table: q.json t -->\nold\n<!-- end of table -->\nafter\n")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    with pytest.raises(SystemExit, match="results.py"):
        results.main()
    monkeypatch.setattr(sys, "argv", ["results.py"])
    results.main()
    table = "| x | y | z |\n|---|---|---|\n| a, b | 0.950 | 7.4, -0.0 |\n| | 12,345 | 1e-07 |\n"
    assert page.read_text() == f"before\n<!-- table: q.json t -->\n{table}<!-- end of table -->\nafter\n"
    monkeypatch.setattr(sys, "argv", ["results.py", "--check"])
    results.main()


def test_every_table_says_how_it_was_measured_and_is_shown():
    page = (results.FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    files = sorted((results.FOLDER / "results").glob("*.json"))
    assert files
    for file in files:
        for name, found in json.loads(file.read_text(encoding="utf-8")).items():
            assert {"command", "commit", "machine", "versions", "protocol"} <= set(found), (file.name, name)
            assert {len(row) for row in found["rows"]} == {len(found["columns"])}, (file.name, name)
            assert f"<!-- table: {file.name} {name} -->" in page
