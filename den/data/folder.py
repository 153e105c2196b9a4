"""People's own images: a folder with a sub-folder of pictures for each class, as torchvision's `ImageFolder` reads it.

    folder:PATH@64     PATH/CLASS/*.jpg; a fifth of every class is the test split, the same whenever it is asked for
                       PATH/train/CLASS/* and PATH/test/CLASS/* (or val, valid, validation): the splits that are given

Pictures of any kind and size are turned upright, cropped to a square about their centre, scaled, and decoded once. A
file that cannot be read is named and left out. Pixels are normalised by the moments of the training split.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from den.data.decode import PART, is_picture, squared
from den.data.images import ImageSet, pixel_moments, stratified_split
from den.data.store import Found, Pixels, stored
from den.support.terminal import complain

PREFIX = "folder:"
SIZE = 64  # pixels, where the name does not say
TEST_FOLDERS = ("test", "val", "valid", "validation")
TEST_SHARE = 0.2  # of every class, where there is one folder for all
NAMED = 5  # broken files that are named one by one
MEASURED = 20_000  # images, at most, that the statistics are of
NAME = re.compile(r"(?P<path>.+?)(?:@(?P<size>\d+))?", re.DOTALL)


@dataclass(frozen=True)
class Listed:
    """Pictures of one folder of classes."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]  # of each file, its place in `classes`


def parse(name: str, prefix: str) -> tuple[str, int]:
    """The part of a name behind its prefix, and the side in pixels.

    >>> parse("folder:pictures/of-2024@96", "folder:"), parse("folder:pictures", "folder:")
    (('pictures/of-2024', 96), ('pictures', 64))
    """
    found = NAME.fullmatch(name.removeprefix(prefix))
    if found is None:
        raise ValueError(f"load_set: name must be {prefix}PATH@SIZE, got {name!r}")
    size = SIZE if found["size"] is None else int(found["size"])
    if not 1 <= size <= 1024:
        raise ValueError(f"load_set: size of {found['path']} must be in 1..1024, got {name!r}")
    return found["path"], size


def open_folder(name: str, split: str, root: Path | str | None) -> ImageSet:
    """The set `folder:PATH@SIZE`; a relative path begins at the data root, where there is one.

    Raises:
        ValueError: no folder there, none of classes, a class without any picture that can be read.
    """
    path, size = parse(name, PREFIX)
    folder = found_folder(path, root)
    train, test = listings(folder)
    if test is None:
        images, labels = read(train, folder, size)
        kept = stratified_split(labels, TEST_SHARE, seed=0)
        train_images = images[kept[0]]
        index = kept[0 if split == "train" else 1]
        images, labels = images[index], labels[index]
    else:
        train_images, train_labels = read(train, folder, size)
        images, labels = (train_images, train_labels) if split == "train" else read(test, folder, size)
    source = f"{PREFIX}{folder.resolve()}"
    return dataclasses.replace(own_set(name, images, labels, train.classes, train_images), source=source)


def own_set(name: str, images: Tensor, labels: Tensor, classes: Sequence[str], train_images: Tensor) -> ImageSet:
    """The set of a split, normalised by the moments of (at most `MEASURED`) training images uint8 [N, C, H, W]."""
    step = -(-len(train_images) // MEASURED)
    mean, std = pixel_moments(train_images[::step].contiguous())
    return ImageSet(
        name, images, labels, len(classes), mean, std, pad=images.shape[-1] // 8, class_names=tuple(classes)
    )


def found_folder(path: str, root: Path | str | None) -> Path:
    """The folder of a path: as it is, in the data root, or, of one that has moved, by its last name there."""
    given = Path(path).expanduser()
    roots = [] if root is None else [Path(root)]
    places = [given] if given.is_absolute() else [*(home / given for home in roots), given]
    places += [home / given.name for home in roots]
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(dict.fromkeys(map(str, places)))
    raise ValueError(f"load_set: folder of {PREFIX}{path} must be there, got none of {looked}")


def listings(folder: Path) -> tuple[Listed, Listed | None]:
    """Pictures of the training split and of the test split; None: the folder does not divide them."""
    for name in TEST_FOLDERS:
        if _folders(folder / "train") and _folders(folder / name):
            train = listed(folder / "train")
            return train, listed(folder / name, train.classes)
    return listed(folder), None


def listed(folder: Path, classes: tuple[str, ...] | None = None) -> Listed:
    """Pictures in the sub-folders of a folder, however deep, in the order of their names.

    classes: those of the training split; the test split may lack some.

    Raises:
        ValueError: no sub-folders, one without pictures, or one that the training split does not have.
    """
    names = _folders(folder)
    if not names:
        raise ValueError(f"load_set: {folder} must hold a folder of pictures for each class, got none")
    if classes and (strange := set(names) - set(classes)):
        raise ValueError(
            f"load_set: classes of {folder} must be those of {folder.parent / 'train'}, got {min(strange)}"
            f" ({len(strange)} differ)"
        )
    classes = classes or tuple(names)
    files, labels = [], []
    for name in names:
        own = list(_pictures(folder / name))
        if not own:
            raise ValueError(f"load_set: {folder / name} must hold pictures, got none")
        files += own
        labels += [classes.index(name)] * len(own)
    return Listed(folder, classes, tuple(files), tuple(labels))


def _folders(folder: Path) -> list[str]:
    """Names of the sub-folders that are not hidden."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pictures(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if is_picture(name))


def read(found: Listed, home: Path, size: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, S, S] and labels int64 [N] of the pictures that can be read, decoded once.

    Those that cannot are named on stderr whenever the set is opened.
    """
    reasons: dict[int, str] = {}
    part = found.folder.relative_to(home).as_posix()
    store = Found((found.folder,), lambda: decoded(found.files, found.labels, size, reasons))
    images, labels = stored(store, home.parent, f"{home.name}{'' if part == '.' else '-' + part}-{size}")
    images, y = without_broken(images, labels, found.files, reasons)
    if missing := set(found.labels) - set(y.tolist()):
        name = found.classes[min(missing)]
        raise ValueError(f"load_set: {found.folder / name} must hold a picture that can be read, got none")
    return images, y


def decoded(files: Sequence[Path | Image.Image], labels: Sequence[int], size: int, reasons: dict[int, str]) -> Pixels:
    """Pictures of size x size pixels, black where one cannot be read; of these "broken" is 1 in the labels.

    reasons: takes what is wrong with each broken one, by its place.
    """
    broken, blank = np.zeros(len(files), np.int64), np.zeros((size, size, 3), np.uint8)

    def parts() -> Iterator[np.ndarray]:
        for start in range(0, len(files), PART):
            part = []
            for k in range(start, min(start + PART, len(files))):
                try:
                    part.append(np.asarray(squared(files[k], size)))
                except Exception as error:  # Pillow raises exceptions of all kinds on damaged files
                    reasons[k] = " ".join(str(error).split())[:100] or type(error).__name__
                    broken[k] = 1
                    part.append(blank)
            yield np.stack(part)

    return Pixels((len(files), *blank.shape), {"y": np.array(labels), "broken": broken}, parts())


def without_broken(
    images: Tensor, labels: dict[str, Tensor], names: Sequence[object], reasons: dict[int, str]
) -> tuple[Tensor, Tensor]:
    """Images [N, 3, S, S] and labels int64 [N] of the pictures that could be read; the others are told by `names`."""
    broken = labels["broken"].bool()
    if not broken.any():
        return images, labels["y"]
    tell_broken([names[k] for k in broken.nonzero().flatten().tolist()], reasons, len(broken))
    kept = (~broken).nonzero().flatten()
    return images[kept], labels["y"][kept]


def tell_broken(names: Sequence[object], reasons: dict[int, str], count: int) -> None:
    """Name files that are left out, on stderr."""
    words = [f"{name}{why and f' ({why})'}" for name, why in zip(names, _padded(reasons, len(names)), strict=True)]
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    complain(f"left out {len(names)} of {count:,} pictures that cannot be read: {', '.join(words[:NAMED])}{more}")


def _padded(reasons: dict[int, str], count: int) -> list[str]:
    """Reasons in the order of the files; of a set that was decoded before they are not known."""
    return [reasons[k] for k in sorted(reasons)] if len(reasons) == count else [""] * count
