"""The commands: den train, fetch, evaluate, predict, serve, report, demo, bench, info; den dag train, report, predict,
extract."""

from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from den.bench import BenchConfig
from den.dag.config import DagExtract, DagPredict, DagReportConfig, DagTrainConfig
from den.report.settings import Predict, Report
from den.runs.settings import Evaluate
from den.serve.settings import Serve
from den.support import launched
from den.support.files import check_folder
from den.support.settings import read_config
from den.train.config import DemoConfig, MethodConfig, TrainConfig
from den.train.scenarios import ScenarioOptions, changes, scenario_config

HELP = "Deep Elastic Networks: one network for several tasks, as deep and as wide as each image needs."
DAG_HELP = "Networks over one shared graph: a topology for each task, found by training."
Settings = TypeVar("Settings", TrainConfig, DagTrainConfig)


@dataclass(frozen=True)
class Source:
    """Options that say where the settings of a run begin."""

    config: Path | None = None
    """JSON file of settings, such as a run's config.json; options given here come before it."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the settings that it was started with."""


@dataclass(frozen=True)
class Train(Source):
    """Train a Deep Elastic Network (Algorithm 1), or its dense baseline with --mode dense.

    An experiment of the paper may come first, m1, m2, m3 or c1: see den train m1 --help.
    """

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    note: tyro.conf.Suppress[str] = ""


@dataclass(frozen=True)
class DagTrain(Source):
    """Search a topology for every task, reduce, fine-tune.

    A scenario may come first, dag-omniglot, dag-cifar100, dag-nyuv2, dag-cityscapes or dag-pascal: its settings are
    then the defaults of the options.
    """

    settings: Annotated[DagTrainConfig, tyro.conf.arg(name="")] = field(default_factory=DagTrainConfig)


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


REPORTERS: dict[type, str] = {
    Evaluate: "den.runs.command",
    Report: "den.report.command",
    Predict: "den.report.predict",
    Serve: "den.serve.command",
    DemoConfig: "den.demo",
    DagReportConfig: "den.report.dag.report",
    DagPredict: "den.runs.dag_predict",
    DagExtract: "den.runs.dag_extract",
}
"""The modules whose `main` measures and prints, imported when they are asked for."""
OfDag = DagTrain | DagReportConfig | DagPredict | DagExtract
Command = Train | Fetch | Evaluate | Predict | Serve | Report | DemoConfig | BenchConfig | Info | OfDag


def command(arguments: list[str]) -> Callable[[], int]:
    """Import and return the command that the arguments ask for; called, it runs and returns the exit status.

    Raises ValueError and OSError for wrong input, SystemExit from --help and for options that there are not.
    """
    if arguments in (["--version"], ["-V"]):
        from den_kernels import __version__

        return partial(_print, f"den {__version__}")
    return _prepared(parse(arguments))


def parse(arguments: list[str]) -> Command:
    """The command; options of `train` change the settings of --config, of the run to be resumed, or of a scenario.

    A scenario's name is looked for here rather than by tyro: it, its own options, --config, --resume and --start decide
    what all other options default to, and tyro wants defaults before it parses.  With scenarios as sub-commands the
    settings of all nine would be made for every command, and their own options be parsed twice all the same.

    Raises ValueError for a scenario that is unknown or not that of the stored settings.
    """
    if arguments[:1] == ["train"] and arguments[1:2] and arguments[1].startswith("dag-"):
        arguments = ["dag", *arguments]
    train, dag_train = Train(settings=new_settings()), DagTrain()
    if arguments[:1] == ["train"]:
        if arguments[1:2] and not arguments[1].startswith("-"):
            return _parse_scenario(arguments[1], arguments[2:])
        train = Train(settings=base_settings(new_settings(), arguments[1:]))
    if arguments[:2] == ["dag", "train"]:
        settings, options = _dag_settings(arguments[2:])
        dag_train, arguments = DagTrain(settings=settings), ["dag", "train", *options]
    found: Any = tyro.cli(_commands(train, dag_train), args=arguments, prog="den", description=HELP)
    return getattr(found, "command", found)


def new_settings() -> TrainConfig:
    """The settings of a new run: the compared methods train as long as what they are compared with."""
    return TrainConfig(methods=MethodConfig(updates="estimator"))


def _commands(train: Train, dag_train: DagTrain) -> Any:
    """The type of all commands, for tyro; the settings of the two that train are what their options change."""
    of_dag = (
        Annotated[DagTrain, tyro.conf.subcommand("train", default=dag_train)]
        | Annotated[DagReportConfig, tyro.conf.subcommand("report")]
        | Annotated[DagPredict, tyro.conf.subcommand("predict")]
        | Annotated[DagExtract, tyro.conf.subcommand("extract")]
    )
    dag = make_dataclass("Dag", [("command", Annotated[of_dag, tyro.conf.arg(name="")])], frozen=True)
    return (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Fetch, tyro.conf.subcommand("fetch")]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Predict, tyro.conf.subcommand("predict")]
        | Annotated[Serve, tyro.conf.subcommand("serve")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[DemoConfig, tyro.conf.subcommand("demo")]
        | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
        | Annotated[Info, tyro.conf.subcommand("info")]
        | Annotated[dag, tyro.conf.subcommand("dag", description=DAG_HELP)]
    )


def _parse_scenario(name: str, arguments: list[str]) -> Train:
    """The options that make the scenario first, then all: those of `TrainConfig` change what came of the former."""
    settings = scenario_config(name)  # an unknown name first of all
    if not {"-h", "--help"}.intersection(arguments):
        options, _ = tyro.cli(ScenarioOptions, args=arguments, prog=f"den train {name}", return_unknown_args=True)
        settings = scenario_config(name, options)
    default = TrainScenario(settings=settings)
    command = tyro.cli(TrainScenario, args=arguments, prog=f"den train {name}", default=default)
    if not command.options.quick and (changed := changes(name, command.options, command.settings)):
        shown = ", ".join(f"{key} {ours} ({theirs})" for key, (ours, theirs) in changed.items())
        note = f"den: not as in the {'text' if command.options.paper else 'code'} of the authors (theirs): {shown}"
        return Train(resume=command.resume, settings=command.settings, note=note)
    return Train(resume=command.resume, settings=command.settings)


def _dag_settings(arguments: list[str]) -> tuple[DagTrainConfig, list[str]]:
    """The settings that the options of `den dag train` change, and the options."""
    if not arguments or arguments[0].startswith("-"):
        return base_settings(DagTrainConfig(), arguments), arguments
    from den.dag.scenarios import named_settings

    name, *options = arguments
    named = named_settings(name)
    settings = base_settings(named, options)
    if settings.data.scenario != named.data.scenario:
        raise ValueError(f"den dag train: scenario must be dag-{settings.data.scenario} as stored, got {name}")
    return settings, options


def base_settings(default: Settings, arguments: list[str]) -> Settings:
    """The settings that the options of `train` change: of --config, of the run to be resumed or to start from, or the
    default ones."""
    fields = [("out", Path, default.out), ("start", Path | None, None)]
    places = make_dataclass("Places", fields, bases=(Source,), frozen=True)
    given: Any = tyro.cli(places, args=arguments, prog="den train", return_unknown_args=True, add_help=False)[0]
    if given.config is not None or given.resume:
        return read_config(type(default), given.config or given.out / "config.json")
    if given.start is not None and isinstance(default, TrainConfig):
        return replace(read_config(TrainConfig, given.start / "config.json"), out=default.out)
    return default


def _prepared(settings: Command) -> Callable[[], int]:
    if not isinstance(settings, Train | DagTrain) and launched.processes() > 1:
        raise ValueError(f"den: all commands but train must run in one process, got {launched.processes()}")
    if isinstance(settings, Train):
        from den.recipes.den import train

        return partial(_train, train, settings, "den evaluate")
    if isinstance(settings, DagTrain):
        from den.recipes.dag.search import train as search

        return partial(_train, search, settings, "den dag report")
    if isinstance(settings, Fetch):
        if not settings.names:
            raise ValueError("fetch: names must be at least one image set, got none")
        from den.data.sets import fetch_set, published_archive

        for name in settings.names:
            published_archive(name)
        return partial(_fetch, fetch_set, settings)
    if isinstance(settings, BenchConfig):
        from den.bench import main as bench

        return partial(bench, settings)
    if isinstance(settings, Info):
        from den_kernels.info import format_report

        return lambda: _print(format_report())
    return partial(_done, import_module(REPORTERS[type(settings)]).main, settings)


def _print(text: str) -> int:
    print(text)
    return 0


def _done(run: Callable[[Any], None], settings: Any) -> int:
    run(settings)
    return 0


def _train(train: Callable[..., object], command: Train | DagTrain, measure: str) -> int:
    if isinstance(command, Train) and command.note:
        print(command.note, flush=True)
    train(command.settings, resume=command.resume)
    from den.support import ranks

    if not ranks.first():
        return 0
    if isinstance(command, Train) and command.settings.joint:
        from den.train.folder import read_metrics

        same = read_metrics(command.settings.out)[-1]["equal_structures"]
        print(f"den: one structure for all labels of {same:.1%} of the held-out images")
    return _print(f"den: finished; measure it with: {measure} {command.settings.out}")


def _fetch(fetch_set: Callable[[str, Path], object], command: Fetch) -> int:
    check_folder(command.data_root, "fetch: data-root")
    for name in command.names:
        print(fetch_set(name, command.data_root), flush=True)
    return 0
