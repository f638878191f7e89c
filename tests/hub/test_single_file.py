# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The single-file pipelines: up to date in git, and with all that they use."""

import runpy
from pathlib import Path

import pytest

from ecvae_diffusers.hub.single_file import PACKAGE, Inlined


GENERATE = Path(__file__).resolve().parents[2] / "pipelines" / "generate.py"


def generate(monkeypatch, *arguments, **settings) -> None:
    monkeypatch.setattr("sys.argv", [str(GENERATE), *arguments])
    main = runpy.run_path(str(GENERATE))["main"]
    main.__globals__.update(settings)
    main()


def test_the_single_files_are_up_to_date(monkeypatch, tmp_path):
    generate(monkeypatch, "--check")
    generate(monkeypatch, ROOT=tmp_path)
    generate(monkeypatch, "--check", ROOT=tmp_path)
    changed = tmp_path / "pipelines" / "ecvae" / "pipeline.py"
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(SystemExit, match="pipelines/ecvae/pipeline.py"):
        generate(monkeypatch, "--check", ROOT=tmp_path)


def test_a_name_that_a_module_does_not_define_is_refused():
    with pytest.raises(KeyError, match="torch"):
        Inlined().take(PACKAGE / "energy.py", ["torch"])
