"""Made-up records of runs, for tests of reports."""

import dataclasses

from den.nn.count import ParameterCounts
from den.report.groups import group_runs, sections
from den.report.paper import CIFAR100
from den.runs.evaluation import Chosen, Evaluation, Null, TaskResult
from den.support.settings import to_dict
from den.train.config import DataConfig, NetworkConfig, SelectorTraining, TrainConfig

FULL = 100e6  # FLOPs of the full structure of the made-up runs


def made_result(task, accuracy, ratio, structures=12, usage=(0.5, 0.5), timing=None, **changes):
    null = Null(structures=90, variety=4.0, information=0.0, usage=(0.5, 0.5), shuffled=accuracy - 0.02)
    result = TaskResult(
        task=task, classes=10, images=100, accuracy=accuracy, loss=0.5, flops=ratio * FULL, flops_ratio=ratio,
        parameters=ratio * 1e6, usage=usage, structures=structures, variety=1.5, entropy=0.7, mean_entropy=0.9,
        probabilities=((0, 0, 0, 1.0),) * 2, histogram=((0, 0, 0, 100),) * 2, common=(Chosen("33", 1.0),),
        timing=timing, null=null,
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


def made_run(mode="den", accuracy=0.8, ratio=0.5, *, seed=0, tasks=(CIFAR100,), scenario="c1", rho=0.1, **changes):
    """A made-up record; `changes`: of network (levels, backbone) or of the results."""
    network = NetworkConfig(changes.pop("backbone", "wrn14_1"), levels=changes.pop("levels", 4))
    selector = SelectorTraining(rho=rho)
    config = TrainConfig(mode=mode, seed=seed, data=DataConfig(tasks=tasks), network=network, selector=selector)
    results = tuple(made_result(task, accuracy, ratio, **changes) for task in tasks)
    counts = ParameterCounts(1_000_000, 10, 10, 10, 5000)
    return Evaluation({**to_dict(config), "scenario": scenario}, "last", 100, counts, results, "1 CPU threads")


def seeds_of(mode="den", accuracy=0.8, ratio=0.5, *, spread=0.001, **changes):
    """Three seeds of a made-up run, whose accuracies lie `spread` apart."""
    return [made_run(mode, accuracy + spread * (s - 1), ratio, seed=s, **changes) for s in range(3)]


def only_section(records):
    (section,) = sections(group_runs(records))
    return section


def cells(table):
    """The lines of a table by method and task: the cells by the names of the columns."""
    return {(row[0], row[1]): dict(zip(table.head, row, strict=True)) for row in table.rows}
