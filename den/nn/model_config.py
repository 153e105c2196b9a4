"""The configuration of a Deep Elastic Network: plain data that JSON can hold."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from den.nn.backbones import FAMILIES, Backbone, named_backbone
from den.nn.block_lists import Stages
from den.nn.blocks import BlockShape
from den.nn.ends import KERNEL
from den.nn.levels import level_fractions
from den.nn.selector import SelectorConfig, default_selector
from den.nn.tasks import Task
from den.support.settings import from_dict, to_dict


@dataclass(frozen=True)
class ModelConfig:
    """A network, complete and JSON-able: `ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config`.

    Args:
        tasks: at least one; names are unique.
        backbone: a name such as `wrn32_4`, `resnext29_8x64d` or `vgg16`, which gives the stages, the stem and
            the kind of block (`den.nn.backbones.named_backbone`); or a family, `wrn` or `resnet`, where
            `stages` are given.
        stages: (channels, blocks) of each stage, overriding the name's; those of residual networks never shrink.
        stem: channels of the stems; None: the name's (16 for wrn, 64 for resnet). 0, of vgg19 and simpleconvnet: the
            blocks read the images, which all tasks then have in the same number of channels.
        levels: L, at least 2; what level 0 keeps is in `den.nn.levels`.
        trunk_size: side of the map that the stems hand to the first block; None: 32, or the side of the largest images
            where these are larger and the blocks read them.
        selector: None: `den.nn.selector.default_selector`.
        joint: the tasks are labels of the same images: they share the stem, and the selector chooses once for all.

    Raises:
        ValueError: a value that does not fit, saying what must hold.
    """

    tasks: tuple[Task, ...]
    backbone: str = "wrn32_4"
    stages: Stages | None = None
    stem: int | None = None
    levels: int = 4
    trunk_size: int | None = None
    selector: SelectorConfig | None = None
    joint: bool = False

    def __post_init__(self) -> None:
        tasks = tuple(self.tasks)
        names = [task.name for task in tasks]
        if not tasks or len(set(names)) != len(names):
            raise ValueError(f"ModelConfig: tasks must be at least one, of unique names, got {names}")
        if others := [task.name for task in tasks if task.kind != "classification"]:
            raise ValueError(f"ModelConfig: tasks must be classification tasks, got {', '.join(others)}")
        object.__setattr__(self, "tasks", tasks)
        for name, value in zip(("stages", "stem", "trunk_size"), self.trunk, strict=True):
            object.__setattr__(self, name, value)
        self._check()
        object.__setattr__(self, "selector", self.chosen_selector)

    def _check(self) -> None:
        least_stem = 0 if self.layout.fully_connected is not None else 1
        stages, stem, trunk_size = self.trunk
        if trunk_size < 1 or stem < least_stem or min(blocks for _, blocks in stages) < 1:
            raise ValueError(
                f"ModelConfig: trunk_size and the blocks of every stage must be at least 1, stem at least {least_stem},"
                f" got {trunk_size}, {stages}, {stem}"
            )
        channels = {task.channels for task in self.tasks}
        if self.joint and len({(task.size, task.channels) for task in self.tasks}) > 1:
            raise ValueError(f"ModelConfig: tasks must be labels of the same images to be joint, got {self.tasks}")
        if not stem and len(channels) > 1:
            raise ValueError(
                f"ModelConfig: tasks must have images of as many channels as each other for {self.backbone},"
                f" whose blocks read them, got {sorted(channels)}"
            )
        for shape in self.shapes:
            shape.groups(self.levels)

    @property
    def layout(self) -> Backbone:
        """The backbone that the name stands for."""
        if self.backbone == "resnet50" and self.stages and self.stages[0][0] == 64:
            return FAMILIES["resnet"]  # of older checkpoints: the name stood for basic blocks
        return FAMILIES.get(self.backbone) or named_backbone(self.backbone)

    @property
    def trunk(self) -> tuple[Stages, int, int]:
        """Stages, stem channels and side of the first block's map, each the backbone's own where it is not given."""
        layout = self.layout
        stages = layout.stages if self.stages is None else self.stages
        if not stages:
            raise ValueError(f"ModelConfig: backbone {self.backbone!r} needs stages, or a size, such as wrn32_4")
        stem = layout.stem if self.stem is None else self.stem
        largest = 0 if stem else max(task.size for task in self.tasks)
        trunk_size = max(32, largest) if self.trunk_size is None else self.trunk_size
        return tuple((channels, blocks) for channels, blocks in stages), stem, trunk_size

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        """The blocks, in order."""
        stages, stem, trunk_size = self.trunk
        return self.layout.shapes(stages, stem or self.tasks[0].channels, trunk_size)

    @property
    def level_fractions(self) -> tuple[float, ...]:
        """Share of a block's hidden channels that each level keeps, before rounding down to channels or groups."""
        return level_fractions(self.levels, self.shapes[0].lowest)

    @property
    def selector_size(self) -> int:
        """Side of the map that the selector's first convolution halves: the trunk's. Where blocks read the images, it
        is 32, or more as far as a 7x7 window needs to leave out no pixel of the images."""
        _, stem, trunk_size = self.trunk
        return trunk_size if stem else min(trunk_size, max(32, -(-2 * trunk_size // KERNEL)))

    @property
    def chosen_selector(self) -> SelectorConfig:
        """The selector given, or the default one for these blocks."""
        selector = self.selector or default_selector(self.tasks, self.shapes, self.selector_size)
        return replace(selector, shared_head=True) if self.joint else selector

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """The config of `to_dict`'s output.

        Raises:
            ValueError: a key that is unknown or missing, named with the known ones; values that do not fit.
        """
        return from_dict(cls, dict(data), "ModelConfig")
