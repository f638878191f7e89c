#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Write the tables of RESULTS.md from the figures in results/: `python benchmarks/common/results.py`.

`results/QUESTION.json` holds the tables of one question, by name. A table has columns and rows, and says how it was measured
(command, commit, machine, versions, seeds, protocol). A cell is a number with its significant digits, a list of numbers (one
per seed), a text, or null. `--check` writes nothing and fails if RESULTS.md is out of date.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


FOLDER = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"(<!-- table: (\S+) (\S+) -->)\n.*?(<!-- end of table -->)", re.DOTALL)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    head, *lines = (f"| {' | '.join(row)} |".replace("  |", " |") for row in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


def shown(cell: None | str | list) -> str:
    if isinstance(cell, list):
        return ", ".join(map(shown, cell))
    return cell or ""


def read_table(file: str, name: str) -> str:
    """Return a table of results/ in Markdown. Numbers keep all their digits."""
    text = (FOLDER / "results" / file).read_text(encoding="utf-8")
    found = json.loads(
        text, parse_float=str, parse_int=lambda digits: f"{int(digits):,}" if len(digits) > 4 else digits
    )[name]
    return table(found["columns"], [[shown(cell) for cell in row] for row in found["rows"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if RESULTS.md is out of date")
    args = parser.parse_args()
    page = FOLDER / "RESULTS.md"
    text = page.read_text(encoding="utf-8")
    made = MARKED.sub(lambda found: f"{found[1]}\n{read_table(found[2], found[3])}\n{found[4]}", text)
    if made == text:
        return
    if args.check:
        sys.exit("benchmarks/RESULTS.md is out of date: run python benchmarks/common/results.py.")
    page.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
