"""Typed settings of `den dag`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from den.tasks import IGNORE

Mode = Literal["dag", "hard", "single", "adashare", "cross-stitch"]
SEARCHING = ("dag", "adashare")  # modes in which a task's topology is learned
Scenario = Literal["omniglot", "cifar100", "nyuv2", "cityscapes", "pascal"]


@dataclass(frozen=True)
class DagDataConfig:
    """What is trained on."""

    scenario: Annotated[Scenario, tyro.conf.arg(aliases=("--scenario",))] = "omniglot"
    """omniglot: one alphabet is one task.  cifar100: 20 tasks, one per coarse label, of five classes each.  nyuv2,
    cityscapes, pascal: two to five dense tasks of the same images."""
    root: Annotated[Path | None, tyro.conf.arg(aliases=("--data-root",))] = None
    """Folder of the set."""
    size: int | None = None
    """Side in pixels that Omniglot's images are scaled to (None: 28), and of PASCAL-Context's squares (None: 512)."""
    classes: int | None = None
    """Classes of the labels of NYU-v2 (40 or 13; None: 40) and Cityscapes (19 or 7; None: 19)."""
    only: tuple[str, ...] = ()
    """Names of the tasks to be trained; empty: all."""
    batch_size: int = 96
    """Images in a batch, all tasks together, in proportion to the sizes of their training sets; tasks of the same
    images share them."""
    validation: float = 0.0
    """Share of every training set that is held out and measured after every epoch; nothing is chosen by it."""


@dataclass(frozen=True)
class DagNetworkConfig:
    """The central network."""

    states: int = 8
    """N: states of the graph."""
    flow: int = 3
    """M: how far ahead an edge may lead; states - 1 is the unrestricted graph."""
    channels: int = 48
    """Channels of every state."""
    trunk_size: int = 14
    """Side in pixels of the states' maps; with dense tasks a quarter of the images', whatever stands here."""
    stages: tuple[int, ...] = ()
    """States of each resolution, adding up to the states; every stage halves the side and doubles the channels.  Empty:
    all states have the same."""
    gates: Literal["soft", "bare"] = "soft"
    """Gates after the reduction: soft, the sigmoids where kept; bare, 1 where kept."""
    read_in: bool = True
    """Let the image be read in at every state; otherwise at the first only."""
    read_out: bool = True
    """Let every state be read out; otherwise the last only."""


@dataclass(frozen=True)
class DagTraining:
    """How it is trained: SGD with Nesterov momentum on the weights, Adam on the gates."""

    steps: int = 2000
    """Updates of the weights, all stages together."""
    shares: tuple[float, ...] = (0.2, 0.5, 0.3)
    """Shares of the steps that warm-up, search and fine-tuning get; 0: none."""
    rate: float = 0.05
    """Learning rate at the start, falling to 0 by a cosine until the search ends."""
    fine_rate: float = 0.05
    """Learning rate at the start of fine-tuning, falling to 0 by a cosine."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """Weight decay of the weights; the gates have none."""
    gate_rate: float = 0.01
    """Learning rate of the gates."""
    search: Literal["alternating", "joint", "frozen"] = "alternating"
    """alternating: weights on one half of the training images, gates on the other.  joint: both at once on all images.
    frozen: the edges' weights rest, gates and the tasks' own weights learn."""
    squeeze: float = 0.05
    """Weight of the squeeze loss; 0: none."""
    loss_weights: tuple[float, ...] = ()
    """Weights of the tasks' losses, in the order of the tasks; empty: 1 each."""
    kappa: float = 0.35
    """Edges that a task may keep unsqueezed (the sum of its gates), as a share of all edges."""


@dataclass(frozen=True)
class ReductionConfig:
    """What every task keeps after the search."""

    ratio: float = 0.5
    """mu: share of the edges, read-ins and read-outs that is removed."""
    ranking: Literal["flow", "gates", "random"] = "flow"
    """Least important first by the flow through them, by their gates, or at random."""
    guard: bool = True
    """Take back a removal that leaves no path or fewer than wanted."""
    norm_batches: int = 30
    """Batches that the batch norms' running statistics are taken from anew, before fine-tuning."""


@dataclass(frozen=True)
class PeerConfig:
    """What only AdaShare and cross-stitch networks need."""

    temperature: float = 5.0
    """AdaShare: of the Gumbel-softmax at first."""
    cooling: float = 0.965
    """AdaShare: what the temperature is multiplied by after every epoch."""
    sparsity: float = 0.2
    """AdaShare: weight of the sparsity loss."""
    sharing: float = 0.2
    """AdaShare: weight of the sharing loss."""
    stitch_rate: float = 10.0
    """Cross-stitch: learning rate of the stitches over that of the other weights."""


@dataclass(frozen=True)
class DagTrainConfig:
    """Everything a training run depends on; written to config.json of its folder."""

    out: Path = Path("runs/dag")
    """Run folder: settings, versions, metrics, TensorBoard events, checkpoints."""
    mode: Mode = "dag"
    """dag: warm-up, search, reduction, fine-tuning.  hard: hard sharing, every task runs the whole graph throughout.
    single: a network for each task.  adashare: a policy over edges for each task.  cross-stitch: a column for each
    task, mixed after every state."""
    start: Path | None = None
    """Run folder whose searched network is taken over: warm-up and search are not repeated."""
    seed: int = 0
    """Seed of initial weights, shuffling, augmentation and random rankings."""
    epoch_steps: int | None = None
    """Updates between measurements and checkpoints; None: one pass over the training images."""
    data: DagDataConfig = field(default_factory=DagDataConfig)
    network: DagNetworkConfig = field(default_factory=DagNetworkConfig)
    training: DagTraining = field(default_factory=DagTraining)
    reduction: ReductionConfig = field(default_factory=ReductionConfig)
    peers: PeerConfig = field(default_factory=PeerConfig)
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: training computes in it where autocast does; weights stay float32."""
    progress: bool = True
    """Show a progress bar per stage."""

    def __post_init__(self) -> None:
        limits = {
            "epoch_steps": (self.epoch_steps, 1, None),
            "data.size": (self.data.size, 1, None),
            "data.classes": (self.data.classes, 2, IGNORE),
            "data.validation": (self.data.validation, 0, 0.9),
            "training.steps": (self.training.steps, 1, None),
            "training.squeeze": (self.training.squeeze, 0, None),
            "training.kappa": (self.training.kappa, 0, 1),
            "peers.temperature": (self.peers.temperature, 1e-3, None),
            "peers.cooling": (self.peers.cooling, 1e-3, 1),
            "peers.sparsity": (self.peers.sparsity, 0, None),
            "peers.sharing": (self.peers.sharing, 0, None),
            "peers.stitch_rate": (self.peers.stitch_rate, 0, None),
            "reduction.ratio": (self.reduction.ratio, 0, 1),
            "reduction.norm_batches": (self.reduction.norm_batches, 0, None),
        }
        for name, (value, low, high) in limits.items():
            if value is not None and not (low <= value and (high is None or value <= high)):
                bound = f"at least {low}" if high is None else f"in {low}..{high}"
                raise ValueError(f"config: {name} must be {bound}, got {value}")
        if any(weight < 0 for weight in self.training.loss_weights):
            raise ValueError(
                f"config: training.loss_weights must be at least 0, got {list(self.training.loss_weights)}"
            )
        shares = self.training.shares
        if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"config: training.shares must be three shares that add up to 1, got {list(shares)}")


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
