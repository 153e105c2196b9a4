"""Typed settings of `den train` and of the demonstration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from den.support.limits import SEED, Range, check_ranges
from den.support.run_config import RunConfig
from den.support.settings import from_dict as from_dict  # old names of these three; they go with version 0.3
from den.support.settings import read_config as read_config
from den.support.settings import to_dict as to_dict

Mode = Literal[
    "den", "dense", "random", "nestednet", "packnet", "routing", "cross-stitch", "blockdrop", "adashare"
]  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """Settings of the data."""

    tasks: tuple[str, ...] = ("digits", "fashion")
    """Image sets, one task each: digits, fashion, cifar10, cifar100, cifar100-coarse, stl10, tinyimagenet, tin50,
    imagenet50, miniimagenet; tin50-0 to tin50-9 are tasks of five classes; stl10@32 is scaled to 32x32 pixels."""
    shares: Annotated[tuple[float, ...], Range(0, open_low=True)] = ()
    """Share of every batch that each task gets, in the order of tasks; empty: equal shares."""
    root: Annotated[Path | None, tyro.conf.arg(aliases=("--data-root",))] = None
    """Folder of the sets that do not come with the install."""
    share: Annotated[float, tyro.conf.arg(aliases=("--share",)), Range(1e-6, 1)] = 1.0
    """Share of every training set that is used, of every class alike, chosen by the seed."""
    joint: bool = False
    """The tasks are labels of the same images (cifar100 and cifar100-coarse): an image is drawn once, with all its
    labels, has one stem and one structure, and a head for each.  Methods that give each task a structure of its own
    (nestednet, packnet, routing, cross-stitch, blockdrop, adashare) take the labels as tasks apart all the same."""
    batch_size: Annotated[int, Range(1)] = 128
    """Images in a batch, all tasks together."""
    validation: Annotated[float, Range(0, 0.9)] = 0.05
    """Share of every training set that is held out: epochs are measured on it and "best" is chosen by it.  0: train on
    everything, measure epochs on the test set, and let "best" be the last."""


@dataclass(frozen=True)
class NetworkConfig:
    """Settings of the network."""

    backbone: str = "wrn14_1"
    """Name of the backbone: wrn{l}_{r}, resnet{l}, resnext{l}_{c}x{d}d, resnet50, vgg16, vgg19, simpleconvnet; with
    elastic fully connected layers vgg16_elastic_fc, vgg19_elastic_fc; or FILE.py:NAME, a den.Backbone of your own."""
    stages: Annotated[tuple[tuple[int, int], ...], Range(1)] = ()
    """Channels and blocks of each stage, overriding the name's; empty: the name's."""
    stem: Annotated[int | None, Range(0)] = None
    """Channels of the stems; None: the name's."""
    levels: Annotated[int, Range(2, 16)] = 4
    """Levels of every block: 2, and as many more as its channels can be halved."""
    trunk_size: Annotated[int | None, Range(1)] = 16
    """Side in pixels of the maps that the first block sees; None: 32, or the images' own where there is no stem."""
    selector_channels: Annotated[tuple[int, ...], Range(1)] = ()
    """Channels of the selector's convolutions; empty: as wide as its share of the FLOPs allows."""
    start: Literal["he", "xavier"] = "he"
    """How weights begin: as He et al. for ReLU, or all of both networks as Glorot and Bengio, which the paper names."""
    selector: Literal["small", "paper"] = "small"
    """small: plain convolutions.  paper: residual blocks, of the size that the paper gives for the backbone."""
    selector_head: Literal["own", "shared"] = "own"
    """The selector's last norm and layer: of each task its own, or one for all tasks, as in the authors' code."""
    selector_reads: Literal["images", "stem"] = "images"
    """What the selector reads: the images, through stems of its own, or what the estimator's stems make of them."""
    selector_start: Literal["near-uniform", "xavier"] = "near-uniform"
    """How the selector's last layer begins: so small that all levels are as likely, or as other layers do."""


@dataclass(frozen=True)
class PhaseConfig:
    """Settings of one phase: training of one of the two networks while the other rests."""

    steps: Annotated[int, Range(0)]
    """Updates; with until="converge" the most there may be."""
    rate: Annotated[float, Range(0)]
    """Learning rate at the start of the phase."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """cosine: falls to 0 within the phase.  step: divided by 10 after 1/2 and 3/4 of the phase.  constant: stays."""
    until: Literal["steps", "converge"] = "steps"
    """converge: end when the mean training loss of an epoch has not fallen for `patience` epochs."""
    patience: Annotated[int, Range(1)] = 3
    """Epochs without a fall after which a phase has converged."""
    tolerance: Annotated[float, Range(0, 1)] = 0.005
    """Relative fall of the loss that counts as one."""


@dataclass(frozen=True)
class EstimatorTraining:
    """Settings of the estimator's training: SGD with Nesterov momentum."""

    first: PhaseConfig = PhaseConfig(steps=1500, rate=0.1)
    """Stage 1, on structures of the initial distribution."""
    later: PhaseConfig = PhaseConfig(steps=500, rate=0.03)
    """Stages 2 and on, on structures of the selector."""
    finish: PhaseConfig = PhaseConfig(steps=0, rate=0.01)
    """After the last stage, on structures of the selector (the authors' schedule ends so); steps=0: none."""
    decay: Annotated[float, Range(0, 1)] = 0.5
    """The rate of `later` is multiplied by this after every stage (Algorithm 1, line 9)."""
    decay_at: Annotated[tuple[int, ...], Range(1)] = ()
    """Stages that begin with such a decay; empty: all after the second."""
    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    """Nesterov momentum."""
    weight_decay: Annotated[float, Range(0)] = 1e-4
    """Weight decay of the convolution and head weights."""
    decay_all: bool = True
    """Let weight decay act on biases and norm parameters too."""
    tau: Annotated[float, Range(0, 1)] = 0.75
    """Equation 8: probability of the full structure; otherwise any structure, all alike."""
    initial: Literal["equation8", "uniform", "selector"] = "equation8"
    """Initial distribution of structures.  uniform: any structure, all alike.  selector: drawn from it, untrained."""
    initial_share: Annotated[float, Range(0, 1)] = 0.3
    """Share of structures that `later` and `finish` still draw from the initial distribution (of "selector": from the
    selector as it then is), so that the other levels stay alive."""
    structures: Literal["sample", "argmax"] = "sample"
    """Structures that the selector gives for training the estimator: drawn from its distribution, or the likeliest."""
    distill: Annotated[float, Range(0, 1)] = 0.0
    """Weight of what the full structure, or `teacher`, teaches the structures that train; the rest is that of the
    labels.  0: nothing (ours)."""
    teacher: Path | None = None
    """With distill: run folder whose network teaches all images at its full structure, and does not learn."""
    distill_share: Annotated[float, Range(0, 1, open_low=True)] = 0.25
    """With distill and no teacher: share of the images that also run at the full structure, which learns their labels
    and teaches."""
    distill_temperature: Annotated[float, Range(0.1, 100)] = 2.0
    """With distill: temperature that both answers are softened by."""


@dataclass(frozen=True)
class SelectorTraining:
    """Settings of the selector's training: REINFORCE with Adam."""

    phase: PhaseConfig = PhaseConfig(steps=500, rate=1e-3)
    """Every stage's selector phase."""
    decay: Annotated[float, Range(0, 1)] = 0.5
    """Its rate is multiplied by this after every stage (Algorithm 1, line 13)."""
    decay_at: Annotated[tuple[int, ...], Range(1)] = ()
    """Stages that begin with such a decay; empty: all after the first."""
    rho: Annotated[float, Range(0)] = 0.3
    """Weight of the sparsity term S(z) (equation 5): larger means fewer FLOPs."""
    penalty: Literal["squared", "l1"] = "squared"
    """S(z): rho times the square of the mean share of the blocks that a structure uses (equation 5), or times that
    share."""
    budget: Annotated[float | None, Range(0.01, 1)] = None
    """Share of the full structure's FLOPs that the likeliest structures of every task are to cost: rho is made larger
    for a task that costs more, smaller for one that costs less.  None: rho stays, and the tasks cost what they cost."""
    samples: Annotated[int, Range(1)] = 4
    """|Z|: structures sampled for every image."""
    late_samples: Annotated[int | None, Range(1)] = None
    """|Z| in the second half of the selector's updates; None: as in the first."""
    auxiliary: Annotated[float, Range(0)] = 0.0
    """Weight of an auxiliary loss: a head for training alone predicts what sampled structures cost; 0: none (ours)."""
    baseline: Literal["leave-one-out", "running-mean", "none"] = "leave-one-out"
    """Baseline of a sample's cost: the mean of the other samples of its image; a running mean of its task; none."""
    entropy_bonus: Annotated[float, Range(0)] = 0.01
    """Weight of the entropy that keeps the structures varied; falls linearly to 0 over the selector's phases."""
    exploration: Annotated[float, Range(0, 1)] = 0.99
    """A sample is drawn at random with probability exploration ** step; 0: never."""


@dataclass(frozen=True)
class MethodConfig:
    """Settings of the compared methods; other methods ignore them."""

    updates: Literal["first", "estimator", "flops"] = "first"
    """How long they train their network.  first: estimator.first.  estimator: as many updates as the estimator of a
    Deep Elastic Network gets in all (what den train does unless told otherwise).  flops: as many as cost the FLOPs of
    these."""
    chosen_flops: Annotated[float, Range(0, 1)] = 0.5
    """With updates "flops": share of the full FLOPs that the structures which a selector chooses are taken to cost."""
    levels: Annotated[tuple[int, ...], Range(0)] = ()
    """NestedNet, PackNet*: the level of each task, in the order of tasks, no two alike.  Empty: the last task gets the
    highest, the one before it the next lower, and so on."""
    random_flops: Annotated[float | None, Range(0, 1)] = None
    """Random selector: share of the full structure's FLOPs that its structures cost in the mean.  None: what uniform
    structures cost."""
    routing_rate: Annotated[float, Range(0)] = 0.02
    """Routing: learning rate of the policy tables."""
    routing_memory: Annotated[float, Range(0, 1)] = 0.05
    """Routing: weight of the newest batch in the running mean of the returns."""
    stitch: Annotated[float, Range(0, 1)] = 0.1
    """Cross-stitch: initial weight of the other tasks' copies together; a copy's own has the rest."""
    stitch_factor: Annotated[float, Range(0)] = 10.0
    """Cross-stitch: learning rate of the stitches over that of the other weights."""
    drop_bound: Annotated[float, Range(0.5, 1)] = 0.8
    """BlockDrop: alpha of the bounded sampling, alpha s + (1 - alpha) (1 - s)."""
    drop_penalty: Annotated[float, Range(0)] = 1.0
    """BlockDrop: gamma, what a wrong answer costs while the policy alone trains."""
    drop_penalty_joint: Annotated[float, Range(0)] = 5.0
    """BlockDrop: gamma while policy and network train together (estimator.finish)."""
    drop_curriculum: Annotated[float, Range(0, 1)] = 0.5
    """BlockDrop: share of the policy's phase after which all blocks may be dropped; before, only the last ones."""
    share_rounds: Annotated[int, Range(1)] = 10
    """AdaShare: rounds of the search (selector.phase); each trains the weights and then the policy."""
    share_temperature: Annotated[float, Range(0.01)] = 5.0
    """AdaShare: temperature of the Gumbel-softmax in the first round."""
    share_cooling: Annotated[float, Range(0.01, 1)] = 0.965
    """AdaShare: what every round multiplies it by."""
    share_sparsity: Annotated[float, Range(0)] = 0.02
    """AdaShare: weight of the sparsity loss."""
    share_sharing: Annotated[float, Range(0)] = 0.02
    """AdaShare: weight of the sharing loss."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything a training run depends on; written to config.json of its folder."""

    mode: Mode = "den"
    """den: Algorithm 1.  dense: the same estimator at its full structure only, for estimator.first.  The others are the
    methods that it is compared with (`den.recipes`), on the same network, data and seed."""
    stages: Annotated[int, Range(1)] = 2
    """S of Algorithm 1."""
    start: Path | None = None
    """Run folder whose network this run begins with; the settings of that run are the defaults of the options."""
    selector_only: bool = False
    """Train the selector alone, in its phases of all stages, on the network of --start as it is."""
    estimator_only: bool = False
    """Train the estimator alone, in its phases after the first, on the structures that the network of --start
    chooses."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    estimator: EstimatorTraining = field(default_factory=EstimatorTraining)
    selector: SelectorTraining = field(default_factory=SelectorTraining)
    methods: MethodConfig = field(default_factory=MethodConfig)
    scenario: Annotated[str | None, tyro.conf.Suppress] = None
    """Name of the paper's experiment that these settings come from; reports group runs by it."""

    @property
    def joint(self) -> bool:
        """True where an image has one structure for all its labels."""
        return self.data.joint and len(self.data.tasks) > 1 and self.mode in ("den", "dense", "random")

    def __post_init__(self) -> None:
        check_ranges(self)
        estimator, selector = self.estimator, self.selector
        if estimator.first.steps < 1:
            raise ValueError(f"config: estimator.first.steps must be at least 1, got {estimator.first.steps}")
        for name in ("samples", "late_samples"):
            if selector.baseline == "leave-one-out" and getattr(selector, name) == 1:
                raise ValueError(f"config: selector.{name} must be at least 2 with a leave-one-out baseline, got 1")
        if estimator.teacher is not None and (estimator.distill == 0 or self.mode not in ("den", "dense")):
            raise ValueError(
                "config: estimator.teacher must come with estimator.distill above 0 and mode den or dense, got distill"
                f" {estimator.distill:g}, mode {self.mode}"
            )
        shares, tasks = list(self.data.shares), len(self.data.tasks)
        if len(shares) not in (0, tasks):
            raise ValueError(f"config: data.shares must be one for each of {tasks} tasks, got {shares}")
        if self.selector_only or self.estimator_only:
            one = "selector_only" if self.selector_only else "estimator_only"
            if self.start is None or self.mode != "den" or (self.selector_only and self.estimator_only):
                raise ValueError(
                    f"config: {one} must come with the run to start from, mode den, and not with its opposite, got"
                    f" start {self.start}, mode {self.mode}, selector_only {self.selector_only}, estimator_only"
                    f" {self.estimator_only}"
                )
        if self.data.joint and self.data.shares:
            raise ValueError(f"config: data.shares must be empty with data.joint, got {list(self.data.shares)}")
        if not self.data.tasks or len(set(self.data.tasks)) != len(self.data.tasks):
            raise ValueError(f"config: data.tasks must be different image sets, got {list(self.data.tasks)}")


@dataclass(frozen=True)
class DemoConfig:
    """The demonstration: trains a dense network and a Deep Elastic Network, and compares them."""

    out: Path = Path("runs/demo")
    """Folder for the runs, the table and the figures."""
    quick: bool = False
    """A shorter schedule, for a check that everything works."""
    seed: Annotated[int, SEED] = 0
    """Seed of both runs."""
