"""Tasks: what is to be told apart, and the images it is told apart in."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A classification task.

    Args:
        name: unique within a model.
        classes: number of classes.
        size: side of its square images, in pixels.
        channels: channels of its images.

    Raises:
        ValueError: an empty name, or a count below 1.
    """

    name: str
    classes: int
    size: int
    channels: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Task: name must be a non-empty string, got {self.name!r}")
        for field in ("classes", "size", "channels"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Task: {field} of {self.name!r} must be a whole number of at least 1, got {value!r}")


def find_task(task: str | int | Task, tasks: Sequence[Task]) -> int:
    """Position of ``task`` (a name, a position or the task itself) in ``tasks``.

    Raises:
        ValueError: not one of ``tasks``.
    """
    if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(tasks):
        return task
    for position, known in enumerate(tasks):
        if task == known or task == known.name:
            return position
    known_names = ", ".join(f"{position} {known.name!r}" for position, known in enumerate(tasks))
    raise ValueError(f"model: task must be one of {known_names}, got {task!r}")
