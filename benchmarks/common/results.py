#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Write the pages of docs/results from the figures in benchmarks/results: `python benchmarks/common/results.py`.

`results/TOPIC.json` holds the tables of a topic by name, and each becomes the page `docs/results/TOPIC/NAME.md`. A table
answers a question in one sentence (`question`, `answer`), says how it was measured (`command`, `commit`, `machine`,
`versions`, `protocol`, and `seeds` where there are any) and has `columns` and `rows`. A cell is a number, written with the
digits that were measured, a list of numbers, one per seed, a text, or null. `pictures` maps files, relative to
benchmarks/results, to their alternative texts. `superseded` says why a table counts no longer.

`--check` writes nothing, and names the pages that are not what the figures say.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
FIGURES, PAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "results"
# The topics in the order of the index; others follow by name.
TOPICS = {
    "digits": "Handwritten digits",
    "fashion_mnist": "Fashion-MNIST",
    "sizes": "Colour, and larger pictures",
    "peers": "Other methods",
    "demo": "The demo",
    "faults": "Faults while training",
    "restoration": "Restoration",
    "edits": "Edits",
    "anomaly": "Anomalies",
    "posterior": "Calibrated posteriors",
    "flows": "Calibrated flows",
    "decoders": "Calibrated decoders",
    "examples": "Generators of other kinds",
    "training_step": "Speed of training",
    "arrangements": "Arrangement of training",
    "growth": "Growth of time and memory",
    "data_loading": "Loading of data",
    "limit": "Limits of the hardware",
    "sampling": "Speed of sampling",
    "server": "A server",
    "precision": "Precision",
}
REQUIRED = ("question", "answer", "command", "commit", "machine", "versions", "protocol", "columns", "rows")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    head, *lines = (f"| {' | '.join(row)} |".replace("  |", " |") for row in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


def shown(cell: None | str | list) -> str:
    if isinstance(cell, list):
        return ", ".join(map(shown, cell))
    return cell or ""


def read_tables(path: Path) -> dict[str, dict[str, Any]]:
    """
    Return the tables of a topic, their numbers as texts, digit for digit.

    Raises:
        ValueError: naming the table, if one lacks what a page needs.
    """
    text = path.read_text(encoding="utf-8")
    tables = json.loads(
        text, parse_float=str, parse_int=lambda digits: f"{int(digits):,}" if len(digits) > 4 else digits
    )
    for name, found in tables.items():
        if missing := [key for key in REQUIRED if key not in found]:
            raise ValueError(f"{path.name}: {name} lacks {', '.join(missing)}.")
        if any(len(row) != len(found["columns"]) for row in found["rows"]):
            raise ValueError(f"{path.name}: rows of {name} must have {len(found['columns'])} cells.")
    return tables


def read_topics() -> dict[str, dict[str, dict[str, Any]]]:
    """Return all tables, by topic and name."""
    order = list(TOPICS)
    paths = sorted(
        FIGURES.glob("*.json"), key=lambda path: (order.index(path.stem) if path.stem in order else 99, path.stem)
    )
    return {path.stem: read_tables(path) for path in paths}


def numbers(cell: None | str | list) -> Iterator[str]:
    """Yield the texts of a cell, one per number."""
    if isinstance(cell, list):
        for one in cell:
            yield from numbers(one)
    elif cell is not None:
        yield cell


def command_block(command: str) -> str:
    """Return a command as a block of code, broken between arguments where it is longer than a line."""
    if "\n" in command:
        return f"```\n{command}\n```"
    lines = []
    for part in command.split("; "):
        line = ""
        for argument in re.findall(r'(?:[^\s"]|"[^"]*")+', part):
            if line and len(line) + len(argument) > 85:
                lines.append(f"{line} \\")
                line = "   "
            line = f"{line} {argument}" if line else argument
        lines.append(line)
    return "\n".join(["```", *lines, "```"])


def items(text: str) -> str:
    """Return the parts of a text after a colon, as a list where there are several."""
    parts = text.split("; ")
    return " " + text if len(parts) == 1 else "".join(f"\n  - {part}" for part in parts)


def page(topic: str, found: dict[str, Any]) -> str:
    """Return the page of a table."""
    folder = PAGES / topic
    parts = [
        f"<!-- Written by benchmarks/common/results.py from benchmarks/results/{topic}.json, which is the file to change. -->",
        f"# {found['question']}",
        f"**{found['answer']}**",
    ]
    if "superseded" in found:
        parts.append(f"**Superseded.** {found['superseded']}")
    parts.append(table(found["columns"], [[shown(cell) for cell in row] for row in found["rows"]]))
    for file, alt in found.get("pictures", {}).items():
        path = Path(os.path.relpath(FIGURES / file, folder)).as_posix()
        parts.append(f"![{alt}]({path})")
    parts += ["## Command", command_block(found["command"]), "## How it was measured"]
    about = [f"- Protocol:{items(found['protocol'])}"]
    if "seeds" in found:
        about.append(f"- Seeds: {shown(found['seeds'])}")
    about += [f"- {key.capitalize()}:{items(found[key])}" for key in ("commit", "machine")]
    about.append(f"- Versions: {found['versions']}")
    parts += ["\n".join(about), "[All results](../index.md)"]
    return "\n\n".join(parts) + "\n"


def index(topics: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the page that lists all questions with their answers."""
    parts = [
        "<!-- Written by benchmarks/common/results.py from benchmarks/results, which are the files to change. -->",
        "# Results",
        "Every figure of this project, one page per question.\n"
        "Distances over different features can't be compared with each other, and none of them is FID.",
    ]
    for topic, tables in topics.items():
        parts.append(f"## {TOPICS.get(topic, topic.replace('_', ' ').capitalize())}")
        lines = []
        for name, found in tables.items():
            mark = "Superseded. " if "superseded" in found else ""
            lines.append(f"- [{found['question']}]({topic}/{name}.md)\n  {mark}{found['answer']}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """Return the pages as they should be."""
    topics = read_topics()
    made = {PAGES / "index.md": index(topics)}
    for topic, tables in topics.items():
        made |= {PAGES / topic / f"{name}.md": page(topic, found) for name, found in tables.items()}
    return made


def stale(made: dict[Path, str]) -> list[Path]:
    """Return the pages that are not what the figures say, or that no figures belong to."""
    changed = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return sorted([*changed, *(path for path in PAGES.rglob("*.md") if path not in made)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    args = parser.parse_args()
    made = pages()
    found = stale(made)
    if args.check and found:
        names = ", ".join(path.relative_to(PAGES).as_posix() for path in found)
        sys.exit(f"docs/results differs from benchmarks/results: run python benchmarks/common/results.py ({names}).")
    for path in found:
        path.unlink(missing_ok=True)
        if path in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made[path], encoding="utf-8")


if __name__ == "__main__":
    main()
