"""Tasks: names, classes, kinds, and the size of their images."""

from dataclasses import dataclass

IGNORE = 255  # marks a pixel without a label, edge or saliency


@dataclass(frozen=True)
class TaskKind:
    """Outputs of the tasks of a kind: values of an image, or of each of its pixels (dense); and how many."""

    dense: bool
    values: int | None = None  # None: as many as the task says


TASK_KINDS = {
    "classification": TaskKind(dense=False),
    "segmentation": TaskKind(dense=True),
    "depth": TaskKind(dense=True, values=1),
    "normals": TaskKind(dense=True, values=3),
    "edges": TaskKind(dense=True, values=1),
    "saliency": TaskKind(dense=True, values=1),
}  # and those that `den.dag.register_kind` adds


@dataclass(frozen=True)
class Task:
    """A task: a label for an image, or a value for each of its pixels (a dense task).

    Args:
        name: unique within a model.
        classes: number of classes, or of values predicted: 1 of depth, edges and saliency, 3 of normals.
        size: side of its square images, in pixels; with `width` their height.
        channels: channels of its images.
        kind: one of `TASK_KINDS`.
        width: of the images of a dense task that are not square.

    Raises:
        ValueError: an empty name, a count below 1, an unknown kind, classes that the kind does not have, images that
            are not square of a task that is not dense.
    """

    name: str
    classes: int
    size: int
    channels: int = 3
    kind: str = "classification"
    width: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"Task: name must be a non-empty string, got {self.name!r}")
        for field in ("classes", "size", "channels", *(["width"] if self.width is not None else [])):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Task: {field} of {self.name!r} must be a whole number of at least 1, got {value!r}")
        if self.kind not in TASK_KINDS:
            raise ValueError(
                f"Task: kind of {self.name!r} must be one of {', '.join(TASK_KINDS)}, got {self.kind!r}; your own kinds"
                " have to be registered first (den.dag.register_kind)"
            )
        fixed = TASK_KINDS[self.kind].values or self.classes
        if self.classes != fixed:
            raise ValueError(f"Task: classes of {self.name!r} must be {fixed} for {self.kind}, got {self.classes}")
        if not self.dense and self.width not in (None, self.size):
            raise ValueError(f"Task: width of {self.name!r} must be its size {self.size}, got {self.width}")

    @property
    def dense(self) -> bool:
        """True where every pixel has a target."""
        return TASK_KINDS[self.kind].dense

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its images."""
        return self.channels, self.size, self.width or self.size
