"""den predict: pictures classified by a trained run, as a table, JSON lines and drawings."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from den.data.decode import is_picture, squared
from den.report.figures.predictions import prediction_figure
from den.report.figures.style import save_all
from den.report.settings import Predict
from den.runs.predict import BATCH, Prediction, Predictor, load
from den.support.files import check_file, check_folder, write_text
from den.support.progress import Progress
from den.support.tables import markdown_table
from den.support.terminal import complain

STDOUT = Path("-")
HEAD = ("picture", "task", "class", "probability", "structure", "MFLOP", "of the full")


def main(command: Predict) -> None:
    """Print the predictions, write and draw what is asked for.

    Raises:
        ValueError: wrong input, before anything is predicted; no picture among all that can be read.
    """
    command.check()
    files = list(found_pictures(command.images))
    if command.json not in (None, STDOUT):
        check_file(command.json, "predict: json")
    if command.pictures is not None:
        check_folder(command.pictures, "predict: pictures")
    network = load(command.run, checkpoint=command.checkpoint, device=command.device)
    found, broken = predictions(network, files, command.task, command.top)
    if not found:
        raise ValueError(f"predict: images must hold a picture that can be read, got {len(broken)} that cannot")
    lines = "".join(json.dumps(dataclasses.asdict(each), ensure_ascii=False) + "\n" for each in found)
    if command.json == STDOUT:
        sys.stdout.write(lines)
    else:
        print(table(found))
        if command.json is not None:
            write_text(command.json, lines)
            print(f"den: the predictions are in {command.json}")
    if command.pictures is not None:
        draw(network, found, command.pictures)
        complain(f"the drawings are in {command.pictures}")
    if broken:
        complain(f"left out {len(broken)} of {len(files)} pictures that cannot be read")


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
    network: Predictor, files: Sequence[Path], task: str | None, top: int
) -> tuple[list[Prediction], list[Path]]:
    """Predictions for the files that can be read, and those that cannot, each of which is told."""
    found: list[Prediction] = []
    broken: list[Path] = []
    with Progress(len(files), "predict", unit="picture", leave=False) as bar:
        for start in range(0, len(files), BATCH):
            part = files[start : start + BATCH]
            try:
                found += network.predict(part, task, top=top)
            except ValueError:
                for file in part:  # one by one, to leave out what is broken alone
                    found += _alone(network, file, task, top, broken)
            bar.update(len(part))
    return found, broken


def _alone(network: Predictor, file: Path, task: str | None, top: int, broken: list[Path]) -> list[Prediction]:
    try:
        squared(file, 8)
    except Exception as error:  # Pillow raises exceptions of all kinds on damaged files
        broken.append(file)
        complain(f"{file} cannot be read and is left out: {error}")
        return []
    return network.predict(file, task, top=top)


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


def draw(network: Predictor, found: Sequence[Prediction], folder: Path) -> None:
    """Draw each picture with its predictions into a folder, under its name; those of one name are numbered."""
    by_image: dict[str, list[Prediction]] = {}
    for each in found:
        by_image.setdefault(each.image, []).append(each)
    used: dict[str, int] = {}
    with Progress(len(by_image), "draw", unit="picture", leave=False) as bar:
        for image, own in by_image.items():
            name = Path(image).stem
            used[name] = used.get(name, 0) + 1
            size = max(task.size for task in network.model.tasks)
            figure = prediction_figure(squared(Path(image), max(size, 96)), own, network.model)
            save_all({name if used[name] == 1 else f"{name}-{used[name]}": figure}, folder)
            bar.update()
