"""Checks that the loaders share; a file that fails one is named in a ValueError."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def blamed(op: str, where: str | Path, must: str, hint: str = "") -> Iterator[None]:
    """Turn any exception raised inside the block into ValueError "op: WHERE must MUST, got ...".

    Libraries raise exceptions of all kinds on damaged files.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{op}: {where} must {must}, got {reason}{hint}") from error


def whole_labels(op: str, where: str | Path, values: Any, classes: int) -> np.ndarray:
    """Labels as int64 [N]; ValueError unless each is a whole number of 0..classes - 1."""
    with blamed(op, where, "hold labels that are numbers"):
        labels = np.asarray(values)
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise ValueError(
            f"{op}: {where} must hold a number as the label of each image, got {labels.dtype} {list(labels.shape)}"
        )
    # the comparisons are false for NaN, so that it counts as wrong
    wrong = labels[~((labels >= 0) & (labels < classes) & (labels % 1 == 0))] if len(labels) else labels
    if len(wrong):
        raise ValueError(f"{op}: {where} must hold whole labels of 0..{classes - 1}, got {wrong[0]}")
    return labels.astype(np.int64)


def all_classes(op: str, where: str | Path, labels: np.ndarray, classes: int) -> None:  # labels: [N]
    """Raise ValueError when a class of 0..classes - 1 has no image."""
    if missing := set(range(classes)) - set(labels.tolist()):
        raise ValueError(
            f"{op}: {where} must hold images of all {classes} classes, got none of class {min(missing)}"
            f" ({len(missing)} are missing)"
        )


def text(op: str, where: str | Path, content: bytes) -> str:
    """The text of a list, without a byte-order mark; ValueError when it is not UTF-8."""
    with blamed(op, where, "be text in UTF-8"):
        if b"\0" in content:
            raise ValueError("a NUL byte")
        return content.decode("utf-8-sig")


def rows(op: str, where: str | Path, content: bytes, least: int) -> list[list[str]]:
    """The fields of a list's lines, between blanks; blank lines are passed over. ValueError for a shorter line."""
    found = []
    for number, line in enumerate(text(op, where, content).splitlines(), 1):
        fields = line.split()
        if fields and len(fields) < least:
            raise ValueError(f"{op}: line {number} of {where} must have at least {least} fields, got {line.strip()!r}")
        found += [fields] if fields else []
    return found


def matching(op: str, where: str | Path, listed: Sequence[str], there: Iterable[str], place: str | Path) -> None:
    """Raise ValueError unless a list names everything that is `there`, each once, and nothing else."""
    there, counts = set(there), Counter(listed)
    if len(counts) != len(listed):
        twice = counts.most_common(1)[0][0]
        raise ValueError(f"{op}: {where} must name everything once, got {twice} twice")
    if absent := counts.keys() - there:
        raise ValueError(
            f"{op}: {where} must name what {place} holds, got {min(absent)} which is not there ({len(absent)} in all);"
            " the list or the folder is damaged: unpack the set again"
        )
    if unlisted := there - counts.keys():
        raise ValueError(
            f"{op}: {where} must name all that {place} holds, got no {min(unlisted)} ({len(unlisted)} in all);"
            " the list or the folder is damaged: unpack the set again"
        )
