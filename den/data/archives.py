"""The archives in which image sets are published: found in a data root, checked, read without unpacking, fetched.

An archive may lie in the root as it was downloaded, or unpacked; the file, whose checksum is published, comes first,
and a folder in which nothing lies counts as none.
"""

import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from den.data.checks import blamed


@dataclass(frozen=True)
class Archive:
    """One published file."""

    file: str
    folder: str  # the one folder that it unpacks to
    page: str  # where its authors tell of it
    url: str
    md5: str


def find(root: Path, name: str, archives: Sequence[Archive]) -> tuple[Archive, Path]:
    """The first of `archives` that `root` holds, and where; ValueError that tells what to put there."""
    for archive in archives:
        if (root / archive.file).is_file():
            return archive, root / archive.file
    for archive in archives:
        if holds_anything(root / archive.folder):
            return archive, root / archive.folder
    files = " or ".join(archive.file for archive in archives)
    raise ValueError(
        f"load_set: data root of {name!r} must hold {files}, packed or unpacked, got {root}"
        f" (get it from {archives[0].page}, or with den fetch {name} --data-root {root})"
    )


def holds_anything(folder: Path) -> bool:
    """Return True for a folder that holds more than hidden files."""
    return folder.is_dir() and any(not name.startswith(".") for name in os.listdir(folder))


def member_name(place: Path, name: str) -> str:
    """Name of an archive's member for a message: its path where the archive is unpacked."""
    return str(place / name) if place.is_dir() else f"{name} of {place}"


def check(archive: Archive, place: Path) -> None:
    """Raise ValueError for a file without the published checksum; folders are not checked."""
    if place.is_dir():
        return
    with place.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != archive.md5:
        raise ValueError(
            f"load_set: md5 of {place} must be {archive.md5}, got {found}; the download is not complete or damaged:"
            f" delete it and get it again from {archive.page}"
        )


def read(archive: Archive, place: Path, names: Sequence[str]) -> Iterator[bytes]:
    """Contents of the members `names`, paths under the archive's folder, in that order.

    Raises ValueError for a member that is missing (a folder unpacked by half) or cannot be read.
    """
    members = _zip_members if place.suffix == ".zip" else _tar_members
    contents = _folder_members(place, names) if place.is_dir() else members(place, archive.folder, names)
    with blamed("load_set", place, "be complete", hint=f"; unpack {archive.file} again"):
        try:
            yield from contents
        except (KeyError, FileNotFoundError) as error:
            missing = error.filename if isinstance(error, FileNotFoundError) else error.args[0]
            raise ValueError(f"one without {missing}") from error


def _folder_members(place: Path, names: Sequence[str]) -> Iterator[bytes]:
    return ((place / name).read_bytes() for name in names)


def _zip_members(place: Path, folder: str, names: Sequence[str]) -> Iterator[bytes]:
    with zipfile.ZipFile(place) as archive:
        for name in names:
            yield archive.read(f"{folder}/{name}")


def _tar_members(place: Path, folder: str, names: Sequence[str]) -> Iterator[bytes]:
    """The members in one pass over the file: compressed tar archives can only be read from their beginning."""
    wanted, contents = {f"{folder}/{name}" for name in names}, {}
    with tarfile.open(place) as archive:
        for member in archive:
            if member.name in wanted and (file := archive.extractfile(member)):
                contents[member.name] = file.read()
            if len(contents) == len(wanted):
                break
    for name in names:
        yield contents[f"{folder}/{name}"]


def fetch(archive: Archive, root: Path) -> Path:
    """Download an archive into `root` and check it; what is there already and whole is left.

    Raises ValueError when it cannot be had or has another checksum.
    """
    import pooch

    from den.support.progress import Progress

    bar = Progress(0, archive.file, unit="byte")
    try:
        pooch.retrieve(archive.url, f"md5:{archive.md5}", fname=archive.file, path=root, progressbar=bar)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"fetch: {archive.url} must be reachable and have md5 {archive.md5}, got {type(error).__name__}: {reason};"
            f" put {archive.file} of {archive.page} into {root} by hand"
        ) from error
    return root / archive.file
