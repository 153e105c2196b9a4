"""A batch of images of one or several tasks, as the stems, the blocks and the heads see it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from den.nn.tasks import Task
from den.support.device import sent
from den_kernels.building import is_recorded

TaskName = str | int | Task
Images = Tensor | Sequence[Tensor]
Tasks = TaskName | Sequence[TaskName] | Tensor


@dataclass(frozen=True)
class TaskBatch:
    """Images of B instances, one tensor per task; the blocks run over them one after the other.

    Attributes:
        tasks: position, in the model's tasks, of the task of each part.
        images: one [B_k, C_k, S_k, S_k] per part; the B_k add up to B. Several tasks of the same images are as many
            parts of one tensor.
        order: int64 [B], the caller's row that stands at each of our rows; None where they are in the same order.
        form: what the caller gave and gets back: `one` task, a `list` of parts, or tasks per `instance`; `joint`: one
            part that all tasks label, and a list of their results.
    """

    tasks: tuple[int, ...]
    images: tuple[Tensor, ...]
    order: Tensor | None
    form: str

    @property
    def sizes(self) -> list[int]:
        """Instances of each part."""
        return [part.shape[0] for part in self.images]  # of a traced batch symbols, which len() would make numbers

    @property
    def batch_size(self) -> int:
        """Number of instances, B."""
        return sum(self.sizes)

    def __len__(self) -> int:
        return self.batch_size

    def arrange(self, rows: Tensor) -> Tensor:
        """Rows [B, ...] in the caller's order -> in ours."""
        return rows if self.order is None else rows.index_select(0, self.order)

    def restore(self, rows: Tensor) -> Tensor:
        """Rows [B, ...] in our order -> in the caller's."""
        return rows if self.order is None else rows.index_select(0, torch.argsort(self.order))

    def restore_logits(self, logits: list[Tensor], classes: int) -> Tensor | list[Tensor]:
        """Logits [B_k, classes_k] of each part, as the caller wants them.

        One task: [B, classes_k]. A list, and joint tasks: the list. Tasks per instance: [B, classes] in the caller's
        order, with -inf for the classes that an instance's task does not have.
        """
        if self.form == "one":
            return logits[0]
        if self.form in ("list", "joint"):
            return logits
        return self.restore(torch.cat([F.pad(part, (0, classes - part.shape[1]), value=-torch.inf) for part in logits]))


def find_task(task: TaskName, tasks: Sequence[Task]) -> int:
    """Position of `task` (a name, a position or the task itself) in `tasks`.

    Raises:
        ValueError: a task that is not one of `tasks`.
    """
    if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(tasks):
        return task
    for position, known in enumerate(tasks):
        if task is known or task == known.name or task == known:
            return position
    known_names = ", ".join(f"{position} {known.name!r}" for position, known in enumerate(tasks))
    raise ValueError(f"model: task must be one of {known_names}, got {task!r}")


def task_batch(images: Images, task: Tasks, tasks: Sequence[Task], like: Tensor) -> TaskBatch:
    """The batch of `images` and their `task`, checked.

    Args:
        images: [B, C, S, S], or a list with one such tensor per task.
        task: a task (name, position or Task) for a tensor of images; a sequence of tasks, one per entry, for a list;
            or integer [B], the position of each instance's task, where all of them share size and channels (on the
            CPU: reading one from another device waits for that device).
        tasks: the model's tasks.
        like: a parameter of the model; images must have its device, and its dtype unless autocast is on.

    Raises:
        ValueError: a task not in `tasks`; images of another rank, channels, size, dtype, device; lengths that differ.
    """
    if not isinstance(images, Tensor):
        return _listed(images, task, tasks, like)
    if isinstance(task, Tensor) and task.dim():
        return _per_instance(images, task, tasks, like)
    if isinstance(task, Sequence) and not isinstance(task, str):
        raise ValueError(f"model: images must be a list of one tensor per task for {list(task)}, got one tensor")
    position = find_task(cast(TaskName, task.item()) if isinstance(task, Tensor) else task, tasks)
    return TaskBatch((position,), (_checked(images, tasks[position], like),), None, "one")


def _listed(images: Sequence[Tensor], task: Tasks, tasks: Sequence[Task], like: Tensor) -> TaskBatch:
    """A batch of one tensor [B_k, C_k, S_k, S_k] per task."""
    if not isinstance(images, Sequence) or not all(isinstance(part, Tensor) for part in images):
        raise ValueError(f"model: images must be a tensor or a list of tensors, got {type(images).__name__}")
    if isinstance(task, str) or not isinstance(task, Sequence) or len(task) != len(images) or not images:
        raise ValueError(
            f"model: task must name one task for each of the {len(images)} (at least 1) tensors of images, got {task!r}"
        )
    positions = tuple(find_task(name, tasks) for name in task)
    parts = tuple(_checked(part, tasks[position], like) for part, position in zip(images, positions, strict=True))
    return TaskBatch(positions, parts, None, "list")


def _per_instance(images: Tensor, task: Tensor, tasks: Sequence[Task], like: Tensor) -> TaskBatch:
    """A batch of images [B, C, S, S], each of the task at its position in integer [B]."""
    if task.dtype.is_floating_point or task.dtype.is_complex or task.dtype == torch.bool or task.dim() != 1:
        raise ValueError(f"model: tasks per instance must be integer [B], got {task.dtype} {list(task.shape)}")
    if images.dim() != 4 or len(task) != len(images):
        raise ValueError(
            "model: images must be [B, C, S, S] with one task per instance,"
            f" got {list(images.shape)} and {len(task)} tasks"
        )
    if not len(task):
        fitting = [k for k, known in enumerate(tasks) if (known.channels, known.size) == tuple(images.shape[1:3])]
        position = fitting[0] if fitting else 0
        return TaskBatch((position,), (_checked(images, tasks[position], like),), None, "instance")
    if is_recorded():
        raise ValueError(
            "model: task must be one task, or a list with one for each tensor of images, where torch.export or "
            "torch.jit.trace records the call, or the tasks of the example would be constants; got a tensor of tasks"
        )
    task = task.cpu().long()
    if int(task.min()) < 0 or int(task.max()) >= len(tasks):
        raise ValueError(
            f"model: tasks per instance must be in 0..{len(tasks) - 1} ({', '.join(known.name for known in tasks)}),"
            f" got {int(task.min())}..{int(task.max())}"
        )
    counts = torch.bincount(task, minlength=len(tasks)).tolist()
    positions = tuple(position for position, count in enumerate(counts) if count)
    for position in positions:
        if tasks[position].dense:
            raise ValueError(
                f"model: tasks per instance must be classification tasks, got {tasks[position].name}"
                " (give a list of images, one entry per task)"
            )
        _checked(images, tasks[position], like)
    order = sent(torch.argsort(task, stable=True), images.device)
    parts = images.index_select(0, order).split([counts[position] for position in positions])
    return TaskBatch(positions, parts, order, "instance")


def _checked(images: Tensor, task: Task, like: Tensor) -> Tensor:
    """Return images [B_k, C_k, S_k, S_k]; ValueError unless they are of the task's shape, and of the device and dtype
    of `like`."""
    expected = task.channels, task.size, task.width or task.size
    if images.dim() != 4 or tuple(images.shape[1:]) != expected or not images.is_floating_point():
        raise ValueError(
            f"model: images of task {task.name} must be [B, {', '.join(map(str, expected))}] floating,"
            f" got {list(images.shape)} {images.dtype}"
        )
    if images.device != like.device:
        raise ValueError(f"model: images of task {task.name} must be on the model's {like.device}, got {images.device}")
    if images.dtype != like.dtype and not torch.is_autocast_enabled(images.device.type):
        raise ValueError(f"model: images of task {task.name} must be the model's {like.dtype}, got {images.dtype}")
    return images
