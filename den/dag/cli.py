"""den dag train, den dag report: networks over one graph, a topology per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from den.dag.config import DagReportConfig, DagTrainConfig

HELP = "Networks over one shared graph: a topology for each task, found by training."


@dataclass(frozen=True)
class DagTrain:
    """Search a topology for every task, reduce, fine-tune.

    A scenario may come first, dag-omniglot, dag-cifar100, dag-nyuv2, dag-cityscapes or dag-pascal: its settings are
    then the defaults of the options.
    """

    config: Path | None = None
    """JSON file of settings, such as a run's config.json; options given here come before it."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the settings that it was started with."""
    settings: Annotated[DagTrainConfig, tyro.conf.arg(name="")] = field(default_factory=DagTrainConfig)


def main(arguments: Sequence[str]) -> None:
    """Run `den dag` with `arguments`; ValueError and OSError for wrong input."""
    command = parse(list(arguments))
    if isinstance(command, DagReportConfig):
        from den.dag.report import report

        print(report(command), end="")
        if command.out is not None:
            print(f"den: the drawings are in {command.out}")
        return
    from den.dag.search import train

    train(command.settings, resume=command.resume)
    print(f"den: finished; measure it with: den dag report {command.settings.out}")


def parse(arguments: list[str]) -> DagTrain | DagReportConfig:
    """The command; the options of `train` change the settings of --config, of the run to be resumed, or of a scenario.

    Raises ValueError for a scenario that is unknown or not that of the stored settings.
    """
    from den.commands import base_settings
    from den.dag.scenarios import named_settings

    default = DagTrain()
    if arguments[:1] == ["train"]:
        settings = base_settings(DagTrainConfig, arguments)
        if arguments[1:2] and not arguments[1].startswith("-"):
            name, arguments = arguments[1], ["train", *arguments[2:]]
            named = named_settings(name)
            stored = any(word.split("=")[0] in ("--config", "--resume") for word in arguments)
            if stored and settings.data.scenario != named.data.scenario:
                raise ValueError(f"den dag train: scenario must be dag-{settings.data.scenario} as stored, got {name}")
            settings = settings if stored else named
        default = DagTrain(settings=settings)
    command = (
        Annotated[DagTrain, tyro.conf.subcommand("train", default=default)]
        | Annotated[DagReportConfig, tyro.conf.subcommand("report")]
    )
    return tyro.cli(command, args=arguments, prog="den dag", description=HELP)  # type: ignore[call-overload]
