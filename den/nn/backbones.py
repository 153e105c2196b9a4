"""Backbones as data: which blocks a network has between its stems and its heads."""

import re
from dataclasses import dataclass
from functools import partial

from den.nn.block_lists import Shapes, Stages, block_shapes, bottleneck_shapes, pair_shapes, with_linear_pair
from den.nn.own_backbones import own_backbone


@dataclass(frozen=True)
class Backbone:
    """Blocks behind a stem per task, and what stands between the last of them and the heads.

    Attributes:
        stages: channels and blocks (of pairs: convolutions) of each stage.
        stem: channels of the stems; 0: none, the blocks read the images.
        shapes: the blocks in order, of (stages, channels that the first block reads, side of the map that it reads).
        stem_kernel: side of the stems' convolution.
        fully_connected: widths of the layers before the heads, which all tasks share and which read the flattened
            map, () being none; None: batch norm, ReLU and global average pooling, as residual networks have.
        dropout: after each of these layers, while training.
    """

    stages: Stages
    stem: int
    shapes: Shapes = block_shapes
    stem_kernel: int = 7
    fully_connected: tuple[int, ...] | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if any(len(stage) != 2 or min(stage) < 1 for stage in self.stages) or self.stem < 0:
            raise ValueError(
                "Backbone: stages must be (channels, blocks), each at least 1, and stem at least 0, got"
                f" {self.stages}, {self.stem}"
            )


def _blocks_per_stage(name: str, depth: int, stages: int, convolutions: int = 2) -> int:
    """`n` of `depth = convolutions * stages * n + 2`: `convolutions` a block, the stem and the head."""
    step = convolutions * stages
    blocks, rest = divmod(depth - 2, step)
    if blocks < 1 or rest:
        nearest = sorted({step * max(1, n) + 2 for n in (blocks, blocks + 1)})
        count = {2: "two", 3: "three"}[convolutions]
        raise ValueError(
            f"{name}: depth must be {step} n + 2 ({count} convolutions a block, {stages} stages of n blocks, stem,"
            f" head), got {depth}; nearest: {' and '.join(map(str, nearest))}"
        )
    return blocks


def wide_resnet(depth: int, width: int) -> Backbone:
    """WRN-l-r of the paper: three stages of 16r, 32r, 64r channels, l = 6n + 2 (WRN-32-4: n = 5), stem of 16.

    Zagoruyko and Komodakis count l = 6n + 4, with the 1x1 convolutions of two shortcuts; ours have no convolution.

    Raises:
        ValueError: a depth that does not fit, naming the nearest that do; a width below 1.
    """
    if width < 1:
        raise ValueError(f"wide_resnet: width must be at least 1, got {width}")
    blocks = _blocks_per_stage("wide_resnet", depth, 3)
    return Backbone(tuple((base * width, blocks) for base in (16, 32, 64)), stem=16)


def resnet(depth: int) -> Backbone:
    """ResNet-l of the paper: four stages of 64, 128, 256, 512 channels, l = 8n + 2 (ResNet-42: n = 5), stem of 64.

    Every stage has the same number of basic blocks; give `stages` for another split, such as ResNet-34's 3, 4, 6, 3.

    Raises:
        ValueError: a depth that does not fit, naming the nearest that do.
    """
    blocks = _blocks_per_stage("resnet", depth, 4)
    return Backbone(tuple((channels, blocks) for channels in (64, 128, 256, 512)), stem=64)


def resnext(depth: int, cardinality: int, group_depth: int, expansion: int = 4) -> Backbone:
    """ResNeXt-l (c x d): stages of 64e, 128e, 256e channels, c d, 2 c d, 4 c d hidden ones, l = 9n + 2, 3x3 stem of 64.

    Xie et al. (CVPR 2017, section 5.2) have e = 4. The counts that the Deep Elastic Networks paper prints are those of
    e = 1, named `resnext{l}_{c}x{d}d_narrow` here. Weights of the block convolutions (shortcuts have none):

    =====================  ==========  ===========  =====
    ResNeXt-29             e = 4       e = 1        paper
    =====================  ==========  ===========  =====
    8x64d                  33,685,504  22,380,544   22.4M
    4x64d                  16,842,752  11,190,272   11.2M
    2x64d                   8,421,376   5,595,136    5.6M
    =====================  ==========  ===========  =====

    Raises:
        ValueError: a depth that does not fit, naming the nearest that do; a cardinality or group depth below 1.
    """
    if min(cardinality, group_depth) < 1:
        raise ValueError(
            f"resnext: cardinality and group depth must be at least 1, got {cardinality} and {group_depth}"
        )
    blocks = _blocks_per_stage("resnext", depth, 3, convolutions=3)
    stages = tuple((base * expansion, blocks) for base in (64, 128, 256))
    return Backbone(stages, 64, partial(bottleneck_shapes, cardinality=cardinality, depth=group_depth), stem_kernel=3)


def bottleneck_resnet(blocks: tuple[int, ...]) -> Backbone:
    """ResNet of bottleneck blocks (He et al., CVPR 2016): stages of 256, 512, 1024, 2048 channels, a quarter hidden."""
    stages = tuple((256 * 2**stage, count) for stage, count in enumerate(blocks))
    return Backbone(stages, 64, partial(bottleneck_shapes, cardinality=1, depth=64))


def vgg(stages: Stages, stem: int, elastic_layers: bool = False) -> Backbone:
    """VGG (Simonyan and Zisserman, ICLR 2015) with batch norm: pairs of 3x3 convolutions, two layers of 4096.

    An odd number of convolutions leaves the first to the stem: `vgg16` is that convolution, per task, and six pairs;
    `vgg19` is eight pairs that read the images. The 38.9M parameters that the Deep Elastic Networks paper prints for
    its VGG-16 are those of sixteen convolutions, VGG-19's; thirteen, the standard VGG-16, have 33.6M (both with the
    layers of 4096, for maps of 32 x 32).

    elastic_layers: the layers of 4096 are a block, too, whose hidden features a level halves as the others' channels;
    so the paper's, whose networks of half the channels have half the parameters (19.4M of NestedNet).
    """
    width, dropout = 4096, 0.5
    if elastic_layers:
        blocks = with_linear_pair(pair_shapes, width, width, dropout)
        return Backbone(stages, stem, blocks, stem_kernel=3, fully_connected=())
    return Backbone(stages, stem, pair_shapes, stem_kernel=3, fully_connected=(width, width), dropout=dropout)


VGG16: Stages = ((64, 1), (128, 2), (256, 3), (512, 3), (512, 3))  # behind a stem of 64
VGG19: Stages = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


BACKBONES: dict[str, Backbone] = {
    "wrn14_1": wide_resnet(14, 1),
    "wrn14_2": wide_resnet(14, 2),
    "wrn32_4": wide_resnet(32, 4),
    "resnet18": resnet(18),
    "resnet42": resnet(42),
    "resnet50": bottleneck_resnet((3, 4, 6, 3)),
    "resnet50_bottleneck": bottleneck_resnet((3, 4, 6, 3)),  # its name of before, when resnet50 was not built so
    "resnext29_8x64d": resnext(29, 8, 64),
    "resnext29_4x64d": resnext(29, 4, 64),
    "resnext29_2x64d": resnext(29, 2, 64),
    "resnext29_8x64d_narrow": resnext(29, 8, 64, expansion=1),
    "resnext29_4x64d_narrow": resnext(29, 4, 64, expansion=1),
    "resnext29_2x64d_narrow": resnext(29, 2, 64, expansion=1),
    # what has about the parameters and FLOPs that the Deep Elastic Networks paper prints for images of 224 x 224
    "simpleconvnet_strided": Backbone(
        ((32, 1),) * 4, 0, partial(pair_shapes, strided=True), fully_connected=(128, 128)
    ),
    "vgg16": vgg(VGG16, stem=64),
    "vgg16_elastic_fc": vgg(VGG16, stem=64, elastic_layers=True),
    "vgg19": vgg(VGG19, stem=0),
    "vgg19_elastic_fc": vgg(VGG19, stem=0, elastic_layers=True),
    "simpleconvnet": Backbone(((32, 1),) * 4, 0, pair_shapes, fully_connected=(128, 128)),
    "simpleconvnet_elastic_fc": Backbone(
        ((32, 1),) * 4, 0, with_linear_pair(pair_shapes, 128, 128), fully_connected=()
    ),
}
"""Backbones that have a name of their own; `named_backbone` knows more."""

FAMILIES = {"wrn": Backbone((), 16), "resnet": Backbone((), 64)}  # where the stages are given one by one


def named_backbone(name: str) -> Backbone:
    """The backbone of a name: one of `BACKBONES`, or any `wrn{l}_{r}`, `resnet{l}`, `resnext{l}_{c}x{d}d`, or one of
    other people's, `FILE.py:NAME` or an entry point (`den.nn.own_backbones`).

    Raises:
        ValueError: another name, with those that there are; a depth that does not fit; a file that gives no backbone.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        return wide_resnet(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"resnet(\d+)", name):
        return resnet(int(match[1]))
    if match := re.fullmatch(r"resnext(\d+)_(\d+)x(\d+)d(_narrow)?", name):
        return resnext(int(match[1]), int(match[2]), int(match[3]), expansion=1 if match[4] else 4)
    if (own := own_backbone(name)) is not None:
        if not isinstance(own, Backbone):
            raise ValueError(f"backbone: {name} must be a den.Backbone, got {type(own).__name__}")
        return own
    raise ValueError(
        f"backbone must be wrn{{l}}_{{r}}, resnet{{l}}, resnext{{l}}_{{c}}x{{d}}d(_narrow), FILE.py:NAME, or one of"
        f" {', '.join(BACKBONES)}, got {name!r}"
    )
