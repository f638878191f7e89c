#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Check the language of README, docs, docstrings and messages: `python docs/check_prose.py`, or of the files that are given.

It looks for words that have a plainer form, lines that are too long, and commits and machines outside of the results.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
# Files and folders that are checked. Python files are checked for words alone.
PLACES = ("README.md", "docs", "src", "training", "examples", "spaces", "CONTRIBUTING.md", "CHANGELOG.md")
SUFFIXES = {".md", ".py", ".yaml", ".jinja"}
MAX_LINE, README_LINES, MAX_SENTENCE = 200, (80, 110), 30
UNITS = "image|pixel|picture|iteration|step|sample|seed|second|entry|channel|task|answer"
# What not to write, and what to write instead.
WORDS = {
    rf"\b(?:ms|s|seconds|nats|bits|bytes|passes|images|energy|number|one|figure|row|page) an? (?:{UNITS})\b": "per",
    r"\b(?:go|goes|going|gone) on with\b": "continue, resume",
    r"\b(?:hold|holds|held) still\b": "frozen",
    r"\bin the place of\b": "instead of",
    r"\bbut for\b": "except",
    r"\bbeside\b": "next to, unlike, in addition to",
    r"\bof (?:its|their) own\b(?! \w)": "its own",
    r"\bsecond network\b": "energy model",
    r"\b(?:is|are) not whole\b": "incomplete",
    r"\bhas not both\b": "requires both",
    r"\bare worth\b": "list measured quality",
}
COMMIT = r"\b(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]{7}\b"
MACHINE = r"\b(?:EPYC|Xeon|AMX|H100|H200|A100)\b"


def prose(text: str) -> str:
    """Return a page without code, comments and targets of links, line by line as before."""

    def blank(found: re.Match) -> str:
        return "\n" * found[0].count("\n")

    text = re.sub(r"(?ms)^[ \t]*```.*?^[ \t]*```[ \t]*$|<!--.*?-->|^\$\$.*?^\$\$$", blank, text)
    text = re.sub(r"`[^`\n]*`|\$[^$\n]+\$", "`code`", text)
    return re.sub(r"\]\([^)\s]*\)", "]", text)


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page outside of tables, headings and lists of links."""
    for line in prose(text).splitlines():
        if not line.startswith(("|", "#")):
            yield from re.split(r"(?<=[.!?:])\s+", line.strip("-* "))


def findings(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of each fault."""
    name = path.relative_to(ROOT).as_posix()
    is_page = name == "README.md" or name.startswith("docs/")
    lines, plain = text.splitlines(), (prose(text) if path.suffix == ".md" else text).splitlines()
    for number, line in enumerate(lines, 1):
        if is_page and len(line) > MAX_LINE and not line.startswith("|"):
            yield number, f"{len(line)} characters in a line, more than {MAX_LINE}"
    for number, line in enumerate(plain, 1):
        for pattern, instead in WORDS.items():
            if path != Path(__file__).resolve() and (found := re.search(pattern, line, re.IGNORECASE)):
                yield number, f"{found[0]!r}: {instead}"
        if is_page and path.suffix == ".md" and not name.startswith("docs/results/"):
            for pattern in (COMMIT, MACHINE):
                if found := re.search(pattern, line):
                    yield number, f"{found[0]!r} belongs into benchmarks/results"
    if name == "README.md":
        if not README_LINES[0] <= len(lines) <= README_LINES[1]:
            yield 1, f"{len(lines)} lines, not {README_LINES[0]} to {README_LINES[1]}"
        for sentence in sentences(text):
            if len(sentence.split()) > MAX_SENTENCE:
                yield 1, f"{len(sentence.split())} words in a sentence: {sentence}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", help=f"Default: {', '.join(PLACES)}.")
    args = parser.parse_args()
    places = [path.resolve() for path in args.files] or [ROOT / place for place in PLACES]
    files = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    faults = [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {fault}"
        for path in files
        if path.suffix in SUFFIXES and "_build" not in path.parts
        for number, fault in findings(path, path.read_text(encoding="utf-8"))
    ]
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
