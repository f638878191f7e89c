# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""
Writes a pipeline as one file, as the Hub requires: there, a file can't import other files of this package.

The file holds the imports, then the definitions that the pipeline's module imports from the package, each after the definitions
that it uses, then the module itself. Two things are replaced: what only the installed package can do (`STANDS_FOR`), and
component classes, whose code is saved in separate files and for which their base classes stand in.
"""

import ast
import functools
import sys
from pathlib import Path


PACKAGE = Path(__file__).parents[1]
HEADER = """# Generated from src/ecvae_diffusers by pipelines/generate.py: change it there.
# diffusers loads it from a folder without the package, with trust_remote_code=True.
"""
STAND_INS = "# The code of component classes is saved in separate files. Here their base classes stand in for them."
# A module that is replaced by another one, which has the same names.
STANDS_FOR = {PACKAGE / "pipelines" / "self_contained.py": PACKAGE / "hub" / "saving.py"}
BASE_CLASSES = {PACKAGE / "models": "ModelMixin", PACKAGE / "schedulers": "SchedulerMixin"}


@functools.cache
def single_file(name: str) -> str:
    """Return the code of `pipelines/<name>.py` as a file that imports only torch, diffusers and their dependencies."""
    module = Module(PACKAGE / "pipelines" / f"{name}.py")
    inlined = Inlined()
    inlined.take_imports(module, module.tree.body)
    # The text is copied, not the nodes, which have no comments.
    last_import = max(last_line(node) for node in module.tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    body = "\n".join(module.lines[last_import:]).strip("\n")
    imports = [import_block(inlined.imports, is_standard) for is_standard in (True, False)]
    head = f'{module.lines[0]}\n{HEADER}"""{ast.get_docstring(module.tree, clean=False)}"""'
    stand_ins = "\n".join([STAND_INS, *sorted(inlined.stand_ins)])
    top = "\n\n".join([head, *filter(None, imports)])
    return "\n\n\n".join([top, stand_ins, *inlined.texts, body]) + "\n"


class Module:
    """A module's text and tree, with the functions, classes and constants that it defines."""

    def __init__(self, path: Path):
        self.path, text = path, path.read_text(encoding="utf-8")
        self.lines, self.tree = text.splitlines(), ast.parse(text)
        self.definitions: dict[str, ast.stmt] = {}
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign):
                targets = [name for target in node.targets for name in ast.walk(target)]
                self.definitions |= {name.id: node for name in targets if isinstance(name, ast.Name)}

    def with_helpers(self, names: list[str]) -> list[ast.stmt]:
        """Return the definitions of `names` and of what they use from the same module, in its order."""
        wanted, todo = set(), [(name, self.definitions[name]) for name in names]
        while todo:
            name, node = todo.pop()
            if name not in wanted:
                wanted.add(name)
                used = self.definitions.keys() & used_names([node])
                todo += [(name, self.definitions[name]) for name in used]
        return [node for node in self.tree.body if any(node is self.definitions[name] for name in wanted)]

    def source_of(self, node: ast.stmt) -> str:
        """Return the text of a definition with its decorators, which `ast.get_source_segment` leaves out."""
        first = min(part.lineno for part in [node, *getattr(node, "decorator_list", [])])
        return "\n".join(self.lines[first - 1 : last_line(node)])


class Inlined:
    """What a single file takes from other modules: imports, definitions, and stand-ins for component classes."""

    def __init__(self) -> None:
        self.imports: set[tuple[str, str]] = set()  # module and name; no name for `import module`
        self.texts: list[str] = []
        self.stand_ins: set[str] = set()

    def take(self, path: Path, names: list[str]) -> None:
        """Add definitions of a module of the package, after what they use."""
        path = STANDS_FOR.get(path, path)
        if path.parent in BASE_CLASSES:
            base = BASE_CLASSES[path.parent]
            self.imports.add(("diffusers", base))
            self.stand_ins |= {f"{name} = {base}" for name in names}
            return
        module = Module(path)
        nodes = module.with_helpers(names)
        self.take_imports(module, nodes)
        self.texts += [text for text in map(module.source_of, nodes) if text not in self.texts]

    def take_imports(self, module: Module, nodes: list[ast.stmt]) -> None:
        """Add what `nodes` use of the imports of their module."""
        used = used_names(nodes)
        for node in module.tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            aliases = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
            if isinstance(node, ast.Import):
                self.imports |= {(ast.unparse(alias), "") for alias in aliases}
            elif not node.level:
                self.imports |= {(str(node.module), ast.unparse(alias)) for alias in aliases}
            elif aliases:
                folder = module.path.parents[node.level - 1]
                path = folder.joinpath(*str(node.module).split(".")).with_suffix(".py")
                self.take(path, [alias.name for alias in aliases])
                renamed = [f"{alias.asname} = {alias.name}" for alias in aliases if alias.asname is not None]
                self.texts += [text for text in renamed if text not in self.texts]


def used_names(nodes: list[ast.stmt]) -> set[str]:
    return {node.id for part in nodes for node in ast.walk(part) if isinstance(node, ast.Name)}


def last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def import_block(imports: set[tuple[str, str]], is_standard: bool) -> str:
    """Return imports sorted as ruff sorts them: plain ones first, then one `from` line per module."""
    chosen = [one for one in imports if (one[0].split(".")[0].split()[0] in sys.stdlib_module_names) == is_standard]
    lines = [f"import {module}" for module in sorted((m for m, name in chosen if not name), key=str.lower)]
    for module in sorted({module for module, name in chosen if name}, key=str.lower):
        lines.append(f"from {module} import {', '.join(sorted(name for m, name in chosen if m == module and name))}")
    return "\n".join(lines)
