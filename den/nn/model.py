"""Deep Elastic Networks: an estimator of many structures and a selector that chooses one for each image.

Ahn, Kim, Oh: Deep Elastic Networks with Model Selection for Multi-Task Learning, ICCV 2019.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from den.nn.blocks import BottleneckBlock, ElasticBlock
from den.nn.blocks.constant import ConstantBlock
from den.nn.blocks.residual import FoldedBlock
from den.nn.estimator import Estimator
from den.nn.model_config import ModelConfig
from den.nn.selector import Selector, SelectorConfig
from den.nn.task_batch import Images, TaskBatch, Tasks, task_batch
from den.nn.tasks import Task

Logits = Tensor | list[Tensor]


class DeepElasticNetwork(nn.Module):
    """`f(x; z, t)` with `z = arg max g(x)`: every image runs through the blocks at the levels chosen for it.

    `images` and `task` come in three forms, everywhere:

    - one task: [B, C, S, S] and its name, position or `Task`;
    - a mixed batch: a list with one such tensor per task, of that task's size, and a list of the tasks; the stems and
      heads run per task, the blocks once over all of them;
    - tasks per instance: [B, C, S, S] and integer [B], where all the tasks share size and channels.

    Levels [B, N] and selector logits [B, N, L] have one row per image, in the order given (for a list: one part after
    the other).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tasks = config.tasks
        self.positions = {task.name: position for position, task in enumerate(config.tasks)}
        self.levels = config.levels
        self.estimator = Estimator(config)
        self.num_blocks = self.estimator.num_blocks
        self.selector = self.new_selector()

    def new_selector(self) -> Selector:
        """A selector as this network's is before training."""
        config = self.config
        _, stem, _ = config.trunk
        return Selector(
            config.tasks,
            config.chosen_selector,
            self.num_blocks,
            config.levels,
            config.selector_size,
            stem,
            config.joint,
        )

    def forward(self, images: Images, task: Tasks, *, return_levels: bool = False) -> Logits | tuple[Logits, Tensor]:
        """Logits of `images` at the levels that the selector chooses; with `return_levels` also these.

        Returns:
            [B, classes] of one task; a list of them for a list of images; for tasks per instance [B, most classes],
            -inf in the classes that an instance's task does not have. With `return_levels`: (logits, levels [B, N]).

        Raises:
            ValueError: images or task that do not fit.
        """
        batch = task_batch(images, task, self.tasks, like=self.estimator.heads[0].weight)
        stem = self.estimator.stem(batch) if self.selector.config.reads == "stem" else None
        # Asked before the selector runs, which leaves little of Python in the processor's caches.
        network = self.estimator.one_call(batch) if stem is None else None
        levels = self.selector.choose(batch, stem)
        logits = self.estimator.run(batch, levels, stem, network)
        return (logits, batch.restore(levels)) if return_levels else logits

    def selector_logits(self, images: Images, task: Tasks) -> Tensor:
        """Logits [B, N, L] of `C_i(l; x)`, the distribution over the levels of every block (paper, eq. 2)."""
        return self.choose(self.selector, images, task)

    def choose(self, selector: Selector, images: Images, task: Tasks) -> Tensor:
        """Logits [B, N, L] of a selector of this network's kind, which reads the network's stems if it reads any."""
        batch, stem = self.read(selector, images, task)
        return batch.restore(selector.run(batch, stem))

    def read(self, selector: Selector, images: Images, task: Tasks) -> tuple[TaskBatch, Tensor | None]:
        """The checked batch, and the maps of the network's stems where the selector reads them."""
        batch = task_batch(images, task, self.tasks, like=self.estimator.heads[0].weight)
        if selector.config.reads != "stem":
            return batch, None
        with torch.no_grad():
            return batch, self.estimator.stem(batch)

    def select(self, images: Images, task: Tasks) -> Tensor:
        """The most probable structure of each image: int64 [B, N] in 0..L-1."""
        batch, stem = self.read(self.selector, images, task)
        return batch.restore(self.selector.choose(batch, stem))

    def freeze(self) -> "DeepElasticNetwork":
        """Give up training, in place and for good: each block's weights are kept only as its kernel reads them.

        Saves the parameters of the residual blocks, which otherwise stay beside their packed copies, where a direct CPU
        kernel runs them; changes nothing else, nor anywhere else. Save the network first: a frozen one has no
        `state_dict`, and must run without gradients. Returns the network, in eval mode.
        """
        self.eval()
        with torch.no_grad():
            for block in self.estimator.blocks:
                if isinstance(block, ElasticBlock | BottleneckBlock):
                    block.freeze()
        return self


def for_export(network: DeepElasticNetwork) -> DeepElasticNetwork:
    """A copy for inference alone whose residual blocks are single ops on folded weights: constants of what records it.

    What `torch.export` and AOTInductor run about as fast as the network itself runs. It shares nothing with the
    network, has no state_dict worth saving, and is none that `den_kernels.masked` or ONNX can take.

    Raises ValueError for a network that is frozen.
    """
    if any(getattr(block, "_frozen", None) is not None for block in network.estimator.blocks):
        raise ValueError("for_export: network must not be frozen, got one that freeze() changed")
    own = copy.deepcopy(network).eval().requires_grad_(False)
    with torch.no_grad():
        for index, block in enumerate(own.estimator.blocks):
            if isinstance(block, FoldedBlock):
                own.estimator.blocks[index] = ConstantBlock(block)
    return own


def create_model(
    name: str,
    tasks: Sequence[Task],
    levels: int = 4,
    *,
    trunk_size: int | None = None,
    selector: SelectorConfig | None = None,
) -> DeepElasticNetwork:
    """A network of a named size: one of `den.nn.backbones.BACKBONES`, such as `wrn32_4`, `resnet42`,
    `vgg16`, `resnext29_8x64d`, `simpleconvnet`; any `wrn{l}_{r}`, `resnet{l}` or `resnext{l}_{c}x{d}d`.

    The arguments are `ModelConfig`'s.

    Raises:
        ValueError: a name, depth, task, size or number of levels that does not fit.
    """
    return DeepElasticNetwork(
        ModelConfig(tuple(tasks), backbone=name, levels=levels, trunk_size=trunk_size, selector=selector)
    )
