"""The state of modules that a decision was made from, compared in one call with how they are now."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ._extension import extension
from .eager import are_watched

Entries = tuple[dict[str, Any], dict[str, Any]]  # a dictionary, and what stood in it


class Standing:
    """Keeps entries of modules' dictionaries, and modules that nothing watches, and tells whether that has changed.

    Asking modules for their attributes one by one takes longer than to run a small network, above all after a large
    one, which leaves nothing of Python in the processor's caches.
    """

    def __init__(self) -> None:
        self._whole: list[Entries] = []
        self._parts: list[Entries] = []
        self._plain: list[dict[str, Any]] = []
        self._modules: list[nn.Module] = []  # of `_plain`

    def keep_tree(self, modules: Iterable[nn.Module]) -> None:
        """Modules, parameters and buffers in these modules, and in those in them."""
        for module in modules:
            for each in module.modules():
                self.keep_children(each)
                self._whole += [(kept, dict(kept)) for kept in (each._parameters, each._buffers)]

    def keep_children(self, *modules: nn.Module) -> None:
        """The modules directly in each of these, by their names."""
        self._whole += [(module._modules, dict(module._modules)) for module in modules]

    def keep(self, module: nn.Module, *names: str) -> None:
        """Attributes of a module that are neither modules nor tensors."""
        own = module.__dict__
        self._parts.append((own, {name: own[name] for name in names}))

    def keep_plain(self, modules: Iterable[nn.Module]) -> None:
        """Modules of which `are_watched` is False."""
        self._modules += modules
        self._plain = [module.__dict__ for module in self._modules]

    def holds(self) -> bool:
        """True where all is as it was kept."""
        if extension is not None:
            return extension.stands(self._whole, self._parts, self._plain)
        whole = all(len(found) == len(kept) and _has(found, kept) for found, kept in self._whole)
        return whole and all(_has(*each) for each in self._parts) and not are_watched(self._modules)


_MISSING = object()


def _has(found: dict[str, Any], kept: dict[str, Any]) -> bool:
    return all(found.get(name, _MISSING) is value for name, value in kept.items())
