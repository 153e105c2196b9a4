"""Typed settings of `den dag`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from den.nn.tasks import IGNORE
from den.support.limits import SEED, Range, check_ranges

Mode = Literal["dag", "hard", "single", "adashare", "cross-stitch"]
SEARCHING = ("dag", "adashare")  # modes in which a task's topology is learned
Scenario = Literal["omniglot", "cifar100", "nyuv2", "cityscapes", "pascal"]


@dataclass(frozen=True)
class DagDataConfig:
    """Settings of the data."""

    scenario: Annotated[Scenario, tyro.conf.arg(aliases=("--scenario",))] = "omniglot"
    """omniglot: one alphabet is one task.  cifar100: 20 tasks, one per coarse label, of five classes each.  nyuv2,
    cityscapes, pascal: two to five dense tasks of the same images."""
    root: Annotated[Path | None, tyro.conf.arg(aliases=("--data-root",))] = None
    """Folder of the set."""
    size: Annotated[int | None, Range(1)] = None
    """Side in pixels that Omniglot's images are scaled to (None: 28), and of PASCAL-Context's squares (None: 512)."""
    classes: Annotated[int | None, Range(2, IGNORE)] = None
    """Classes of the labels of NYU-v2 (40 or 13) and Cityscapes (19 or 7); None: what the files say."""
    only: tuple[str, ...] = ()
    """Names of the tasks to be trained; empty: all."""
    batch_size: Annotated[int, Range(1)] = 96
    """Images in a batch, all tasks together, in proportion to the sizes of their training sets; tasks of the same
    images share them."""
    workers: Annotated[int | None, Range(0)] = None
    """Processes that read the scenes of dense tasks ahead of training; None: half of the CPUs, 1 to 8; 0: none."""
    validation: Annotated[float, Range(0, 0.9)] = 0.0
    """Share of every training set that is held out and measured after every epoch; nothing is chosen by it."""


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
    shares: Annotated[tuple[float, ...], Range(0, 1)] = (0.2, 0.5, 0.3)
    """Shares of the steps that warm-up, search and fine-tuning get; 0: none."""
    rate: Annotated[float, Range(0)] = 0.05
    """Learning rate at the start, falling to 0 by a cosine until the search ends."""
    fine_rate: Annotated[float, Range(0)] = 0.05
    """Learning rate at the start of fine-tuning, falling to 0 by a cosine."""
    momentum: Annotated[float, Range(0, 1, open_high=True)] = 0.9
    """Nesterov momentum."""
    weight_decay: Annotated[float, Range(0)] = 5e-4
    """Weight decay of the weights; the gates have none."""
    gate_rate: Annotated[float, Range(0)] = 0.01
    """Learning rate of the gates."""
    search: Literal["alternating", "joint", "frozen"] = "alternating"
    """alternating: weights on one half of the training images, gates on the other.  joint: both at once on all images.
    frozen: the edges' weights rest, gates and the tasks' own weights learn."""
    squeeze: Annotated[float, Range(0)] = 0.05
    """Weight of the squeeze loss; 0: none."""
    loss_weights: Annotated[tuple[float, ...], Range(0)] = ()
    """Weights of the tasks' losses, in the order of the tasks (of a scenario's settings those of the public protocols);
    empty: 1 each."""
    kappa: Annotated[float, Range(0, 1)] = 0.35
    """Edges that a task may keep unsqueezed (the sum of its gates), as a share of all edges."""


@dataclass(frozen=True)
class ReductionConfig:
    """Settings of the reduction that follows the search: the share to remove, and by which order."""

    ratio: Annotated[float, Range(0, 1)] = 0.5
    """mu: share of the edges, read-ins and read-outs that is removed."""
    ranking: Literal["flow", "gates", "random"] = "flow"
    """Least important first by the flow through them, by their gates, or at random."""
    guard: bool = True
    """Take back a removal that leaves no path or fewer than wanted."""
    norm_batches: Annotated[int, Range(0)] = 30
    """Batches that the batch norms' running statistics are taken from anew, before fine-tuning."""


@dataclass(frozen=True)
class PeerConfig:
    """Settings of AdaShare and cross-stitch networks only."""

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
    seed: Annotated[int, SEED] = 0
    """Seed of initial weights, shuffling, augmentation and random rankings."""
    epoch_steps: Annotated[int | None, Range(1)] = None
    """Updates between measurements and checkpoints; None: one pass over the training images."""
    data: DagDataConfig = field(default_factory=DagDataConfig)
    network: DagNetworkConfig = field(default_factory=DagNetworkConfig)
    training: DagTraining = field(default_factory=DagTraining)
    reduction: ReductionConfig = field(default_factory=ReductionConfig)
    peers: PeerConfig = field(default_factory=PeerConfig)
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: training computes in it where autocast does; weights stay float32."""
    accumulate: Annotated[int, Range(1)] = 1
    """Pieces in which a batch is computed, one after the other, before an update: less memory for the same batch.
    Batch norms see a piece at a time."""
    progress: bool = True
    """Show a progress bar per stage."""

    def __post_init__(self) -> None:
        check_ranges(self)
        shares = self.training.shares
        if len(shares) != 3 or abs(sum(shares) - 1) > 1e-6:
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
    device: str = "auto"
    """Where to measure; auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""
