"""How the levels reach the layers of a model whose forwards know nothing of them."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map

from ..eager import is_ordinary, is_recorded
from ..plan import Route, RoutingPlan
from .report import Block, Report

_OP = "levels"


class Selection(NamedTuple):
    """What the instances of a batch use of one block."""

    plan: RoutingPlan
    """Of all blocks."""
    block: int
    full: bool
    """It was seen that every instance uses all of it."""
    all_full: bool
    """It was seen that every instance uses all of every block."""
    used: bool = False
    """It was seen that every instance uses some of it."""
    recorded: bool = False
    """It was made inside the call that is recorded, of levels that may be another's."""

    @property
    def hidden(self) -> Route:
        """Over the channel groups of the hidden channels."""
        return self.plan[self.block]

    @property
    def active(self) -> Route:
        """Over the branch as a whole: level 1 where anything of it is in use. Blocks that run as one op need none."""
        return self.hidden.active()


Selections = tuple[Selection, ...]  # of each block


class Shared:
    """What all threads see of a converted model."""

    def __init__(self, blocks: tuple[Block, ...], shares: Sequence[float]) -> None:
        self.blocks, self.shares, self.groups = blocks, tuple(shares), len(shares)
        self.replays: dict[int, Selections | None] = {}  # of a backward pass that runs, by its id

    def forget(self, task: int) -> None:
        """The backward pass is over."""
        self.replays.pop(task, None)

    def __reduce__(self) -> tuple:
        return type(self), (self.blocks, self.shares)


class Carrier(threading.local):
    """The selections that the layers of one model use in this thread; of one copy of the model: copies have their own.

    A `threading.local` initialised in `__init__` is what torch.compile can look into. A layer that is called during a
    backward pass (a checkpoint replays it) finds the selections of the forward pass that is differentiated: see
    :class:`Remember`.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.selections: Selections | None = None

    def __reduce__(self) -> tuple:
        return type(self), (self.shared,)

    def __deepcopy__(self, memo: dict) -> "Carrier":
        return memo.setdefault(id(self), type(self)(Shared(self.shared.blocks, self.shared.shares)))

    def selection(self, block: int, by_op: bool = False) -> Selection | None:
        """The channel groups of a block that the instances use now; None: all of it.

        by_op: of a block that runs as one op None means all of every block, so that the original's layers run: their
        result has the original's bits. In front of or behind a block that computes less there are no such bits, and
        the op is faster than the layers.
        """
        selections = self._current()
        if is_compiling():  # a graph for all levels
            return None if selections is None else selections[block]
        if selections is None and (task := torch._C._current_graph_task_id()) >= 0:
            selections = self._replayed(task)
        if selections is None:
            return None
        own = selections[block]
        return None if (own.all_full if by_op else own.full) else own

    def route(self, block: int, x: Tensor) -> Route:
        """The route of a block for the instances of x [B, ...]; without levels they use all of it."""
        selections = self._current()
        if selections is not None:
            return selections[block].hidden
        full = torch.full((x.shape[0], 1), self.shared.groups, dtype=torch.int32, device=x.device)
        return RoutingPlan.from_levels(full, self.shared.groups)[0]

    def plan_of(self, blocks: range, x: Tensor) -> RoutingPlan:
        """The plan of consecutive blocks, as `route`."""
        selections = self._current()
        if selections is not None:
            return selections[0].plan.part(blocks)
        full = torch.full((x.shape[0], len(blocks)), self.shared.groups, dtype=torch.int32, device=x.device)
        return RoutingPlan.from_levels(full, self.shared.groups)

    def _current(self) -> Selections | None:
        """What is set; RuntimeError where it would become a constant of a graph."""
        selections = self.selections
        if selections and not selections[0].recorded and is_recorded():
            raise RuntimeError(
                f"{_OP}: levels must be set inside the call that torch.export, torch.jit.trace or make_fx records, or "
                "those of the example would be constants of the graph; got levels that were set around it. Record "
                "WithLevels(model), whose input they are, or extract(model, structure)"
            )
        return selections

    def _replayed(self, task: int) -> Selections | None:
        if task not in self.shared.replays:
            raise RuntimeError(
                f"{_OP}: a checkpoint must lie inside the model, or be called with use_reentrant=False; got a layer "
                "that is replayed in a backward pass and cannot know its levels"
            )
        return self.shared.replays[task]

    def plan(self, levels: Tensor) -> Selections:
        """The selections that levels [B, N] or masks [B, N, G] mean. Raises ValueError and TypeError as the plan does,
        and ValueError for level 0 of a block without a shortcut, where levels are on a CPU; else such a level is 1."""
        blocks, groups = self.shared.blocks, self.shared.groups
        if not isinstance(levels, Tensor) or levels.ndim < 2 or levels.shape[1] != len(blocks):
            got = list(levels.shape) if isinstance(levels, Tensor) else type(levels).__name__
            raise ValueError(f"{_OP}: levels must be [B, {len(blocks)}], a column for each block, got {got}")
        if levels.dtype == torch.bool and levels.shape[2:] != (groups,):
            raise ValueError(f"{_OP}: masks must be [B, {len(blocks)}, {groups}], got {list(levels.shape)}")
        looks = levels.is_cpu and is_ordinary(levels)
        if any(block.lowest for block in blocks):
            levels = self._raised(levels, looks)
        plan = RoutingPlan.from_masks(levels) if levels.dtype == torch.bool else RoutingPlan.from_levels(levels, groups)
        least = plan.levels.amin(0).tolist() if looks and len(levels) else [0] * len(blocks)
        recorded = is_recorded()
        all_full = all(low == groups for low in least)
        return tuple(Selection(plan, n, low == groups, all_full, low > 0, recorded) for n, low in enumerate(least))

    def run(self, model: nn.Module, levels: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The result of model(*args, **kwargs) at levels [B, N] or masks [B, N, G]."""
        outer, self.selections = self.selections, self.plan(levels)
        try:
            return model(*args, **kwargs)
        finally:
            self.selections = outer

    def _raised(self, levels: Tensor, looks: bool) -> Tensor:
        """The levels, at least the lowest of each block; ValueError for a lower one where it can be seen."""
        masks = levels.dtype == torch.bool
        counts = levels.sum(2) if masks else levels
        if looks:
            least = counts.amin(0).tolist() if len(counts) else []
            for n, (own, block) in enumerate(zip(least, self.shared.blocks, strict=False)):
                if own < block.lowest:
                    raise ValueError(
                        f"{_OP}: levels of block {n} ({block.name}) must be at least {block.lowest}, as it has no "
                        f"shortcut, got {own}"
                    )
            return levels
        lowest = torch.tensor([block.lowest for block in self.shared.blocks], device=levels.device)
        if not masks:
            return torch.maximum(levels, lowest.to(levels.dtype))
        first = torch.arange(levels.shape[2], device=levels.device) == 0
        return levels | ((counts < lowest)[:, :, None] & first)


class Remember:
    """A forward hook of the model: its results, once they are differentiated, say which levels they were made with."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier

    def __call__(self, module: nn.Module, args: tuple, result: Any) -> None:
        if not is_compiling() and torch.is_grad_enabled() and is_ordinary():
            selections = self.carrier.selections
            tree_map(lambda leaf: self._mark(leaf, selections), result)

    def _mark(self, leaf: Any, selections: Selections | None) -> Any:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            shared = self.carrier.shared
            leaf.register_hook(lambda gradient: _remember(shared, selections))
        return leaf


def _remember(shared: Shared, selections: Selections | None) -> None:
    task = torch._C._current_graph_task_id()
    if task not in shared.replays:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: shared.forget(task))
    shared.replays[task] = selections


def carrier_of(model: nn.Module, op: str = _OP) -> Carrier:
    """The carrier of a converted model. Raises ValueError for one that is not, or holds several that are."""
    found: dict[int, Carrier] = {}
    waiting: list[nn.Module | None] = [model]  # `model.modules()` takes three times as long, in each call of a model
    while waiting:
        if (module := waiting.pop()) is not None:
            if isinstance(carrier := module.__dict__.get("carrier"), Carrier):
                found[id(carrier)] = carrier
                continue  # what is inside has the same
            waiting += module._modules.values()
    if len(found) != 1:
        got = "none" if not found else f"{len(found)} converted models in one"
        raise ValueError(f"{op}: model must be one that den_kernels.convert has changed, got {got}: {_kind(model)}")
    return next(iter(found.values()))


def _kind(model: nn.Module) -> str:
    return type(model).__name__


def report_of(model: nn.Module) -> Report:
    """The blocks of a converted model, as `convert` reported them, without what was left alone.

    Raises ValueError for a model that was not converted.
    """
    shared = carrier_of(model, "report_of").shared
    return Report(shared.blocks, (), shared.groups, shared.shares)


class levels:
    """Inside the context, in this thread, each instance of a batch uses the channel groups that its levels say.

        with den_kernels.levels(model, levels):
            y = model(x)

    model: a converted model, or one around it (DistributedDataParallel, torch.compile). levels: integer [B, N], a
    column for each block of the report, or masks, bool [B, N, G]. Contexts nest; the outer levels hold again behind an
    inner context. Raises ValueError for another shape, a level out of range or a model that was not converted.
    """

    def __init__(self, model: nn.Module, levels: Tensor) -> None:
        self.carrier = carrier_of(model)
        self.selections = self.carrier.plan(levels)
        self._outer: list[Selections | None] = []

    def __enter__(self) -> None:
        self._outer.append(self.carrier.selections)
        self.carrier.selections = self.selections

    def __exit__(self, *error: object) -> None:
        self.carrier.selections = self._outer.pop()


class ElasticModel(nn.Module):
    """A converted model with the selector of its levels: `model(x)` at the levels `selector(x)`, integer [B, N].

    Levels below the lowest of a block without a shortcut are raised to it.
    """

    _lowest: Tensor

    def __init__(self, model: nn.Module, selector: nn.Module) -> None:
        super().__init__()
        self.model, self.selector = model, selector
        self.carrier = carrier_of(model, "ElasticModel")
        lowest = [block.lowest for block in self.carrier.shared.blocks]
        self.register_buffer("_lowest", torch.tensor(lowest), persistent=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        chosen = self.selector(x)
        return self.carrier.run(self.model, torch.maximum(chosen, self._lowest.to(chosen.dtype)), x, *args, **kwargs)


class WithLevels(nn.Module):
    """A converted model whose levels are its second argument: `WithLevels(model)(x, levels)`.

    torch.export and torch.onnx record it for any levels. Of an `ElasticModel` it is the model, without the selector.
    Raises ValueError for a model that was not converted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.carrier = carrier_of(model, "WithLevels")
        self.model = model.model if isinstance(model, ElasticModel) else model
        self.train(self.model.training)

    def forward(self, x: Any, levels: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The result of model(x, *args, **kwargs) at levels [B, N] or masks [B, N, G], as :class:`levels` takes them.

        Raises ValueError and TypeError as it does.
        """
        return self.carrier.run(self.model, levels, x, *args, **kwargs)
