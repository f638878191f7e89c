# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The site builds without a warning, and holds every public name and every argument. Slow: `make test-slow`."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

import command_line
import ecvae_diffusers
from ecvae_diffusers.cli import COMMANDS


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "-d", folder / "doctrees"]
    subprocess.run([*map(str, command), str(ROOT / "docs"), str(folder / "html")], check=True)
    return folder / "html"


def test_every_public_name_is_explained(site):
    pages = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', pages))
    for name in ecvae_diffusers.__all__:
        assert any(anchor.endswith(f".{name}") for anchor in anchors), name


def test_every_argument_is_explained(site):
    page = html.unescape(re.sub("<[^>]+>", "", (site / "reference" / "command_line.html").read_text()))
    for name in COMMANDS:
        for action in command_line.command_parser(name)._actions:
            if action.help != command_line.argparse.SUPPRESS and "--help" not in action.option_strings:
                assert all(option in page for option in action.option_strings), (name, action)


def test_links_and_pictures_of_the_site_lead_somewhere(site):
    for page in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?:]+)(?:[#?][^"]*)?"', page.read_text()):
            assert (page.parent / target).exists(), (page.relative_to(site), target)
