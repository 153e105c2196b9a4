"""`Engine`: a network in use."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from den.data.images import Kept
from den.evaluate.operating import LevelCosts
from den.inference import pretrained
from den.inference.networks import Network, joined, network_of, split
from den.inference.points import Point, shift_within, structure_within, within_milliseconds
from den.inference.profile import Profile, block_milliseconds, mean_saved
from den.nn.graphs import Graphs
from den.nn.task_batch import Images, TaskBatch, Tasks, find_task
from den.support.call_time import call_seconds
from den.support.device import choose_device
from den_kernels.building import is_recorded

_OP = "Engine"
ROUNDS = 9  # of a measurement
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Engine:
    """A network for inference: batch norms folded, weights as the kernels read them, images at their own levels.

        engine = den.Engine(model, max_batch=64)
        logits = engine(images, "cifar10")

    On a CPU all blocks of a Deep Elastic Network are one call; on a GPU each batch is the replay of a CUDA graph, made
    when the first batch of its size comes; batches are padded to powers of two. Threads may call an engine at once (on
    a GPU one waits for the other).

    Args:
        model: a `DeepElasticNetwork`, a model that `den_kernels.convert` changed, or such a one with a selector
            (`den.attach_selector`, `den_kernels.ElasticModel`). It is copied; later changes do not matter.
        dtype: float32, bfloat16 or float16, of weights and maps.
        max_batch: images that run together; larger batches are cut.
        device: auto (the GPU if there is one), cpu, cuda or cuda:N.
        levels: the structure of all images, integers [N]. Without this and the next two the selector chooses; a model
            without a selector then runs at its highest levels.
        flops: the share of the full structure's FLOPs that images are to cost in the mean.
        budget_ms: the milliseconds that an image is to take, in batches of as many `images` as are given and fit.
        images: of each task, in the form that calls take, a tensor or a mapping from names of tasks: what `flops` and
            `budget_ms` are met on. Not needed for `flops` of a model without a selector.
        example: one image [1, C, H, W] of the size that a converted model takes; None: one of the `images`, or what
            `den_kernels.convert` takes where it is given none.

    Raises:
        ValueError: a model of another kind, a device that is not there, a budget below the cheapest structure's, more
            than one rule for the levels.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype = torch.float32,
        max_batch: int = 64,
        device: str = "auto",
        levels: Sequence[int] | Tensor | None = None,
        flops: float | None = None,
        budget_ms: float | None = None,
        images: Tensor | Mapping[str, Tensor] | None = None,
        example: Tensor | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"{_OP}: dtype must be float32, bfloat16 or float16, got {dtype}")
        if not isinstance(max_batch, int) or isinstance(max_batch, bool) or max_batch < 1:
            raise ValueError(f"{_OP}: max_batch must be a whole number of at least 1, got {max_batch!r}")
        if sum(rule is not None for rule in (levels, flops, budget_ms)) > 1:
            raise ValueError(f"{_OP}: levels, flops and budget_ms must not be given together, got more than one")
        self.model, self.dtype, self.max_batch = model, dtype, max_batch
        self.device = choose_device(device)
        if example is None and isinstance(images, Tensor):
            example = images[:1]
        self.example = None if example is None else [1, *example.shape[1:]]
        self.network: Network = network_of(model, dtype, self.device, example)
        self._lowest = torch.tensor(self.network.lowest).to(self.device)
        self._graphs = Graphs(self._computed, self.device) if self.device.type == "cuda" else None
        self.point, self.kept = Point(), dict[str, Kept]()
        with torch.inference_mode():
            self.point = self._point(levels, flops, budget_ms, images)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks; of a converted model none."""
        return tuple(task.name for task in self.network.tasks)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the N blocks."""
        return self.network.blocks

    def __call__(
        self, images: Images, task: Tasks | None = None, *, levels: Tensor | None = None, return_levels: bool = False
    ) -> Any:
        """The network's results.

        Args:
            images: of a Deep Elastic Network as `DeepElasticNetwork` takes them: [B, C, S, S] of one task, a list with
                one such tensor per task, or [B, C, S, S] with tasks per instance. Of a converted model [B, C, H, W].
            task: the task, a list of tasks, or integer [B]; None for a network of one task and for a converted model.
            levels: integer [B, N] in 0..L-1 in the order of the images, for this call; None: the engine's rule.
            return_levels: return (results, levels [B, N]).

        Returns:
            Logits as `DeepElasticNetwork` returns them; what the converted model returns.

        Raises:
            ValueError: images, task or levels that do not fit.
            RuntimeError: torch.export or torch.jit.trace records the call.
        """
        if is_recorded():
            raise RuntimeError(
                f"{_OP}: a call must not be recorded by torch.export or torch.jit.trace, as the engine cuts and pads "
                "batches by their size; got one that is. Record the model: docs/export.md"
            )
        with torch.inference_mode():
            batch = self.network.batch(images, task)
            given = None if levels is None else batch.arrange(self._checked(levels, len(batch)))
            pieces = split(batch, self.max_batch)
            ends = [] if given is None else list(given.split([len(piece.batch) for piece in pieces]))
            made = [self._piece(piece.batch, ends[i] if ends else None) for i, piece in enumerate(pieces)]
            results = joined(len(batch.tasks), pieces, [each for each, _ in made])
            answer = self.network.restore(batch, results)
            return (answer, batch.restore(torch.cat([own for _, own in made]))) if return_levels else answer

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        architecture: str | Mapping[str, Any] | None = None,
        images: Tensor | Mapping[str, Tensor] | None = None,
        kept: Kept | Mapping[str, Kept] | None = None,
    ) -> Path:
        """Write the engine to a folder: model.safetensors, config.json, and a model card. Returns the folder.

        The weights are those that `engine.model` holds now, from which packed ones are made again. architecture: of a
        converted model what builds it: "torchvision/resnet18" (or of timm, pytorchcv), or with settings
        {"name": "timm/resnet18", "num_classes": 10}; None: `from_pretrained` is to be given the model. images: what
        the card's table is measured on. kept: mean and deviation of the pixels and names of the classes, for each task
        (`den.load(RUN).kept`), which `den serve` needs to know; None: those of the engine, if it has any.

        Raises ValueError for an architecture or a selector that cannot be made again, `kept` of another task.
        """
        self.kept = self.kept if kept is None else pretrained.checked_kept(kept, self.tasks)
        return pretrained.save(self, folder, architecture, images)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, model: nn.Module | None = None, **options: Any) -> Self:
        """The engine that `save_pretrained` wrote; no code of the folder is run.

        folder: the folder, or a name on the Hugging Face hub where huggingface_hub is installed. model: of an engine
        that was saved without an architecture the model before it was converted, with any weights; it is changed.
        options: those of `Engine` that are to be others than as saved.

        Raises ValueError for a folder that holds something else, or only a part.
        """
        place = Path(folder) if Path(folder).is_dir() else pretrained.downloaded(str(folder))
        made, point, kept, saved = pretrained.load(place, model)
        engine = cls(made, **(saved | options))
        engine.kept = pretrained.checked_kept(kept, engine.tasks)
        if not {"levels", "flops", "budget_ms"} & set(options):
            engine.point = Point(*(None if t is None else t.to(engine.device) for t in (point.structure, point.shift)))
        return engine

    def push_to_hub(self, name: str, *, architecture: Any = None, images: Any = None, **options: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, under a name; returns its address there."""
        return pretrained.push(self, name, architecture, images, **options)

    def profile(self, images: Images, task: Tasks | None = None) -> Profile:
        """Measure what each block costs for these images: `print(engine.profile(images))`.

        The blocks are timed one by one, without graphs, so that together they take longer than `total`, which is the
        time of a call.
        """
        with torch.inference_mode():
            _, levels = self(images, task, return_levels=True)
            batch = self.network.batch(images, task)
            [piece, *_] = split(batch, self.max_batch)
            chosen = batch.arrange(levels)[: len(piece.batch)]
            one_by_one = partial(self.network.run, piece.batch, chosen)
            times = block_milliseconds(self.network.modules(), one_by_one, self.device, ROUNDS)
            whole = 1e3 * call_seconds(lambda: self._piece(piece.batch, None), self.device, ROUNDS)
            mean, saved = mean_saved(chosen, self.network.costs.levels)
            share = self.network.costs.of(chosen).mean().item()
            return Profile(self.blocks, tuple(mean), tuple(saved), tuple(times), whole, share, len(piece.batch))

    def _piece(self, batch: TaskBatch, levels: Tensor | None) -> tuple[list[Any], Tensor]:
        if self._graphs is not None:
            return self._graphs(batch, levels)
        return self._computed(batch, levels, None)

    def _computed(self, batch: TaskBatch, levels: Tensor | None, padding: Tensor | None) -> tuple[list[Any], Tensor]:
        """Results of the parts, and levels [B, N]; instances of the `padding`, bool [B], run at the lowest levels."""
        chosen = self._levels(batch, self.point) if levels is None else levels
        if padding is not None:
            chosen = torch.where(padding[:, None], self._lowest, chosen)
        return self.network.run(batch, chosen), chosen

    def _levels(self, batch: TaskBatch, point: Point) -> Tensor:
        """Levels int64 [B, N] by a rule, in the batch's own order."""
        if point.structure is not None:
            return point.structure.expand(len(batch), -1)
        if point.shift is None:
            return self.network.choose(batch)
        logits = self.network.logits(batch)
        parts = zip(logits.split(batch.sizes), batch.tasks, strict=True)
        return torch.cat([point.choose(part, task) for part, task in parts])

    def _checked(self, levels: Tensor, count: int) -> Tensor:
        expected = [count, len(self.blocks)]
        ok = isinstance(levels, Tensor) and not levels.is_floating_point() and levels.dtype != torch.bool
        if not ok or list(levels.shape) != expected:
            got = f"{levels.dtype} {list(levels.shape)}" if isinstance(levels, Tensor) else type(levels).__name__
            raise ValueError(f"{_OP}: levels must be integer {expected}, got {got}")
        if not levels.is_cuda and count:
            self._check_range(levels)
        return levels.to(self.device, torch.int64)

    def _check_range(self, levels: Tensor) -> None:
        lowest = torch.tensor(self.network.lowest)
        if bool((levels < lowest).any()) or int(levels.max()) >= self.network.levels:
            first, last = lowest.tolist() if lowest.any() else 0, self.network.levels - 1
            raise ValueError(f"{_OP}: levels must be in {first}..{last}, got {int(levels.min())}..{int(levels.max())}")

    def _point(self, levels: Any, flops: float | None, budget_ms: float | None, images: Any) -> Point:
        network = self.network
        if levels is not None:
            return Point(self._checked(torch.as_tensor(levels)[None], 1)[0])
        if flops is None and budget_ms is None:
            highest = self._lowest.new_full((len(self.blocks),), network.levels - 1)
            return Point() if network.has_selector else Point(highest)
        batches = self._calibration(images, needed=network.has_selector or budget_ms is not None)
        if flops is not None:
            if not 0 < flops <= 1:
                raise ValueError(f"{_OP}: flops must be above 0 and at most 1, the full structure's, got {flops:g}")
            return self._fit(batches, network.costs, flops)
        assert budget_ms is not None
        costs = self._measured(batches)
        whole = [piece.batch for batch in batches for piece in split(batch, self.max_batch)[:1]]

        def clock(point: Point) -> float:
            def run() -> None:
                for batch in whole:
                    self._piece(batch, self._levels(batch, point))

            return 1e3 * call_seconds(run, self.device, ROUNDS) / sum(map(len, whole))

        return within_milliseconds(partial(self._fit, batches, costs), clock, costs, budget_ms)

    def _calibration(self, images: Any, needed: bool) -> list[TaskBatch]:
        """A batch of each task's images."""
        if images is None:
            if not needed:
                return []
            raise ValueError(f"{_OP}: images must be given to meet a budget on, got None")
        if not isinstance(images, Mapping):
            return [self.network.batch(images, None)]
        missing = [name for name in self.tasks if name not in images]
        if missing or not self.tasks:
            raise ValueError(f"{_OP}: images must be given for each task, got none for {', '.join(missing) or images}")
        order = sorted(images, key=lambda name: find_task(name, self.network.tasks))
        return [self.network.batch(images[name], name) for name in order]

    def _fit(self, batches: Sequence[TaskBatch], costs: LevelCosts, limit: float) -> Point:
        """The rule that costs at most `limit`."""
        if not self.network.has_selector:
            return Point(structure_within(costs, self.network.lowest, limit).to(self.device))
        logits = [
            torch.cat([self.network.logits(piece.batch).float().cpu() for piece in split(batch, self.max_batch)])
            for batch in batches
        ]
        return Point(shift=shift_within(logits, costs, limit).to(self.device))

    def _measured(self, batches: Sequence[TaskBatch]) -> LevelCosts:
        """Milliseconds of each block at each level for an image, and `fixed` of what is left, selector included."""
        batch = split(batches[0], self.max_batch)[0].batch
        modules, rows, lowest = self.network.modules(), [], torch.tensor(self.network.lowest)
        for level in range(self.network.levels):
            levels = torch.full((len(self.blocks),), level).maximum(lowest).to(self.device).expand(len(batch), -1)
            times = block_milliseconds(modules, partial(self.network.run, batch, levels), self.device, ROUNDS)
            rows.append([0.0 if ms is None else ms / len(batch) for ms in times])
        # A block is no cheaper at a higher level, whatever the noise of a measurement says.
        blocks = LevelCosts(torch.tensor(rows, dtype=torch.float64).t().cummax(1).values)
        top = torch.full((len(batch), len(self.blocks)), self.network.levels - 1).to(self.device)
        whole = 1e3 * call_seconds(lambda: self._piece(batch, top), self.device, ROUNDS) / len(batch)
        return LevelCosts(blocks.levels, max(0.0, whole - blocks.most))
