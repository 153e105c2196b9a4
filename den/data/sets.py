"""The image sets by name.

`digits` and `fashion` come with the install; the others are read from a folder (`--data-root`), as they are published
and decoded once (`den.data.store`).

| name | images | from |
|---|---|---|
| digits | 1,437 + 360, 8x8 grey | scikit-learn's digits, fixed stratified split |
| fashion | 12,000 + 2,000, 28x28 grey | balanced part of Fashion-MNIST, `packed/fashion.npz` |
| cifar10, cifar100, cifar100-coarse | 50,000 + 10,000, 32x32 | `den.data.cifar` |
| stl10 | 5,000 + 8,000, 96x96 | `den.data.stl10` |
| tinyimagenet | 100,000 + 10,000, 64x64 | `den.data.tinyimagenet` |
| tin50 | 25,000 + 2,500, 64x64 | 50 of its classes |
| imagenet50, miniimagenet | 40,000 or 25,000 for training, 84x84 | `den.data.imagenet` |

`folder:PATH@64` are the pictures of a folder with a sub-folder for each class (`den.data.folder`), `hf:NAME@64` those
of a data set of Hugging Face's `datasets` (`den.data.hub`).

The sets of fifty classes are also ten tasks of five: `tin50-0` to `tin50-9`, by kind, and so on. `@S` behind a name
scales the images to S x S pixels: `stl10@32`, `imagenet50-3@224`.
"""

import dataclasses
import hashlib
import lzma
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from den.data import cifar, folder, hub, stl10, tinyimagenet
from den.data.archives import Archive
from den.data.archives import fetch as fetch_archive
from den.data.checks import blamed
from den.data.cifar import open_cifar
from den.data.imagenet import open_imagenet50, open_miniimagenet
from den.data.images import ImageSet, Kept, pixel_moments, resized, stratified_split
from den.data.store import Found, stored

FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Kind:
    """A set that is read from a data root."""

    find: Callable[..., Found]  # of (root, split), or with `sized` (root, split, size)
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label: str = "y"
    pad: int = 4  # the paper pads all but ImageNet
    size: int | None = None  # the side that its pictures, of any size, are decoded to; None: all have the same
    tasks: int = 0  # that it can be divided into
    task_labels: tuple[str, ...] = ()  # which of these, and number within it; (): classes in order, as many a task
    archive: Archive | None = None
    class_names: tuple[str, ...] = ()


_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_TINY = ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINDS = {
    "cifar10": Kind(
        partial(open_cifar, "cifar10"), 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
        archive=cifar.VERSIONS["cifar10"][0].archive, class_names=cifar.CIFAR10_NAMES,
    ),
    "cifar100": Kind(
        partial(open_cifar, "cifar100"), 100, *_CIFAR100, "fine", archive=cifar.VERSIONS["cifar100"][0].archive
    ),
    "cifar100-coarse": Kind(
        partial(open_cifar, "cifar100"), 20, *_CIFAR100, "coarse", archive=cifar.VERSIONS["cifar100"][0].archive
    ),
    "stl10": Kind(
        stl10.open_stl10, 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), archive=stl10.ARCHIVE,
        class_names=stl10.NAMES,
    ),
    "tinyimagenet": Kind(tinyimagenet.open_tinyimagenet, 200, *_TINY, archive=tinyimagenet.ARCHIVE),
    "tin50": Kind(
        tinyimagenet.open_tin50, 50, *_TINY, tasks=10, task_labels=("c", "k"), archive=tinyimagenet.ARCHIVE
    ),
    "imagenet50": Kind(open_imagenet50, 50, *_IMAGENET, pad=0, size=84, tasks=10),
    "miniimagenet": Kind(open_miniimagenet, 50, *_IMAGENET, pad=0, size=84, tasks=10),
}  # fmt: skip
NAME = re.compile(r"(?P<set>.+?)(?:-(?P<task>\d+))?(?:@(?P<size>\d+))?")


def load_set(name: str, split: str, root: Path | str | None = None) -> ImageSet:
    """The set `name`; `split` is "train" or "test"; `root`: folder of the sets that do not come with the install.

    Normalisation constants are those of the training split, for both splits. Raises ValueError for an unknown name
    or split, a missing root, and files that are missing, damaged or of another layout.
    """
    if split not in SPLITS:
        raise ValueError(f"load_set: split must be 'train' or 'test', got {split!r}")
    if name.startswith(folder.PREFIX):
        return folder.open_folder(name, split, root)
    if name.startswith(hub.PREFIX):
        return hub.open_hub(name, split, root)
    base, task, size = _parse(name)
    image_set = _INSTALLED[base](split) if base in _INSTALLED else _read(name, base, task, size, split, root)
    image_set = image_set if size in (None, image_set.images.shape[-1]) else resized(image_set, size)
    return dataclasses.replace(image_set, name=name, source=image_set.source or base)


def normalisation(name: str, root: Path | str | None = None) -> Kept:
    """Moments of a set's training pixels and names of its classes; people's own sets are read for it (`load_set`)."""
    base = None if name.startswith((folder.PREFIX, hub.PREFIX)) else _parse(name)[0]
    if base in KINDS:
        return Kept(KINDS[base].mean, KINDS[base].std, KINDS[base].class_names)
    return load_set(name, "train", root).kept


def set_names() -> tuple[str, ...]:
    """Names that `load_set` knows, without those of tasks within a set and of other sizes."""
    return (*_INSTALLED, *KINDS)


def fetch_set(name: str, root: Path) -> Path:
    """Download the archive of a set into `root`; ValueError for a set that cannot be had so."""
    return fetch_archive(published_archive(name), root)


def published_archive(name: str) -> Archive:
    """The archive that a set can be fetched in; ValueError for a set that cannot be had so."""
    base, _, _ = _parse(name)
    archive = KINDS[base].archive if base in KINDS else None
    if archive is None:
        fetchable = ", ".join(known for known, kind in KINDS.items() if kind.archive)
        raise ValueError(f"fetch: name must be one of {fetchable}, got {name!r}")
    return archive


def _parse(name: str) -> tuple[str, int | None, int | None]:
    """Set, task within it, side in pixels: `_parse("tin50-3@32") == ("tin50", 3, 32)`."""
    parts = NAME.fullmatch(name)
    base = parts["set"] if parts else name
    if parts is None or base not in set_names():
        raise ValueError(
            f"load_set: name must be one of {', '.join(set_names())}, or folder:PATH, hf:NAME, got {name!r}"
        )
    task, size = (None if parts[key] is None else int(parts[key]) for key in ("task", "size"))
    tasks = KINDS[base].tasks if base in KINDS else 0
    if task is not None and task >= tasks:
        numbers = f"a number of 0..{tasks - 1}" if tasks else "no number"
        raise ValueError(f"load_set: name must have {numbers} behind {base}-, got {name!r}")
    if size is not None and not 1 <= size <= 1024:
        raise ValueError(f"load_set: size of {base} must be in 1..1024, got {name!r}")
    return base, task, size


def _read(name: str, base: str, task: int | None, size: int | None, split: str, root: Path | str | None) -> ImageSet:
    kind = KINDS[base]
    if root is None or not Path(root).is_dir():
        raise ValueError(f"load_set: data root of {name!r} must be a folder, got {root} (use --data-root)")
    decoded = (size or kind.size,) if kind.size else ()
    found = kind.find(Path(root), split, *decoded)
    images, labels = stored(found, Path(root), "-".join(map(str, (base.removesuffix("-coarse"), split, *decoded))))
    y, classes, ids = labels[kind.label], kind.classes, torch.arange(len(images))
    if task is not None:
        share = classes // kind.tasks
        group, number = (labels[each] for each in kind.task_labels) if kind.task_labels else (y // share, y % share)
        member = (group == task).nonzero().flatten()
        if not len(member):
            raise ValueError(f"load_set: {root} must hold images of {name!r} ({split}), got none")
        images, y, classes, ids = images[member], number[member], share, member
    source = base.removesuffix("-coarse")
    return ImageSet(
        name, images, y, classes, kind.mean, kind.std, kind.pad, class_names=kind.class_names, source=source, ids=ids
    )


def _digits(split: str) -> ImageSet:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)  # float64 [1797, 64], values 0..16
    images = torch.from_numpy((pixels * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(classes).long()
    train, test = stratified_split(labels, held_out=0.2, seed=0)
    mean, std = pixel_moments(images[train])
    index = train if split == "train" else test
    return ImageSet("digits", images[index], labels[index], 10, mean, std, pad=1, flip=False,
                    class_names=tuple("0123456789"))  # fmt: skip


def _fashion(split: str) -> ImageSet:
    source = resources.files("den.data").joinpath("packed", "fashion.npz")
    with blamed("load_set", str(source), "be complete", hint="; reinstall the package"):
        with source.open("rb") as file, np.load(file, allow_pickle=False) as packed:
            stream, labels, expected = (packed[f"{split}_{key}"] for key in ("images", "labels", "sha256"))
        pixels = lzma.decompress(stream.tobytes())
    if hashlib.sha256(pixels).digest() != expected.tobytes():
        raise ValueError(f"load_set: pixels of fashion {split} must match their sha256; reinstall the package")
    images = torch.from_numpy(np.frombuffer(pixels, np.uint8).copy()).view(-1, 1, 28, 28)
    mean, std = (0.2870,), (0.3536,)  # of the training images of fashion.npz
    return ImageSet("fashion", images, torch.from_numpy(labels).long(), 10, mean, std, pad=2, flip=True,
                    class_names=FASHION_CLASSES)  # fmt: skip


_INSTALLED: dict[str, Callable[[str], ImageSet]] = {"digits": _digits, "fashion": _fashion}
