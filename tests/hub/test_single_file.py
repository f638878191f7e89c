# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""The single-file pipelines: up to date in git, and with all that they use."""

import ast
import runpy
from pathlib import Path

import pytest

from ecvae_diffusers.hub.single_file import PACKAGE, Inlined, single_file


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


@pytest.mark.parametrize("path", sorted((PACKAGE / "pipelines").glob("*_ec*.py")), ids=lambda path: path.stem)
def test_no_name_has_two_definitions(path):
    """Modules that are merged may not use one name for two things."""
    definitions: dict[str, set[str]] = {}
    for node in ast.parse(single_file(path.stem)).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for name in [target.id for target in targets if isinstance(target, ast.Name)] or [getattr(node, "name", "")]:
            definitions.setdefault(name, set()).add(ast.unparse(node))
    del definitions[""]  # imports and the docstring
    assert "SelfContained" in definitions and all(len(found) == 1 for found in definitions.values())


def test_a_name_that_a_module_does_not_define_is_refused():
    with pytest.raises(KeyError, match="torch"):
        Inlined().take(PACKAGE / "energy.py", ["torch"])
