"""The command line: den train, den evaluate, den demo, den bench, den info, den dag."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from den.bench import BenchConfig
from den.config import DemoConfig, TrainConfig, read_config

HELP = (
    "Deep Elastic Networks: one network for several tasks, as deep and as wide as each image needs."
    " den dag --help: networks over one graph, a topology for each task."
)
Settings = TypeVar("Settings", bound=Any)


@dataclass(frozen=True)
class Train:
    """Train a Deep Elastic Network (Algorithm 1), or its dense baseline with --mode dense."""

    config: Path | None = None
    """JSON file of settings, such as a run's config.json; options given here come before it."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, with the settings that it was started with."""
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained run on its test sets."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of its checkpoints: the last one, or the best on held-out images."""
    data_root: Path | None = None
    """Folder of the sets that do not come with the install; None: where the run had them."""
    static: int = 0
    """Compare with the best of this many single structures of the same cost, chosen on the test images themselves."""
    time: bool = False
    """Measure the time per image, with the full structure and with the selected ones."""
    device: str = "auto"
    """auto: the GPU if there is one, else the CPU.  Or cpu, cuda, cuda:N."""


@dataclass(frozen=True)
class Info:
    """Show versions, devices, which implementations are active, and what is missing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after wrong input (told in one line), 130 after an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in (["--version"], ["-V"]):
        from den_kernels import __version__

        print(f"den {__version__}")
        return 0
    try:
        if arguments[:1] == ["dag"]:
            from den.dag.cli import main as dag

            dag(arguments[1:])
            return 0
        return _run(_parse(arguments))
    except (ValueError, OSError) as error:
        print(f"den: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("den: interrupted; continue a training run with its command and --resume --out FOLDER", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> Train | Evaluate | DemoConfig | BenchConfig | Info:
    train = Train(settings=base_settings(TrainConfig, arguments)) if arguments[:1] == ["train"] else Train()
    command = (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[DemoConfig, tyro.conf.subcommand("demo")]
        | Annotated[BenchConfig, tyro.conf.subcommand("bench")]
        | Annotated[Info, tyro.conf.subcommand("info")]
    )
    return tyro.cli(command, args=arguments, prog="den", description=HELP)  # type: ignore[call-overload]


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


def _run(command: Train | Evaluate | DemoConfig | BenchConfig | Info) -> int:
    if isinstance(command, Train):
        from den.train import train

        train(command.settings, resume=command.resume)
        print(f"den: finished; measure it with: den evaluate {command.settings.out}")
    elif isinstance(command, Evaluate):
        _evaluate(command)
    elif isinstance(command, DemoConfig):
        from den.demo import main as demo

        demo(command)
    elif isinstance(command, BenchConfig):
        from den.bench import main as bench

        return bench(command)
    else:
        from den_kernels.info import format_report

        print(format_report())
    return 0


def _evaluate(command: Evaluate) -> None:
    """Print a line of results per task, and those of the comparisons asked for."""
    from den.checkpoint import load_model
    from den.data import load_set
    from den.device import choose_device
    from den.evaluate import best_static, evaluate, time_per_image
    from den.run_folder import stored_config

    config = stored_config(command.run)
    model = load_model(command.run / f"{command.checkpoint}.safetensors").to(choose_device(command.device))
    sets = [load_set(name, "test", command.data_root or config.data.root) for name in config.data.tasks]
    for image_set in sets:
        choice = "full" if config.mode == "dense" else "selected"
        report = evaluate(model, [image_set], choice)[image_set.name]
        print(
            f"{report.task}: {report.images} images, accuracy {100 * report.accuracy:.2f} %,"
            f" {report.flops / 1e6:.2f} MFLOP per image ({report.flops_ratio:.3f} of the full structure),"
            f" {report.structures} structures in use, entropy {report.entropy:.3f} nats,"
            f" of the mean distribution {report.mean_entropy:.3f}"
        )
        if command.static:
            found = best_static(model, image_set, report.flops, extra=report.common[0], candidates=command.static)
            print(
                f"{report.task}: best of {found.candidates} single structures of that cost:"
                f" accuracy {100 * found.report.accuracy:.2f} % at {found.report.flops_ratio:.3f},"
                f" levels {''.join(map(str, found.structure.tolist()))}"
            )
        if command.time:
            timing = time_per_image(model, image_set)
            print(
                f"{report.task}: {1e6 * timing.dense:.1f} us per image at the full structure,"
                f" {1e6 * timing.selected:.1f} us selected ({1e6 * timing.selector:.1f} us of it the selector):"
                f" {timing.speedup:.2f} times as fast at {timing.flops_ratio:.3f} of the FLOPs"
            )


if __name__ == "__main__":
    sys.exit(main())
