#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Generate the single-file pipelines of this folder from the package: `python pipelines/generate.py`.

A pipeline on the Hub is one file that imports no other of ours. So every name that a pipeline's module takes from the
package is written out in its place, except the component classes: those annotations are dropped, since their code
travels in the components' own files. The code in the models of `model_cards/` is brought up to date too. `--check` writes
nothing and fails where a file is out of date.
"""

import argparse
import ast
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "ecvae_diffusers"
PIPELINES = ["ecvae", "ecvae_restoration", "ecflow"]

HEADER = """# Generated from src/ecvae_diffusers by pipelines/generate.py: change it there.
# Loads without the package: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True).
"""
# What only the installed package can do, and what stands for it in a file that is on its own.
REPLACEMENTS = {
    "        write_card(self, save_directory)\n": "",
    "        write_restoration_code(save_directory)\n": "",
    "    push_to_hub = push_to_hub\n\n": "",
    "        upload = upload_arguments(save_directory, kwargs)\n": "",
    "        if upload is not None:\n            upload_folder(save_directory, **upload)\n": "",
    "single_file_source(self.saved_class)": 'Path(__file__).read_text(encoding="utf-8")',
    "from ecvae_diffusers import ECVAEPipeline": "from diffusers import DiffusionPipeline",
    'ECVAEPipeline.from_pretrained("path/or/hub-id")': 'DiffusionPipeline.from_pretrained("path/or/hub-id", trust_remote_code=True)',
    "from ecvae_diffusers import ECFlowPipeline": "from diffusers import DiffusionPipeline",
    'ECFlowPipeline.from_pretrained("path/or/hub-id")': 'DiffusionPipeline.from_pretrained("path/or/hub-id", trust_remote_code=True)',
    "from ecvae_diffusers import ECVAERestorationPipeline": "from diffusers import DiffusionPipeline",
    'ECVAERestorationPipeline.from_pretrained("path/or/hub-id")': "DiffusionPipeline.from_pretrained(\n"
    '        ...     "path/or/hub-id", custom_pipeline="restoration", trust_remote_code=True\n        ... )',
}
PACKAGE_ONLY = {
    "push_to_hub", "single_file_source", "upload_arguments", "upload_folder", "write_card", "write_restoration_code",
}  # fmt: skip


def standing_alone(path: Path) -> str:
    """A module's text, without what only the installed package can do."""
    text = path.read_text(encoding="utf-8")
    for old, new in REPLACEMENTS.items():
        text = text.replace(old, new)
    return text


def local_definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """Functions, classes and constants of a module, by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                found |= {name.id: node for name in names}
    return found


def with_helpers(names: list[str], tree: ast.Module) -> list[ast.stmt]:
    """The definitions of `names` and of what they use of their own module, in its order."""
    definitions, wanted, todo = local_definitions(tree), set(), list(names)
    while todo:
        name = todo.pop()
        if name in definitions and name not in wanted:
            wanted.add(name)
            todo += [node.id for node in ast.walk(definitions[name]) if isinstance(node, ast.Name)]
    return [node for node in tree.body if any(node is definitions[name] for name in wanted)]


def local_imports(tree: ast.Module, path: Path) -> list[tuple[Path, list[str]]]:
    """The package's modules that a module of it, at `path`, imports from, with the names."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            names = [alias.name for alias in node.names if alias.name not in PACKAGE_ONLY]
            found.append((folder.joinpath(*node.module.split(".")).with_suffix(".py"), names))
    return found


class Inlined:
    """What a single file takes from the package: the text of definitions, each once, behind what it uses itself."""

    def __init__(self):
        self.texts: list[str] = []
        self.imports: set[tuple[str, str]] = set()
        self.component_classes: set[str] = set()
        self.done: set[tuple[Path, int]] = set()

    def take(self, path: Path, names: list[str]) -> None:
        if path.parent.name in ("models", "schedulers"):
            self.component_classes.update(names)
            return
        text = standing_alone(path)
        tree = ast.parse(text)
        nodes = with_helpers(names, tree)
        used = used_names(nodes)
        for source, imported in local_imports(tree, path):
            self.take(source, [name for name in imported if name in used])
        self.imports |= external_imports(tree, used)
        for node in nodes:
            if (path, node.lineno) not in self.done:
                self.done.add((path, node.lineno))
                self.texts.append(source_of(node, text))


def source_of(node: ast.stmt, text: str) -> str:
    """The text of a definition, its decorators included (`ast.get_source_segment` leaves them out)."""
    first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
    return "\n".join(text.splitlines()[first - 1 : node.end_lineno])


def used_names(nodes: list[ast.stmt]) -> set[str]:
    return {node.id for part in nodes for node in ast.walk(part) if isinstance(node, ast.Name)}


def external_imports(tree: ast.Module, used: set[str]) -> set[tuple[str, str]]:
    """The imports of `used` names from outside the package, as (module, name); no name for `import module`."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {(ast.unparse(a), "") for a in node.names if (a.asname or a.name).split(".")[0] in used}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {(node.module, ast.unparse(a)) for a in node.names if (a.asname or a.name) in used}
    return found


def import_block(imports: set[tuple[str, str]], standard: bool) -> str:
    """Sorted as ruff sorts them: plain imports first, then one `from` line a module."""
    chosen = [i for i in imports if (i[0].split(".")[0].split()[0] in sys.stdlib_module_names) == standard]
    plain = sorted((module for module, name in chosen if not name), key=str.lower)
    modules = sorted({module for module, name in chosen if name}, key=str.lower)
    lines = [f"import {module}" for module in plain]
    for module in modules:
        names = sorted((name for m, name in chosen if m == module and name))
        lines.append(f"from {module} import {', '.join(names)}")
    return "\n".join(lines)


def generate(name: str) -> str:
    path = PACKAGE / "pipelines" / f"pipeline_{name}.py"
    text = standing_alone(path)
    tree = ast.parse(text)

    inlined = Inlined()
    for source, names in local_imports(tree, path):
        inlined.take(source, names)
    body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    imports = inlined.imports | external_imports(tree, used_names(body))
    # Text from the first statement behind the imports, so that comments stay.
    last_import = max(node.end_lineno for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    rest = "\n".join(text.splitlines()[last_import:]).strip("\n")
    for component in sorted(inlined.component_classes):
        rest = rest.replace(f": {component} | None = None", "=None").replace(f": {component},", ",")

    docstring = ast.get_docstring(tree, clean=False)
    blocks = [import_block(imports, standard=True), import_block(imports, standard=False)]
    license_line = text.splitlines()[0]
    head = f'{license_line}\n{HEADER}"""{docstring}"""\n\n' + "\n\n".join(block for block in blocks if block)
    return head + "\n\n\n" + "\n\n\n".join(inlined.texts) + "\n\n\n" + rest + "\n"


def generated_files() -> dict[Path, str]:
    """Everything that is generated: the pipelines of this folder, and the code in the models that the repository carries."""
    found = {ROOT / "pipelines" / name / "pipeline.py": generate(name) for name in PIPELINES}
    generation, restoration, _ = found.values()
    for index in sorted((ROOT / "model_cards").glob("*/model_index.json")):
        folder = index.parent
        found |= {folder / "pipeline.py": generation, folder / "restoration.py": restoration}
        for path in sorted(folder.glob("*/*.py")):
            (source,) = PACKAGE.glob(f"*/{path.name}")
            found[path] = source.read_text(encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a file is out of date; write nothing")
    check = parser.parse_args().check
    for path, text in generated_files().items():
        if check and (not path.is_file() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run `make pipelines`.")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
