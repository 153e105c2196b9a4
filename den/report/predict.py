"""den predict: pictures classified by a trained network, as a table, JSON lines and drawings."""

import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from den.data.decode import is_picture, squared
from den.report.figures.predictions import prediction_figure
from den.report.figures.style import save_all
from den.report.settings import Predict
from den.runs.bulk import Job, Parts, as_lines, in_this_process, predicted, run
from den.runs.predict import Classifier, Prediction, load
from den.support.files import check_file, check_folder, write_text
from den.support.progress import Progress
from den.support.tables import markdown_table
from den.support.terminal import complain

STDOUT = Path("-")
EXTRA = "needs the extra `serve`: pip install 'den-kernels[serve]'"
HEAD = ("picture", "task", "class", "probability", "structure", "MFLOP", "of the full")


def main(command: Predict) -> None:
    """Print the predictions, write and draw what is asked for.

    Raises:
        ValueError: wrong input, before anything is predicted; no picture among all that can be read.
    """
    command.check()
    files = list(found_pictures(command.images))
    if command.out is not None:
        in_parts(command, command.out, files)
        return
    if command.json not in (None, STDOUT):
        check_file(command.json, "predict: json")
    if command.pictures is not None:
        check_folder(command.pictures, "predict: pictures")
    network = load(command.run, checkpoint=command.checkpoint, device=command.device)
    found, broken = predictions(network, files, command.task, command.top)
    if not found:
        raise ValueError(f"predict: images must hold a picture that can be read, got {len(broken)} that cannot")
    if command.json == STDOUT:
        sys.stdout.write(as_lines(found))
    else:
        print(table(found))
        if command.json is not None:
            write_text(command.json, as_lines(found))
            print(f"den: the predictions are in {command.json}")
    if command.pictures is not None:
        draw(network, found, command.pictures)
        complain(f"the drawings are in {command.pictures}")
    if broken:
        complain(f"left out {len(broken)} of {len(files)} pictures that cannot be read")


def in_parts(command: Predict, out: Path, files: Sequence[Path]) -> None:
    """Write the predictions in parts to a folder, those that are not there yet, in this process or on Ray Data."""
    needed = {"ray": command.ray, "pyarrow": command.ray or command.format == "parquet"}
    if missing := [name for name, wanted in needed.items() if wanted and find_spec(name) is None]:
        raise ValueError(f"den predict: {EXTRA} ({missing[0]} is not there)")
    device = "cpu" if command.ray else command.device
    network = load(command.run, checkpoint=command.checkpoint, device=device)  # told now what is wrong with it
    task = None if command.task is None else network.task(command.task).name
    job = Job(command.run, tuple(files), out, command.checkpoint, task, command.top, command.format, command.device)
    parts: Parts = partial(in_this_process, network)
    if command.ray:
        from den.runs.bulk_ray import on_ray

        parts = partial(on_ray, address=command.ray_address, workers=command.workers)
    done, broken = run(job, parts)
    for file, why in broken:
        complain(f"{file} cannot be read and is left out: {why}")
    print(f"den: the predictions are in {out}: {done:,} pictures now, {len(files) - done:,} before")
    if broken:
        complain(f"left out {len(broken)} of {done} pictures that cannot be read")


def found_pictures(places: Sequence[Path]) -> Iterator[Path]:
    """The files given, and in folders the pictures however deep; ValueError for what is not there, or holds none."""
    for place in places:
        if place.is_file():
            yield place
            continue
        if not place.is_dir():
            raise ValueError(f"predict: images must be pictures or folders of them, got {place}, which is not there")
        inside = [
            Path(folder) / name
            for folder, _, names in sorted(os.walk(place))
            for name in sorted(names)
            if is_picture(name)
        ]
        if not inside:
            raise ValueError(f"predict: images must be pictures or folders of them, got {place} without a picture")
        yield from inside


def predictions(
    network: Classifier, files: Sequence[Path], task: str | None, top: int
) -> tuple[list[Prediction], list[Path]]:
    """Predictions for the files that can be read, and those that cannot, each of which is told."""
    found: list[Prediction] = []
    left: list[Path] = []
    with Progress(len(files), "predict", unit="picture", leave=False) as bar:
        for count, good, broken in predicted(network, files, task, top):
            found += good
            for file, why in broken:
                left.append(file)
                complain(f"{file} cannot be read and is left out: {why}")
            bar.update(count)
    return found, left


def table(found: Sequence[Prediction]) -> str:
    """A row for each prediction."""
    rows = [
        [
            each.image, each.task, each.label, f"{each.confidence:.1%}", "".join(map(str, each.levels)),
            f"{each.flops / 1e6:.2f}", f"{each.flops_ratio:.0%}",
        ]
        for each in found
    ]  # fmt: skip
    return markdown_table(HEAD, rows)


def draw(network: Classifier, found: Sequence[Prediction], folder: Path) -> None:
    """Draw each picture with its predictions into a folder, under its name; those of one name are numbered."""
    by_image: dict[str, list[Prediction]] = {}
    for each in found:
        by_image.setdefault(each.image, []).append(each)
    used: dict[str, int] = {}
    with Progress(len(by_image), "draw", unit="picture", leave=False) as bar:
        for image, own in by_image.items():
            name = Path(image).stem
            used[name] = used.get(name, 0) + 1
            figure = prediction_figure(squared(Path(image), max(network.size, 96)), own, network)
            save_all({name if used[name] == 1 else f"{name}-{used[name]}": figure}, folder)
            bar.update()
