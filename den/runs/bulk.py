"""Many pictures: predicted in parts, each a file that is there whole or not at all, so that a job can go on.

OUT/job.json                the run and the settings that the parts are of
OUT/part-00000.jsonl        predictions of the first `PART` pictures (or .parquet)
OUT/part-00000.broken.jsonl those of them that cannot be read, and why; only where there are some
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from den.data.decode import squared
from den.inference.pretrained import CONFIG, WEIGHTS
from den.runs.engine_folder import holds_engine
from den.runs.predict import BATCH, Classifier, Prediction
from den.support.files import check_folder, write_text, write_whole
from den.support.progress import Progress

PART = 512  # pictures of a part
JOB = "job.json"
Broken = tuple[Path, str]  # a picture that cannot be read, and why


@dataclass(frozen=True)
class Job:
    """Pictures to be predicted, by which run, and where the predictions go."""

    run: Path  # or the folder of an engine
    files: tuple[Path, ...]
    out: Path
    checkpoint: Literal["last", "best"] = "last"
    task: str | None = None  # None: all
    top: int = 5
    form: Literal["jsonl", "parquet"] = "jsonl"
    device: str = "auto"
    size: int = field(default_factory=lambda: PART)  # pictures of a part

    def part(self, number: int) -> tuple[Path, ...]:
        """The pictures of a part."""
        return self.files[number * self.size : (number + 1) * self.size]

    def place(self, number: int) -> Path:
        """The file of a part."""
        return self.out / f"part-{number:05d}.{self.form}"

    def identity(self) -> dict[str, Any]:
        """Facts that the parts depend on, as JSON."""
        names = "\0".join(str(file.absolute()) for file in self.files).encode("utf-8", "surrogateescape")
        parts = [WEIGHTS, CONFIG] if holds_engine(self.run) else [f"{self.checkpoint}.safetensors"]
        weights = b"".join((self.run / name).read_bytes() for name in parts)
        return {
            "run": str(self.run.resolve()),
            "weights": hashlib.sha256(weights).hexdigest(),
            "pictures": hashlib.sha256(names).hexdigest(),
            **{name: getattr(self, name) for name in ("checkpoint", "task", "top", "form", "size")},
        }


@dataclass(frozen=True)
class Done:
    """A part that has been written."""

    number: int
    pictures: int
    broken: tuple[Broken, ...]


Parts = Callable[[Job, Sequence[int]], Iterator[Done]]


def predicted(
    network: Classifier, files: Sequence[Path], task: str | None, top: int
) -> Iterator[tuple[int, list[Prediction], list[Broken]]]:
    """Yield, batch by batch, the number of pictures, predictions of those that can be read, and those that cannot."""
    for start in range(0, len(files), BATCH):
        part, broken = files[start : start + BATCH], []
        try:
            found = network.predict(part, task, top=top)
        except ValueError:
            broken = [(file, why) for file in part if (why := _fault(file))]
            readable = [file for file in part if file not in dict(broken)]
            found = network.predict(readable, task, top=top) if readable else []
        yield len(part), found, broken


def _fault(file: Path) -> str:
    """The reason why a picture cannot be read; empty for one that can."""
    try:
        squared(file, 8)
    except Exception as error:  # Pillow raises exceptions of all kinds on damaged files
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def prepared(job: Job) -> list[int]:
    """The numbers of the parts that are not there yet; the folder says which job it is of from now on.

    Raises ValueError for a folder of another job.
    """
    identity, path = job.identity(), job.out / JOB
    check_folder(job.out, "predict: out")
    if not path.exists():
        if any(job.out.glob("part-*")):
            raise ValueError(f"predict: out must be a new folder or one of the same job, got {job.out} without {JOB}")
        write_text(path, json.dumps(identity, indent=2) + "\n")
    try:
        stored = json.loads(path.read_bytes())
        differ = [name for name in identity if stored.get(name) != identity[name]]
    except (OSError, ValueError, AttributeError) as why:
        raise ValueError(f"predict: out must be a new folder or one of the same job, got {path}: {why}") from why
    if differ:
        raise ValueError(
            f"predict: out must be a new folder or one of the same job, got {job.out} of other {', '.join(differ)}"
        )
    return [k for k in range(-(-len(job.files) // job.size)) if not job.place(k).exists()]


def write_part(network: Classifier, job: Job, number: int) -> Done:
    """Predict the pictures of a part and write its file."""
    files, found, broken = job.part(number), list[Prediction](), list[Broken]()
    for _, good, bad in predicted(network, files, job.task, job.top):
        found += good
        broken += bad
    place = job.place(number)
    if broken:
        lines = [json.dumps({"image": str(file), "error": why}, ensure_ascii=False) + "\n" for file, why in broken]
        write_text(place.with_suffix(".broken.jsonl"), "".join(lines))
    if job.form == "parquet":
        write_whole(place, as_parquet(found))
    else:
        write_text(place, as_lines(found))
    return Done(number, len(files), tuple(broken))


def as_lines(found: Sequence[Prediction]) -> str:
    """Predictions as JSON, a line each."""
    return "".join(json.dumps(dataclasses.asdict(each), ensure_ascii=False) + "\n" for each in found)


def as_parquet(found: Sequence[Prediction]) -> bytes:
    """Predictions as a Parquet file: the same names and values as in JSON; `top` has a list of {label, probability}."""
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    text, real = arrow.string(), arrow.float64()
    likeliest = arrow.struct([("label", text), ("probability", real)])
    kinds = {"image": text, "task": text, "label": text, "confidence": real, "top": arrow.list_(likeliest)}
    kinds |= {"levels": arrow.list_(arrow.int32()), "flops": real, "flops_ratio": real}
    rows = [dataclasses.asdict(each) for each in found]
    for row in rows:
        row["top"] = [{"label": label, "probability": chance} for label, chance in row["top"]]
        row["image"] = row["image"].encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows, arrow.schema(list(kinds.items()))), file)
    return file.getvalue()


def in_this_process(network: Classifier, job: Job, numbers: Sequence[int]) -> Iterator[Done]:
    """Write parts, one after the other."""
    for number in numbers:
        yield write_part(network, job, number)


def run(job: Job, parts: Parts) -> tuple[int, list[Broken]]:
    """Write the parts that are missing, with a bar; returns the number of pictures done now, and those left out."""
    numbers, broken, pictures = prepared(job), list[Broken](), 0
    waiting = sum(len(job.part(number)) for number in numbers)
    with Progress(len(job.files), "predict", unit="picture", initial=len(job.files) - waiting, leave=False) as bar:
        for done in parts(job, numbers) if numbers else ():
            broken += done.broken
            pictures += done.pictures
            bar.update(done.pictures)
    return pictures, broken
