"""PASCAL-Context with five dense tasks, in the PASCAL_MT tree (Maninis, Radosavovic and Kokkinos, CVPR 2019).

    ROOT/ImageSets/Context/{train,val}.txt     names, one a line
    ROOT/JPEGImages/NAME.jpg
    ROOT/semseg/VOC12/NAME.png                 classes 0..20, 255 unlabelled; or semseg/pascal-context/NAME.png
    ROOT/human_parts/NAME.mat                  PASCAL-Part annotation `anno`
    ROOT/sal_distill/NAME.png                  saliency, above 127 salient
    ROOT/normals_distill/NAME.png              normals, -1..1 as 0..255
    ROOT/pascal-context/trainval/NAME.mat      `LabelMap`, whose boundaries are the edges

4,998 training and 5,105 test images of different sizes; they are laid in the upper left of square ones, and scaled
down first where they are larger.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from den.data.scenes import MEAN, NOTHING, Scene, SceneSet, checked_target, nearest
from den.tasks import IGNORE, Task

SPLITS = {"train": "train", "test": "val"}
CLASSES = 21
PERSON = 15
PARTS = (  # label 1 and so on: head, torso, upper arms, lower arms, upper legs, lower legs; 0 is what is no part
    ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),
    ("neck", "torso"),
    ("luarm", "ruarm"),
    ("lhand", "llarm", "rhand", "rlarm"),
    ("luleg", "ruleg"),
    ("lfoot", "llleg", "rfoot", "rlleg"),
)
LABEL_OF_PART = {name: label for label, names in enumerate(PARTS, 1) for name in names}
TASKS = {"segmentation": ("segmentation", CLASSES), "parts": ("segmentation", len(PARTS) + 1),
         "saliency": ("saliency", 1), "normals": ("normals", 3), "edges": ("edges", 1)}  # fmt: skip


def load_pascal_context(root: Path | str | None, split: str, size: int = 512) -> SceneSet:
    """Tasks `segmentation`, `parts`, `saliency`, `normals` and `edges` on images of size x size.

    `split` is "train" or "test" (val.txt).  Parts are unlabelled in images without any.  Normals count wherever they
    are given; the class mask that some authors lay over them is not part of the tree.

    Raises ValueError for an unknown split, a size below 1, a root without the tree or a list without names; when a
    scene is read, for files that are missing, damaged or of another size.
    """
    if split not in SPLITS:
        raise ValueError(f"load_pascal_context: split must be 'train' or 'test', got {split!r}")
    if size < 1:
        raise ValueError(f"load_pascal_context: size must be at least 1, got {size}")
    names_file = None if root is None else Path(root) / "ImageSets" / "Context" / f"{SPLITS[split]}.txt"
    if names_file is None or not names_file.is_file() or not (Path(root) / "JPEGImages").is_dir():
        raise ValueError(
            f"load_pascal_context: data root must be the PASCAL_MT tree, with ImageSets/Context/{SPLITS[split]}.txt and"
            f" JPEGImages, got {root} (use --data.root)"
        )
    names = names_file.read_text(encoding="utf-8").split()
    if not names:
        raise ValueError(f"load_pascal_context: {names_file} must name at least one image, got an empty data set")
    tasks = tuple(Task(name, classes, size, 3, kind) for name, (kind, classes) in TASKS.items())
    return SceneSet("pascal", tasks, PascalScenes(Path(root), names, size), torch.arange(len(names)))


class PascalScenes:
    """Reads the scenes of one split."""

    def __init__(self, root: Path, names: Sequence[str], size: int) -> None:
        self.root, self.names, self.size = root, names, size
        self._readers: dict[str, Callable[[str], Tensor]] = {
            "segmentation": self._segmentation,
            "parts": self._parts,
            "saliency": lambda name: (self._pixels(f"sal_distill/{name}.png", "L") > 127).float()[None],
            "normals": lambda name: self._pixels(f"normals_distill/{name}.png", "RGB").permute(2, 0, 1) / 127.5 - 1,
            "edges": lambda name: boundaries(self._label_map(name))[None],
        }

    def __call__(self, position: int, tasks: Sequence[Task]) -> Scene:
        name = self.names[position]
        image = self._pixels(f"JPEGImages/{name}.jpg", "RGB").permute(2, 0, 1) / 255
        targets = {}
        for task in tasks:
            target = checked_target(task, self._readers[task.name](name), image, f"{self.root}, {task.name} of {name}")
            targets[task.name] = framed(target, self.size, NOTHING[task.kind])
        colours = [
            framed(channel, self.size, mean) for channel, mean in zip(_shrunk(image, self.size), MEAN, strict=True)
        ]
        return Scene(torch.stack(colours), targets)

    def _segmentation(self, name: str) -> Tensor:
        voc = f"semseg/VOC12/{name}.png"
        return self._pixels(voc if (self.root / voc).is_file() else f"semseg/pascal-context/{name}.png", None).long()

    def _parts(self, name: str) -> Tensor:
        annotation = self._annotation(f"human_parts/{name}.mat", "anno")
        labels = np.zeros(self._pixels(f"JPEGImages/{name}.jpg", "L").shape, np.int64)
        try:
            for person in _listed(annotation["objects"]):
                for part in _listed(person["parts"]) if person["class_ind"] == PERSON else ():
                    labels[np.asarray(part["mask"], bool)] = LABEL_OF_PART[part["part_name"]]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"load_pascal_context: parts of {name} must be PASCAL-Part's, got {error!r}") from error
        return torch.from_numpy(labels if labels.any() else np.full_like(labels, IGNORE))

    def _label_map(self, name: str) -> Tensor:
        return torch.from_numpy(self._annotation(f"pascal-context/trainval/{name}.mat", "LabelMap").astype(np.int64))

    def _annotation(self, place: str, key: str) -> Any:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        try:
            return loadmat(self.root / place, simplify_cells=True)[key]
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError, MatReadError, zlib.error) as error:
            raise ValueError(f"load_pascal_context: {place} must hold {key}, got {error}") from error

    def _pixels(self, place: str, mode: str | None) -> Tensor:  # uint8 [H, W] or [H, W, 3]
        from PIL import Image

        try:
            with Image.open(self.root / place) as picture:
                return torch.from_numpy(np.array(picture if mode is None else picture.convert(mode)))
        except OSError as error:
            raise ValueError(f"load_pascal_context: {place} must be a picture, got {error}") from error


def boundaries(labels: Tensor) -> Tensor:
    """1 where a pixel's label is not that of its right or its lower neighbour, else 0: [H, W] -> float32 [H, W]."""
    edges = torch.zeros(labels.shape, dtype=torch.bool)
    edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edges[:-1] |= labels[1:] != labels[:-1]
    return edges.float()


def framed(values: Tensor, size: int, nothing: float) -> Tensor:
    """[..., H, W] in the upper left of [..., size, size], every n-th pixel where it is larger, `nothing` around it."""
    height, width = _fitting(*values.shape[-2:], size)
    rows, columns = nearest(values.shape[-2], height), nearest(values.shape[-1], width)
    kept = values[..., rows[:, None], columns]
    return F.pad(kept, (0, size - width, 0, size - height), value=nothing)


def _shrunk(image: Tensor, size: int) -> Tensor:
    """An image [3, H, W] that is larger than size x size scaled down to fit, with interpolation."""
    fitting = _fitting(*image.shape[1:], size)
    if fitting == tuple(image.shape[1:]):
        return image
    return F.interpolate(image[None], size=fitting, mode="bilinear", antialias=True)[0]


def _fitting(height: int, width: int, size: int) -> tuple[int, int]:
    scale = min(1.0, size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _listed(value: Any) -> list[Any]:
    """The objects of a MATLAB struct array, which a file with one object holds as the object itself."""
    return [value] if isinstance(value, dict) else list(value)
