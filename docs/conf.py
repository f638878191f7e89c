# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The site, built by `make docs`."""

import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

from docutils import nodes
from docutils.utils.math import latex2mathml

import command_line
import ecvae_diffusers


project = "ecvae-diffusers"
author = "The ecvae-diffusers authors"
copyright = "2026, the ecvae-diffusers authors"
version = release = ecvae_diffusers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_math_renderer = "mathml"
html_title = "ecvae-diffusers"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings name the types, as diffusers writes them


def docstring_as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn the Markdown of docstrings into what Sphinx reads: `code`, [`Class`], fences around examples, and bars."""
    math_indent = None
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() and math_indent is not None and indent <= math_indent:
            math_indent = None
        if line.lstrip().startswith(".. math::"):
            math_indent = indent
        if line.lstrip().startswith("```"):
            lines[i] = ""
        elif math_indent is None and not line.lstrip().startswith((">>>", "... ")):
            line = re.sub(r"\[(`[^`]+`)\](?:\([^)]+\))?", r"\1", line)
            line = re.sub(
                r"(?<![`:])`([^`]+)`(?!`)(?=([\w^])?)", lambda m: f"``{m[1]}``" + ("\\ " if m[2] else ""), line
            )
            parts = re.split(r"(``[^`]+``)", line)
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            lines[i] = "".join(parts)


def fill_pages(app, docname: str, source: list[str]) -> None:
    """
    Write the reference of the commands, keep the pages of results, which their index lists, out of the contents, and name
    files of the repository that are no pages, which links lead to on GitHub.
    """
    source[0] = re.sub(
        r"(?<!!)\[([^\]]+)\]\((?:\.\./)+((?:training|model_cards|src)/[^)]+)\)", r"\1 (`\2`)", source[0]
    )
    if docname == "reference/command_line":
        source[0] += "\n" + command_line.reference()
    elif docname.startswith("results/") and docname != "results/index":
        source[0] = f"---\norphan: true\n---\n{source[0]}"


def write_math(translator, node) -> None:
    """Write an equation as MathML, which browsers show without a script and without the network."""
    is_block = isinstance(node, nodes.math_block)
    text = re.sub(r"\\[bB]igg?[lr]?(?![a-zA-Z])", "", node.astext())  # sizes of brackets, which it does not know
    if is_block and ("&" in text or r"\\" in text):
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    written = str(latex2mathml.tex2mathml(text, as_block=is_block))
    translator.body.append(f'<div class="equation">{written}</div>' if is_block else written)
    raise nodes.SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", docstring_as_rst, priority=100)
    app.connect("source-read", fill_pages)
