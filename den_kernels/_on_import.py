"""Run a function when somebody imports a module, without importing that module for it."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _Then(Loader):
    """A loader that loads a module as `loader` does, then calls `done`."""

    def __init__(self, loader: Any, done: Callable[[], object]) -> None:
        self._loader, self._done = loader, done

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._done()


class _Finder(MetaPathFinder):
    """A finder of one module, once: it asks the other finders and wraps the loader that they give."""

    def __init__(self, name: str, done: Callable[[], object]) -> None:
        self._name, self._done = name, done

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self._done)
        return spec


def when_imported(name: str, done: Callable[[], object]) -> None:
    """Call `done` when the module `name` has been imported, at once if it is there."""
    if name in sys.modules:
        done()
    else:
        sys.meta_path.insert(0, _Finder(name, done))
