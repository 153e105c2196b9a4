"""The names that modules had before they lay in folders: an import by the old name gives the same module and a warning.

They go with version 0.3.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_SUPPORT = ("device", "files", "limits", "progress", "tables", "terminal")
_NN = (
    "tasks", "task_batch", "levels", "backbones", "folding", "selector", "estimator", "model",
    "model_config", "count", "plain", "reference", "blocks",
)  # fmt: skip
_TRAIN = ("engine", "phases", "checkpoint", "config", "objective", "scenarios")
MOVED = {
    **{f"den.{name}": f"den.support.{name}" for name in _SUPPORT},
    **{f"den.{name}": f"den.nn.{name}" for name in _NN},
    **{f"den.{name}": f"den.train.{name}" for name in _TRAIN},
    **dict.fromkeys(("den.stem", "den.tail", "den.conv_norm"), "den.nn.ends"),
    "den.baselines": "den.recipes",
    "den.dag.adashare": "den.recipes.dag.adashare",
    "den.dag.comparison": "den.report.dag.comparison",
    "den.dag.dense_report": "den.report.dag.dense",
    "den.dag.drawing": "den.report.dag.drawing",
    "den.dag.engine": "den.recipes.dag.recipe",
    "den.dag.report": "den.report.dag.report",
    "den.dag.runs": "den.runs.dag",
    "den.dag.search": "den.recipes.dag.search",
    "den.comparison": "den.evaluate.comparison",
    "den.evaluation": "den.runs.evaluation",
    "den.figures": "den.report.figures",
    "den.heap": "den.support.call_time",
    "den.initial": "den.nn.modules",
    "den.measure": "den.runs.command",
    "den.method": "den.recipes.base",
    "den.operating": "den.evaluate.operating",
    "den.randomness": "den.support.randomness",
    "den.run_folder": "den.train.folder",
    "den.run_lock": "den.train.lock",
    "den.run_state": "den.runs.state",
    "den.steering": "den.runs.steering",
}


class _Same:
    """A loader that gives the module of another name, as it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import has written the old name there


class _Finder:  # not of importlib.abc, whose import takes longer than the rest of `import den`
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if (new := _new_name(name)) is None:
            return None
        warnings.warn(f"{name} is {new} now; the old name goes with version 0.3", DeprecationWarning, stacklevel=2)
        return ModuleSpec(name, _Same(new))  # type: ignore[arg-type]


def _new_name(name: str) -> str | None:
    """The name of today's module, or None where nothing moved.

    >>> _new_name("den.blocks.bottleneck")
    'den.nn.blocks.bottleneck'
    """
    parts = name.split(".")
    for count in (3, 2):
        if moved := MOVED.get(".".join(parts[:count])):
            return ".".join([moved, *parts[count:]])
    return None


def install() -> None:
    """Let imports find modules by their old names."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
