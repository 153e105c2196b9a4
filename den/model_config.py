"""What a Deep Elastic Network is made of, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from den.backbones import DEFAULT_STEM, BlockShape, Stages, block_shapes, named_backbone
from den.levels import level_groups
from den.selector import SelectorConfig, default_selector
from den.tasks import Task

Config = TypeVar("Config")


@dataclass(frozen=True)
class ModelConfig:
    """A network, complete and JSON-able: ``ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config``.

    Args:
        tasks: at least one; names are unique.
        backbone: a name such as ``wrn32_4`` or ``resnet42``, which gives the stages and the stem; or a family,
            ``wrn`` or ``resnet``, where ``stages`` are given.
        stages: (channels, blocks) of each stage, overriding the name's; channels never shrink.
        stem: channels of the stems; None: the name's (16 for wrn, 64 for resnet).
        levels: L, at least 2; level 0 is the shortcut.
        trunk_size: side of the map that the stems hand to the first block.
        selector: None: :func:`den.selector.default_selector`.

    Raises:
        ValueError: a value that does not fit, saying what must hold.
    """

    tasks: tuple[Task, ...]
    backbone: str = "wrn32_4"
    stages: Stages | None = None
    stem: int | None = None
    levels: int = 4
    trunk_size: int = 32
    selector: SelectorConfig | None = None

    def __post_init__(self) -> None:
        tasks = tuple(self.tasks)
        names = [task.name for task in tasks]
        if not tasks or len(set(names)) != len(names):
            raise ValueError(f"ModelConfig: tasks must be at least one, of unique names, got {names}")
        if dense := [task.name for task in tasks if task.dense]:
            raise ValueError(f"ModelConfig: tasks must be classification tasks, got {', '.join(dense)}")
        stages, stem = self.stages, self.stem
        if stages is None or self.backbone not in DEFAULT_STEM:
            if self.backbone in DEFAULT_STEM:
                raise ValueError(f"ModelConfig: backbone {self.backbone!r} needs stages, or a size, such as wrn32_4")
            named = named_backbone(self.backbone)
            stages, stem = stages or named.stages, stem or named.stem
        for name, value in {
            "tasks": tasks,
            "stages": tuple((channels, blocks) for channels, blocks in stages),
            "stem": stem or DEFAULT_STEM[self.backbone],
        }.items():
            object.__setattr__(self, name, value)
        self._check()
        if self.selector is None:
            object.__setattr__(self, "selector", default_selector(tasks, self.shapes))

    def _check(self) -> None:
        if self.trunk_size < 1 or self.stem < 1 or not self.stages or min(blocks for _, blocks in self.stages) < 1:
            raise ValueError(
                "ModelConfig: trunk_size, stem and the blocks of every stage must be at least 1,"
                f" got {self.trunk_size}, {self.stem}, {self.stages}"
            )
        widths = [self.stem, *(channels for channels, _ in self.stages)]
        if sorted(widths) != widths:
            raise ValueError(f"ModelConfig: channels must not shrink from the stem through the stages, got {widths}")
        for channels, _ in self.stages:
            level_groups(channels, self.levels)

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        """The blocks, in order."""
        return block_shapes(self.stages, self.stem, self.trunk_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """The config of :meth:`to_dict`'s output.

        Raises:
            ValueError: a key that is unknown or missing, named with the known ones; values that do not fit.
        """
        values = dict(data)
        values["tasks"] = tuple(_build(Task, task) for task in values.get("tasks", ()))
        if values.get("selector") is not None:
            values["selector"] = _build(SelectorConfig, values["selector"])
        return _build(cls, values)


def _build(kind: type[Config], data: Mapping[str, Any]) -> Config:
    known = [field.name for field in fields(kind)]
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f"{kind.__name__}: keys must be among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from error


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down, as JSON has them."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
