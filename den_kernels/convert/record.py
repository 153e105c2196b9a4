"""One run of a model as a graph: calls of leaf modules and of torch functions, and who reads whose result.

A recording follows the tensors of a run, not the source of the model, so that it does not matter how a block is
written: with modules or functions, in place or not, in the block's own forward or that of `nn.Sequential`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map


class Ref(NamedTuple):
    """A tensor of the run: the result of a node, or one of its results."""

    node: int
    item: int | None = None


@dataclass(eq=False)
class Node:
    """One call. In its arguments a `Ref` stands for each tensor that the run had made before."""

    index: int
    target: Any
    """The module or the function; None for an input of the model."""
    name: str
    """The path of the module, or the bare name of the function: "add" for `x + y`, `x += y` and `torch.add`."""
    scope: str
    """The path of the module whose forward made the call."""
    args: tuple
    kwargs: Mapping[str, Any]
    shape: torch.Size | None
    """Of the result; None of several results."""
    inputs: tuple[int, ...] = field(init=False)
    """The nodes whose results it reads."""

    def __post_init__(self) -> None:
        leaves = tree_flatten((self.args, dict(self.kwargs)), is_leaf=_is_ref)[0]
        self.inputs = tuple(dict.fromkeys(leaf.node for leaf in leaves if _is_ref(leaf)))

    @property
    def is_module(self) -> bool:
        return isinstance(self.target, nn.Module)


def _is_ref(value: Any) -> bool:
    return isinstance(value, Ref)


@dataclass(eq=False)
class Recording:
    """The nodes of a run in the order of the calls."""

    nodes: list[Node] = field(default_factory=list)
    results: dict[str, Ref] = field(default_factory=dict)
    """What each module returned last, by its path, where that was one tensor."""
    arguments: dict[str, tuple] = field(default_factory=dict)
    """What each module was called with last, where that was without keywords."""
    calls: dict[int, int] = field(default_factory=dict)
    """How often a module ran, by its id."""
    returned: set[int] = field(default_factory=set)
    """The nodes whose results the model returned."""
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def readers(self, index: int) -> list[Node]:
        """The nodes that read a node's result."""
        return [node for node in self.nodes if index in node.inputs]

    def ancestors(self, index: int) -> set[int]:
        """The nodes that a node's result depends on, without itself."""
        found: set[int] = set()
        waiting = list(self.nodes[index].inputs)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += self.nodes[node].inputs
        return found

    def is_constant(self, index: int) -> bool:
        """True for a node whose result follows from parameters alone, as that of `gamma.view(1, -1, 1, 1)` does."""
        return all(self.nodes[i].target is not None for i in (index, *self.ancestors(index)))

    def replay(
        self,
        indices: Sequence[int],
        values: dict[Ref, Any],
        call: Callable[[Node, tuple, dict[str, Any]], Any],
    ) -> dict[Ref, Any]:
        """The results of the nodes, by `call(node, args, kwargs)`, from the results in `values` that they read."""
        values = dict(values)

        def value(leaf: Any) -> Any:
            return values[leaf] if _is_ref(leaf) else leaf

        for index in sorted(indices):
            node = self.nodes[index]
            args, kwargs = tree_map(value, (node.args, dict(node.kwargs)), is_leaf=_is_ref)
            result = call(node, args, kwargs)
            values[Ref(index)] = result
            if isinstance(result, (tuple, list)):
                values |= {Ref(index, i): part for i, part in enumerate(result)}
        return values


def is_leaf(module: nn.Module) -> bool:
    """True where a module is one operation of a recording: the modules of torch that compute by themselves.

    A batch norm of another package may hold its activation (timm's `BatchNormAct2d`): a leaf, too.
    """
    kind = type(module).__module__
    own = kind.startswith(("torch.nn.", "torch.ao.", "den_kernels.")) and not kind.endswith(".container")
    return own or isinstance(module, nn.BatchNorm2d)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.recording = Recording()
        self._paths = {module: path for path, module in model.named_modules()}
        self._made: dict[int, Ref] = {}
        self._kept: list[Tensor] = []  # so that no later tensor takes the id of an earlier one
        self._scopes: list[str] = []
        self._inside: list[tuple[tuple, dict[str, Any]]] = []  # the arguments of the leaf that runs

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        read = self._symbols(args, kwargs)
        result = func(*args, **kwargs)
        self._add(func, _bare(func), *read, result)
        return result

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls = self.recording.calls
        calls[id(module)] = calls.get(id(module), 0) + 1
        if not kwargs:
            self.recording.arguments[self._paths[module]] = self._symbols(args, {})[0]
        if self._inside or is_leaf(module):
            self._inside.append(self._symbols(args, kwargs))
        else:
            self._scopes.append(self._paths[module])

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        path = self._paths[module]
        if self._inside:
            read = self._inside.pop()
            if not self._inside:
                self._add(module, path, *read, result)
        else:
            self._scopes.pop()
        if isinstance(result, Tensor) and id(result) in self._made:
            self.recording.results[path] = self._made[id(result)]

    def add_outputs(self, value: Any) -> None:
        if isinstance(value, Mapping):  # of transformers: what it returns is one
            value = list(value.values())
        if isinstance(value, (tuple, list)):
            for part in value:
                self.add_outputs(part)
        elif isinstance(value, Tensor) and id(value) in self._made:
            self.recording.returned.add(self._made[id(value)].node)

    def add_inputs(self, values: Any) -> None:
        for value in tree_flatten(values)[0]:
            if isinstance(value, Tensor):
                self._add(None, "input", (), {}, value)

    def _symbols(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tree_map(
            lambda leaf: self._made.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf, (args, dict(kwargs))
        )

    def _add(self, target: Any, name: str, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        parts = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (tuple, list)) else []
        if not any(isinstance(part, Tensor) for part in parts):
            return
        index, one = len(self.recording.nodes), isinstance(result, Tensor)
        scope = self._scopes[-1] if self._scopes else ""
        node = Node(index, target, name, scope, args, kwargs, result.shape if one else None)
        self.recording.nodes.append(node)
        for item, part in enumerate(parts):
            if isinstance(part, Tensor):
                self._made[id(part)] = Ref(index) if one else Ref(index, item)
                self._kept.append(part)


def _bare(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return name[1:] if name in ("iadd", "radd", "imul", "rmul", "isub", "idiv", "itruediv") else name
    return name.strip("_") or name


@contextmanager
def _hooked(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    with ExitStack() as stack:
        for module in model.modules():
            before = module.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True)
            after = module.register_forward_hook(recorder.leave, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients; each module's mode is as before at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def example_of(model: nn.Module, example: Any, op: str) -> tuple[tuple, Mapping[str, Any]]:
    """Arguments of the model: those of `example` (a tensor, a tuple, a mapping), or for None one random image.

    Raises ValueError, which says `op`, for None where the model has no convolution.
    """
    if isinstance(example, Mapping):
        return (), example
    if example is not None:
        return (example if isinstance(example, tuple) else (example,)), {}
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{op}: example must be given for a model without a convolution, got None")
    size = getattr(model, "in_size", None) or getattr(model, "default_cfg", {}).get("input_size", (0, 224, 224))[1:]
    return (torch.randn(1, first.in_channels, *size).to(first.weight),), {}


def record(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Recording:
    """The recording of `model(*args, **kwargs)`, run in evaluation mode without gradients."""
    recorder = _Recorder(model)
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    recorder.recording.dtype, recorder.recording.device = first.dtype, first.device
    with evaluating(model), _hooked(model, recorder):
        recorder.add_inputs((args, dict(kwargs or {})))
        with recorder:
            result = model(*args, **(kwargs or {}))
        recorder.add_outputs(result)
    return recorder.recording
