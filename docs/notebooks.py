#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Write `docs/quickstart.ipynb`, which Colab opens, from `docs/quickstart.md`: `python docs/notebooks.py`.

Text becomes text. Blocks of Python and of shell become cells that run, except those below `<!-- not run: why -->`. A comment
`<!-- notebook` holds a cell that the page does not show; directly above a block, that cell replaces the block. `--check` writes
nothing, and fails if the notebook is out of date.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "quickstart.md", ROOT / "docs" / "quickstart.ipynb"
# A cell of the notebook alone with the block that it replaces, a block that is not run, or one that is.
BLOCK = re.compile(
    r"^<!-- notebook\n(?P<own>.*?)^-->\n(?:```.*?^```\n)?|^<!-- not run: [^>]+ -->\n```.*?^```\n|"
    r"^```(?P<language>python|bash)\n(?P<code>.*?)^```\n",
    flags=re.DOTALL | re.MULTILINE,
)
BADGE = re.compile(r"^.*colab-badge.*\n\n", flags=re.MULTILINE)


def repository() -> str:
    """Return the address of the repository, from `pyproject.toml`."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def colab_address() -> str:
    """Return where Colab opens the notebook of the main branch."""
    place = repository().removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{place}/blob/main/{NOTEBOOK.relative_to(ROOT).as_posix()}"


def with_addresses(text: str) -> str:
    """Replace the relative links and pictures of the page by addresses, since the notebook is opened without the repository."""

    def replace(found: re.Match) -> str:
        kind = "raw" if found["label"].startswith("!") else "blob"
        path = normpath(f"docs/{found['target']}")
        return f"{found['label']}({repository()}/{kind}/main/{path})"

    return re.sub(r"(?P<label>!?\[[^\]]*\])\((?P<target>(?!https?:)[^)\s]+)\)", replace, text)


def cells(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the cells of the notebook: whether they run, and their content."""
    start = 0
    for block in BLOCK.finditer(text):
        code = block["own"] or block["code"]
        if code is not None:
            yield False, text[start : block.start()]
            if block["language"] == "bash":
                code = re.sub(r"(?<!\\\n)^(?=.)", "!", code, flags=re.MULTILINE)
            yield True, code.replace("{repository}", repository())
            start = block.end()
    yield False, text[start:]


def notebook() -> str:
    """Return the content of the notebook."""
    found = [(runs, content.strip()) for runs, content in cells(BADGE.sub("", PAGE.read_text(encoding="utf-8")))]
    made = [
        new_code_cell(content, id=f"cell-{i}") if runs else new_markdown_cell(with_addresses(content), id=f"cell-{i}")
        for i, (runs, content) in enumerate(pair for pair in found if pair[1])
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.writes(new_notebook(cells=made, metadata={"kernelspec": kernel})) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the notebook is out of date")
    args = parser.parse_args()
    if not args.check:
        NOTEBOOK.write_text(notebook(), encoding="utf-8")
    elif not NOTEBOOK.is_file() or NOTEBOOK.read_text(encoding="utf-8") != notebook():
        sys.exit(f"{NOTEBOOK.relative_to(ROOT)} is out of date: run `make notebook`.")


if __name__ == "__main__":
    main()
