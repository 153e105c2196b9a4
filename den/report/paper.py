"""The paper's numbers: Ahn, Kim, Oh: Deep Elastic Networks with Model Selection for Multi-Task Learning, ICCV 2019.

Tables 2, 3, 4 and 5, entry by entry.  Table 2 gives WRN-32-4 2.13 GFLOP and Table 4 the same network 2.91; both stand
here as printed.  Table 3's ">" (lower bounds) are kept as their bounds.

FLOPs are twice the multiply-adds, as ours.  Table 3 prints multiply-adds (27.4M is what SimpleConvNet has of them on
84x84 pixels) and is doubled here.  Parameters are the weights of the blocks, of SimpleConvNet and VGG with those of the
fully connected layers (`COUNTS_ALL`).  Its VGG-16 is our `vgg19_elastic_fc`: only there does the full structure have
38.9M and that of half the channels 19.4M.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MEAN = "mean"  # in place of a task: over all of them
CIFAR10, CIFAR100, COARSE, TINY, STL = "cifar10", "cifar100", "cifar100-coarse", "tinyimagenet", "stl10"
M1 = (CIFAR100, TINY, STL)
M2 = tuple(f"imagenet50-{k}" for k in range(10))
TASKS = {"m1": M1, "m2": M2, "m3": (COARSE, CIFAR100)}
"""The tasks that a network of the paper learns together; in C1 one of two."""
SIZES = {"simpleconvnet": 84, "simpleconvnet_224": 224}  # pixels of the images of M2
COUNTS_ALL = ("simpleconvnet", "vgg")  # backbones, by how their names begin


@dataclass(frozen=True)
class PaperEntry:
    """Results of one network and task in a table of the paper.  None: the paper does not say."""

    table: str  # "2a"
    scenario: str  # m1, m2, m3, c1
    backbone: str
    method: str  # a value of `TrainConfig.mode`; in C1 "nestednet 1/4" and so on; or a method that is not built here
    rho: float | None
    task: str  # or MEAN
    accuracy: float  # per cent
    flops: float | None = None
    fewer: float | None = None  # times fewer FLOPs than the baseline of the same table and task
    parameters: float | None = None


def _table_2(letter: str, backbone: str, rows: str) -> Iterator[PaperEntry]:
    """Method, rho, accuracy of the three tasks and mean, GFLOP, millions of parameters."""
    baseline = None
    for line in rows.strip().splitlines():
        method, rho, *numbers = line.split()
        *accuracies, flops, parameters = map(float, numbers)
        baseline = baseline or flops
        for task, accuracy in zip((*M1, MEAN), accuracies, strict=True):
            cost = (1e9 * flops, baseline / flops, 1e6 * parameters) if task == MEAN else (None, None, None)
            yield PaperEntry(f"2{letter}", "m1", backbone, method, _rho(rho), task, accuracy, *cost)


def _table_3(rows: str) -> Iterator[PaperEntry]:
    """Backbone, method, rho, mean accuracy, millions of multiply-adds, millions of parameters."""
    for line in rows.strip().splitlines():
        backbone, method, rho, *numbers = line.split()
        accuracy, flops, parameters = map(float, numbers)
        fewer = 27.4 / flops
        yield PaperEntry("3", "m2", backbone, method, _rho(rho), MEAN, accuracy, 2e6 * flops, fewer, 1e6 * parameters)


def _table_4(letter: str, task: str, rows: str) -> Iterator[PaperEntry]:
    """Method, rho, accuracy, GFLOP, millions of parameters."""
    for line in rows.strip().splitlines():
        method, rho, *numbers = line.split()
        accuracy, flops, parameters = map(float, numbers)
        cost = (1e9 * flops, 2.91 / flops, 1e6 * parameters)
        yield PaperEntry(f"4{letter}", "m3", "wrn32_4", method, _rho(rho), task, accuracy, *cost)


def _table_5(backbone: str, rows: str) -> Iterator[PaperEntry]:
    """Method, rho, then for CIFAR-10 and CIFAR-100 accuracy, millions of parameters, times fewer FLOPs.

    The levels L, M and H of NestedNet are named by their share of the baseline's parameters.
    """
    for line in rows.strip().splitlines():
        *names, rho = line.split("|")[0].split()
        numbers: list[Any] = [None if cell == "-" else float(cell) for cell in line.split("|")[1].split()]
        for task, (accuracy, parameters, fewer) in zip((CIFAR10, CIFAR100), (numbers[:3], numbers[3:]), strict=True):
            method, size = " ".join(names), 1e6 * parameters
            yield PaperEntry("5", "c1", backbone, method, _rho(rho), task, accuracy, None, fewer, size)


def _rho(cell: str) -> float | None:
    return None if cell == "-" else float(cell)


PAPER: tuple[PaperEntry, ...] = (
    *_table_2("a", "resnet42", """
        dense      -    75.05 57.22 76.25 69.51  2.91 89.4
        nestednet  -    74.53 56.71 82.54 71.26  1.70 29.8
        packnet    -    72.22 56.49 80.78 69.83  1.70 29.8
        den        1    74.30 56.74 83.90 71.65  1.35 29.8
        den        0.1  75.11 60.21 87.58 74.30  1.61 29.8
        """),
    *_table_2("b", "wrn32_4", """
        dense      -    75.01 58.89 79.88 71.26  2.13 22.0
        nestednet  -    74.09 57.87 83.78 71.91  1.24 7.35
        packnet    -    73.56 57.17 84.15 71.63  1.24 7.35
        den        1    75.43 58.17 87.54 73.71  1.13 7.35
        den        0.1  75.65 58.25 87.56 73.82  1.14 7.35
        """),
    *_table_3("""
        simpleconvnet      dense         -    51.03  27.4 0.14
        simpleconvnet      cross-stitch  -    56.03  27.4 0.14
        simpleconvnet      routing       -    58.97  27.4 0.14
        simpleconvnet      den           1    60.78  18.7 0.14
        simpleconvnet      den           0.1  62.62  19.4 0.14
        simpleconvnet_224  den           1    63.20  33.3 0.85
        simpleconvnet_224  den           0.1  65.23  39.1 0.85
        """),
    *_table_4("a", COARSE, """
        dense      -  83.53  2.91 14.7
        nestednet  -  84.55  1.46 7.35
        packnet    -  84.53  1.46 7.35
        den        1  84.87  1.37 7.35
        """),
    *_table_4("b", CIFAR100, """
        dense      -  76.32  2.91 14.7
        nestednet  -  75.84  2.91 7.35
        packnet    -  75.65  2.91 7.35
        den        1  75.93  1.37 7.35
        """),
    *_table_5("vgg19_elastic_fc", """
        dense           -    |  92.52 38.9 1.0   69.64 38.9 1.0
        nestednet 1/2   -    |  91.29 19.4 2.0   68.10 19.4 2.0
        nestednet 1     -    |  92.40 38.9 1.0   69.01 38.9 1.0
        den             0.1  |  92.31 18.5 2.4   68.87 18.9 1.7
        """),
    *_table_5("resnet18", "n2n - |  91.97 2.12 -  69.64 4.76 -"),
    *_table_5("resnet34", "n2n - |  93.54 3.87 -  70.11 4.25 -"),
    *_table_5("resnet50", """
        pruning  -  |  94.15 6.44 -  74.10 9.24 -
        den      1  |  94.50 4.25 -  77.98 4.67 -
        """),
    *_table_5("resnext29_8x64d_narrow", """
        dense             -    |  94.61 22.4 1.0   78.73 22.4 1.0
        nestednet 1/4     -    |  93.56 5.6 4.0    74.83 5.6 4.0
        nestednet 1/2     -    |  93.64 11.2 2.0   74.98 11.2 2.0
        nestednet 1       -    |  94.13 22.4 1.0   76.16 22.4 1.0
        blockdrop         -    |  93.56 16.9 1.2   78.35 15.5 1.4
        random            -    |  90.55 9.8 2.3    69.67 9.8 2.3
        den               1    |  91.45 4.1 5.5    78.27 7.3 3.0
        den               0.1  |  94.61 8.7 2.7    78.68 13.5 1.9
        """),
    *_table_5("resnext29_4x64d_narrow", """
        dense           -    |  94.37 11.2 1.0  77.95 11.2 1.0
        nestednet 1/2   -    |  93.59 5.6 2.0   75.70 5.6 2.0
        nestednet 1     -    |  94.11 11.2 1.0  76.36 11.2 1.0
        blockdrop       -    |  93.07 6.53 1.7  77.23 7.47 1.5
        random          -    |  87.33 5.6 2.0   65.44 5.6 2.0
        den             1    |  93.38 5.4 2.1   76.71 5.6 2.0
        den             0.1  |  94.47 5.8 1.9   77.58 6.3 1.8
        """),
    *_table_5("resnext29_2x64d_narrow", "dense - |  93.60 5.6 -  76.54 5.6 -"),
)  # fmt: skip


def entries(scenario: str | None, backbone: str) -> list[PaperEntry]:
    """The paper's entries for a scenario on a backbone."""
    return [entry for entry in PAPER if (entry.scenario, entry.backbone) == (scenario, backbone)]


def has_tasks(scenario: str | None, backbone: str, tasks: Sequence[str], alone: bool = False) -> bool:
    """Return True where a network of the paper learns these very tasks, so that its numbers may stand beside ours.

    alone: of networks for one task each, such as the separate baselines; each has to be one of the paper's.
    """
    if scenario == "c1":
        return set(tasks) <= {CIFAR10, CIFAR100}
    if scenario not in TASKS:
        return False
    names = {_without_size(task, SIZES.get(backbone)) for task in tasks}
    return names <= set(TASKS[scenario]) if alone else names == set(TASKS[scenario])


def _without_size(task: str, size: int | None) -> str:
    """The name of a set, without the size of its images where that is the paper's.

    >>> _without_size("imagenet50-3@84", 84), _without_size("stl10@32", None), _without_size("imagenet50-3", 84)
    ('imagenet50-3', 'stl10@32', 'imagenet50-3')
    """
    return task.removesuffix(f"@{size}") if size else task


STANDARD = {"m1": "wrn32_4", "m2": "simpleconvnet", "m3": "wrn32_4", "c1": "resnext29_8x64d_narrow"}


def nearest_backbone(scenario: str | None, backbone: str) -> str | None:
    """The paper's backbone whose changes from its own baseline stand beside those of `backbone`; None: none does.

    The same one; else one of the same family; else the scenario's `STANDARD`.
    """
    known = dict.fromkeys(entry.backbone for entry in PAPER if entry.scenario == scenario)
    if scenario is None or backbone in known or not known:
        return backbone if known else None
    family = re.sub(r"[^a-z].*", "", backbone)  # wrn of wrn14_1
    return next((name for name in known if family and name.startswith(family)), STANDARD[scenario])
