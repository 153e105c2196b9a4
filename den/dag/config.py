"""Typed settings of `den dag`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from den.nn.tasks import IGNORE
from den.support.limits import Range, check_ranges
from den.support.run_config import RunConfig

Mode = Literal["dag", "hard", "single", "adashare", "cross-stitch"]
SEARCHING = ("dag", "adashare")  # modes in which a task's topology is learned
Scenario = Literal["omniglot", "cifar100", "nyuv2", "cityscapes", "pascal", "own"]


@dataclass(frozen=True)
class DagDataConfig:
    """Settings of the data."""

    scenario: Annotated[Scenario, tyro.conf.arg(aliases=("--scenario",))] = "omniglot"
    """omniglot: one alphabet is one task, see the protocol.  cifar100: 20 tasks, one per coarse label, of five classes
    each.  nyuv2, cityscapes, pascal: two to five dense tasks of the same images.  own: those of data.tasks."""
    root: Annotated[Path | None, tyro.conf.arg(aliases=("--data-root",))] = None
    """Folder of the set."""
    size: Annotated[int | None, Range(1)] = None
    """Side in pixels that Omniglot's images are scaled to (None: 28; of mtl20 105, as they are), those of folders by
    class (None: 64), and of PASCAL-Context's squares (None: 512)."""
    classes: Annotated[int | None, Range(2, IGNORE)] = None
    """Classes of the labels of NYU-v2 (40 or 13), Cityscapes (19 or 7) and dense folders; None: what the files say."""
    only: tuple[str, ...] = ()
    """Names of the tasks to be trained; empty: all."""
    batch_size: Annotated[int, Range(1)] = 96
    """Images in a batch, all tasks together, in proportion to the sizes of their training sets (of your own, in equal
    parts); tasks of the same images share them."""
    workers: Annotated[int | None, Range(0)] = None
    """Processes that read the scenes of dense tasks ahead of training; None: half of the CPUs, 1 to 8; 0: none."""
    validation: Annotated[float, Range(0, 0.9)] = 0.0
    """Share of every training set that is held out and measured after every epoch; only AdaShare's draws are chosen by
    it.  Of mtl20 the validation split is, and this stays 0."""
    tasks: tuple[str, ...] = ()
    """Tasks of your own: names of image sets that den train knows, each a task (digits, cifar100@32, folder:PATH@64, a
    folder with a sub-folder of pictures for each class); or folder:PATH with dense tasks,
    {train,val}/{image,label,depth,normal}/*.npy.  Paths begin at the data root, where there is one."""
    protocol: Literal["drawers", "mtl20"] = "drawers"
    """Of Omniglot.  drawers: all alphabets that are there, drawers 1 to 15 for training, 16 to 20 for testing; ours.
    mtl20: 20 of the full set's 50 alphabets, 50, 20 and 30 % of each for training, validation and testing, on which
    multi-task papers report."""

    def __post_init__(self) -> None:
        names = tuple(name for each in self.tasks for name in each.split(",") if name)
        object.__setattr__(self, "tasks", names)
        if names:
            object.__setattr__(self, "scenario", "own")


@dataclass(frozen=True)
class DagNetworkConfig:
    """Settings of the central network."""

    states: Annotated[int, Range(1)] = 8
    """N: states of the graph."""
    flow: Annotated[int, Range(1)] = 3
    """M: how far ahead an edge may lead; states - 1 is the unrestricted graph."""
    channels: Annotated[int, Range(1)] = 48
    """Channels of every state."""
    trunk_size: Annotated[int, Range(1)] = 14
    """Side in pixels of the states' maps; with dense tasks a quarter of the images', whatever stands here."""
    stages: Annotated[tuple[int, ...], Range(1)] = ()
    """States of each resolution, adding up to the states; every stage halves the side and doubles the channels.  Empty:
    all states have the same."""
    edge: Literal["conv", "residual"] = "conv"
    """What an edge is.  conv: convolution, batch norm, ReLU.  residual: the block of Deep Elastic Networks, a shortcut
    and two convolutions."""
    groups: Annotated[int, Range(1)] = 1
    """Channel groups of an edge: above 1 each task uses, of each edge that it keeps, only the first few."""
    stem: str = "conv"
    """What images pass first, a copy for each task.  conv: a convolution.  Or layers of a published network,
    torchvision:NAME:LAYER (torchvision:resnet18:layer2) or timm:NAME:STAGE (timm:resnet18:2); trunk-size follows."""
    pretrained: bool = True
    """Begin such a stem with its published weights."""
    gates: Literal["soft", "bare"] = "soft"
    """Gates after the reduction: soft, the sigmoids where kept; bare, 1 where kept."""
    read_in: bool = True
    """Let the image be read in at every state; otherwise at the first only."""
    read_out: bool = True
    """Let every state be read out; otherwise the last only."""


@dataclass(frozen=True)
class DagTraining:
    """Settings of training: SGD with Nesterov momentum on the weights, Adam on the gates."""

    steps: Annotated[int, Range(1)] = 2000
    """Updates of the weights, all stages together."""
    shares: Annotated[tuple[float, ...], Range(0, 1)] = (0.1, 0.3, 0.6)
    """Shares of the steps that warm-up, search and fine-tuning get; 0: none."""
    rate: Annotated[float, Range(0)] = 0.05
    """Learning rate at the start, falling to 0 by a cosine until the search ends."""
    fine_rate: Annotated[float, Range(0)] = 0.05
    """Learning rate at the start of fine-tuning, falling to 0 by a cosine."""
    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    """Nesterov momentum."""
    weight_decay: Annotated[float, Range(0)] = 5e-4
    """Weight decay of the weights; the gates have none."""
    gate_rate: Annotated[float, Range(0)] = 0.1
    """Learning rate of the gates."""
    search: Literal["alternating", "joint", "frozen"] = "alternating"
    """alternating: weights on one half of the training images, gates on the other.  joint: both at once on all images.
    frozen: the weights that tasks share rest, gates and the tasks' own weights learn."""
    squeeze: Annotated[float, Range(0)] = 0.05
    """Weight of the squeeze loss; 0: none."""
    loss_weights: Annotated[tuple[float, ...], Range(0)] = ()
    """Weights of the tasks' losses, in the order of the tasks (of a scenario's settings those of the public protocols);
    empty: 1 each."""
    balance: Literal["fixed", "uncertainty", "dwa"] = "fixed"
    """How losses are weighed.  fixed: by loss_weights.  uncertainty: also by learned uncertainties.  dwa: also by how
    fast they fell in the last epochs."""
    gradients: Literal["sum", "pcgrad", "cagrad"] = "sum"
    """Gradients of the weights that tasks share: their sum, or combined by PCGrad or CAGrad, which takes a backward
    pass for each task."""
    conflict: Annotated[float, Range(0, 1, open_high=True)] = 0.4
    """CAGrad: c, how far from the mean gradient it may go, as a share of its length."""
    kappa: Annotated[float, Range(0, 1)] = 0.35
    """Edges that a task may keep unsqueezed (the sum of its gates), as a share of all edges."""


@dataclass(frozen=True)
class ReductionConfig:
    """Settings of the reduction that follows the search: the share to remove, and by which order."""

    ratio: Annotated[float, Range(0, 1)] = 0.5
    """mu: share of the edges that is removed."""
    ends: Annotated[float | None, Range(0, 1)] = None
    """Share of the read-ins, and of the read-outs, that is removed; None: only those of states that are on no path."""
    levels: Annotated[float, Range(0, 1)] = 0.25
    """Share of the channel groups of a task's edges that is removed, where they have several: those that cost least
    loss; every edge keeps one."""
    ranking: Literal["flow", "gates", "random"] = "flow"
    """Least important first by the flow through them, by their gates, or at random."""
    rerank: bool = False
    """Let the flow find its way again after every removal."""
    guard: bool = True
    """Take back a removal that leaves no path or fewer than wanted."""
    norm_batches: Annotated[int, Range(0)] = 30
    """Batches that the batch norms' running statistics are taken from anew, before fine-tuning."""

    @staticmethod
    def of_earlier_versions(values: dict[str, Any]) -> dict[str, Any]:
        """Stored settings in today's form: there was one share, of edges and ends alike."""
        before = {"ratio", "ranking", "guard", "norm_batches"}
        return {**values, "ends": values["ratio"]} if set(values) == before else values


@dataclass(frozen=True)
class PeerConfig:
    """Settings of AdaShare and cross-stitch networks only."""

    draws: Annotated[int, Range(1)] = 8
    """AdaShare: policies that are drawn of what was learned; the best on held-out images (without any, on the images
    that the policy was learned from) is trained."""
    curriculum: bool = True
    """AdaShare: in the first half of the search the policy is learned of the last state's edges first, and of one state
    more at a time; the other edges run."""
    temperature: Annotated[float, Range(1e-3)] = 5.0
    """AdaShare: of the Gumbel-softmax at first."""
    cooling: Annotated[float, Range(1e-3, 1)] = 0.965
    """AdaShare: what the temperature is multiplied by after every epoch."""
    sparsity: Annotated[float, Range(0)] = 0.2
    """AdaShare: weight of the sparsity loss."""
    sharing: Annotated[float, Range(0)] = 0.2
    """AdaShare: weight of the sharing loss."""
    stitch_rate: Annotated[float, Range(0)] = 10.0
    """Cross-stitch: learning rate of the stitches over that of the other weights."""

    @staticmethod
    def of_earlier_versions(values: dict[str, Any]) -> dict[str, Any]:
        """Stored settings in today's form: AdaShare drew one policy and learned it of all edges at once."""
        before = {"temperature", "cooling", "sparsity", "sharing", "stitch_rate"}
        return {**values, "draws": 1, "curriculum": False} if set(values) == before else values


@dataclass(frozen=True)
class DagTrainConfig(RunConfig):
    """Everything a training run depends on; written to config.json of its folder."""

    out: Path = Path("runs/dag")
    """Run folder: settings, versions, metrics, TensorBoard events, checkpoints."""
    mode: Mode = "dag"
    """dag: warm-up, search, reduction, fine-tuning.  hard: hard sharing, every task runs the whole graph throughout.
    single: a network for each task.  adashare: a policy over edges for each task.  cross-stitch: a column for each
    task, mixed after every state."""
    start: Path | None = None
    """Run folder whose searched network is taken over: warm-up and search are not repeated."""
    data: DagDataConfig = field(default_factory=DagDataConfig)
    network: DagNetworkConfig = field(default_factory=DagNetworkConfig)
    training: DagTraining = field(default_factory=DagTraining)
    reduction: ReductionConfig = field(default_factory=ReductionConfig)
    peers: PeerConfig = field(default_factory=PeerConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        shares = self.training.shares
        if len(shares) != 3 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"config: training.shares must be three shares that add up to 1, got {list(shares)}")
        if self.training.gradients != "sum" and self.mode in ("single", "cross-stitch"):
            got = f"{self.training.gradients} for {self.mode}"
            raise ValueError(f"config: training.gradients must be sum where nothing is shared by all tasks, got {got}")
        if self.network.groups > 1 and self.mode != "dag":
            got = f"{self.network.groups} for {self.mode}"
            raise ValueError(f"config: network.groups must be 1 where no topology is searched for, got {got}")
        if self.reduction.rerank and self.reduction.ranking != "flow":
            raise ValueError(f"config: reduction.ranking must be flow to rerank, got {self.reduction.ranking}")
        if self.data.protocol == "mtl20" and (self.data.scenario != "omniglot" or self.data.validation):
            wanted = "scenario omniglot and data.validation 0, since it has a validation split"
            got = f"{self.data.scenario} and {self.data.validation}"
            raise ValueError(f"config: data.protocol mtl20 must be with data.{wanted}, got {got}")


@dataclass(frozen=True)
class DagPredict:
    """Apply a trained network to pictures: classes are printed, maps of dense tasks are written to a folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    pictures: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of pictures, or folders of them."""
    task: tuple[str, ...] = ()
    """Names of tasks; none: all."""
    out: Path | None = None
    """Folder for the maps of dense tasks, PICTURE-TASK.npy: labels, depths, normals, or probabilities."""
    modules: tuple[str, ...] = ()
    """Python modules that are imported first, such as one that registers kinds of tasks."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""


@dataclass(frozen=True)
class DagExtract:
    """Write the network of one task to a file that needs nothing of this library."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    task: str
    """Name of the task."""
    out: Path
    """The file: .pt2, a program that torch.export.load opens; .onnx, for other runtimes (needs the packages onnx and
    onnxscript)."""
    modules: tuple[str, ...] = ()
    """Python modules that are imported first, such as one that registers kinds of tasks."""


@dataclass(frozen=True)
class DagReportConfig:
    """Measure finished runs on their test sets: a table and a drawing for each, and a table that compares them."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders; with several, the first is compared with the others."""
    data_root: Path | None = None
    """Folder of the images; None: where the run had them."""
    markdown: Path | None = None
    """Write the tables to this file, in Markdown."""
    out: Path | None = None
    """Folder for the drawings; None: each run's own, as graph.png."""
    time: bool = True
    """Measure milliseconds."""
    device: str = "auto"
    """Where to measure; auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""
