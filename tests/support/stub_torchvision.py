"""Let packages be imported that ask for torchvision, which does not run next to the tested torch: `import stub_torchvision`."""

import importlib.abc
import importlib.machinery
import sys
import types


class Name(type):
    """A class of any name, whose attributes are classes too."""

    def __getattr__(cls, name: str) -> "Name":
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(name, (), {})


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        """Do nothing: attributes are made when they are asked for."""


sys.meta_path.insert(0, Finder())
