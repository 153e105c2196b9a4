"""The commands: den train, fetch, evaluate, report, demo, bench, info, dag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from den.bench import BenchConfig
from den.report.settings import Report
from den.runs.settings import Evaluate
from den.support.files import check_folder
from den.support.settings import read_config
from den.train.config import DemoConfig, TrainConfig
from den.train.scenarios import ScenarioOptions, scenario_config

HELP = (
    "Deep Elastic Networks: one network for several tasks, as deep and as wide as each image needs."
    " den dag --help: networks over one graph, a topology for each task."
)
Settings = TypeVar("Settings", bound=Any)


@dataclass(frozen=True)
class Train:
    """Train a Deep Elastic Network (Algorithm 1), or its dense baseline with --mode dense.

    An experiment of the paper may come first, m1, m2, m3 or c1: see den train m1 --help.
    """

    config: Path | None = None
    """JSON file of settings, such as a run's config.json; options given here come before it."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the settings that it was started with."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Info:
    """Show versions, devices, which implementations are active, and what is missing."""


@dataclass(frozen=True)
class TrainScenario:
    """Train as an experiment of the paper does, on the schedule of the paper or a share of it."""

    options: Annotated[ScenarioOptions, tyro.conf.arg(name="")] = field(default_factory=ScenarioOptions)
    resume: bool = False
    """Continue the run in --out from its last checkpoint; give the same options again."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Fetch:
    """Download the archives of image sets, and check them."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Image sets: cifar10, cifar100, stl10, tinyimagenet."""
    data_root: Path
    """Folder for the archives."""


def command(arguments: list[str]) -> Callable[[], int]:
    """What the arguments ask for, with all that it needs imported; called, it returns the exit status.

    Raises ValueError and OSError for wrong input, SystemExit from --help and for options that there are not.
    """
    if arguments in (["--version"], ["-V"]):
        from den_kernels import __version__

        return partial(_print, f"den {__version__}")
    scenario = arguments[:1] == ["train"] and arguments[1:2] and arguments[1].startswith("dag-")
    if scenario or arguments[:1] == ["dag"]:
        from den.dag.cli import main as dag

        arguments = arguments if scenario else arguments[1:]
        import_module("den.dag.report" if arguments[:1] == ["report"] else "den.dag.search")  # what `dag` will need
        return partial(_done, dag, arguments)
    return _prepared(_parse(arguments))


def _parse(arguments: list[str]) -> Train | Fetch | Evaluate | Report | DemoConfig | BenchConfig | Info:
    if arguments[:1] == ["train"] and arguments[1:2] and not arguments[1].startswith("-"):
        return _parse_scenario(arguments[1], arguments[2:])
    train = Train(settings=base_settings(TrainConfig, arguments)) if arguments[:1] == ["train"] else Train()
    command = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Fetch, tyro.conf.subcommand("fetch")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[DemoConfig, tyro.conf.subcommand("demo")]
        | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return tyro.cli(command, args=arguments, prog="den", description=HELP)  # type: ignore[call-overload]


def _parse_scenario(name: str, arguments: list[str]) -> Train:
    """The options that make the scenario first, then all: those of `TrainConfig` change what came of the former."""
    settings = scenario_config(name)  # an unknown name first of all
    if not {"-h", "--help"}.intersection(arguments):
        options, _ = tyro.cli(ScenarioOptions, args=arguments, prog=f"den train {name}", return_unknown_args=True)
        settings = scenario_config(name, options)
    default = TrainScenario(settings=settings)
    command = tyro.cli(TrainScenario, args=arguments, prog=f"den train {name}", default=default)
    return Train(resume=command.resume, settings=command.settings)


def base_settings(kind: type[Settings], arguments: list[str]) -> Settings:
    """The settings that the options of `train` change: of --config, of the run to be resumed, or the defaults."""
    if path := _option(arguments, "--config"):
        return read_config(kind, Path(path))
    if "--resume" in arguments:
        return read_config(kind, Path(_option(arguments, "--out") or kind().out) / "config.json")
    return kind()


def _option(arguments: list[str], name: str) -> str | None:
    """The value of an option, given as "--name value" or "--name=value"."""
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(name + "="):
            return argument[len(name) + 1 :]
    return None


def _prepared(settings: Train | Fetch | Evaluate | Report | DemoConfig | BenchConfig | Info) -> Callable[[], int]:
    if isinstance(settings, Train):
        from den.recipes.den import train

        return partial(_train, train, settings)
    if isinstance(settings, Fetch):
        if not settings.names:
            raise ValueError("fetch: names must be at least one image set, got none")
        from den.data.sets import fetch_set, published_archive

        for name in settings.names:
            published_archive(name)
        return partial(_fetch, fetch_set, settings)
    if isinstance(settings, Evaluate):
        from den.runs.command import main as measure

        return partial(_done, measure, settings)
    if isinstance(settings, Report):
        from den.report.command import main as report

        return partial(_done, report, settings)
    if isinstance(settings, DemoConfig):
        from den.demo import main as demo

        return partial(_done, demo, settings)
    if isinstance(settings, BenchConfig):
        from den.bench import main as bench

        return partial(bench, settings)
    from den_kernels.info import format_report

    return lambda: _print(format_report())


def _print(text: str) -> int:
    print(text)
    return 0


def _done(run: Callable[[Any], None], settings: Any) -> int:
    run(settings)
    return 0


def _train(train: Callable[..., object], command: Train) -> int:
    train(command.settings, resume=command.resume)
    return _print(f"den: finished; measure it with: den evaluate {command.settings.out}")


def _fetch(fetch_set: Callable[[str, Path], object], command: Fetch) -> int:
    check_folder(command.data_root, "fetch: data-root")
    for name in command.names:
        print(fetch_set(name, command.data_root), flush=True)
    return 0
