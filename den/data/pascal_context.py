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

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from den.data.checks import blamed, rows
from den.data.decode import opened, rgb
from den.data.mat import check
from den.data.scenes import MEAN, NOTHING, Scene, SceneSet, checked_target, nearest
from den.nn.tasks import IGNORE, Task

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
# Of the PASCAL-Context protocol with five tasks (Maninis et al., CVPR 2019, and its successors).
LOSS_WEIGHTS = {"segmentation": 1.0, "parts": 2.0, "saliency": 5.0, "normals": 10.0, "edges": 50.0}
LABEL_OF_PART = {name: label for label, names in enumerate(PARTS, 1) for name in names}
TASKS = {"segmentation": ("segmentation", CLASSES), "parts": ("segmentation", len(PARTS) + 1),
         "saliency": ("saliency", 1), "normals": ("normals", 3), "edges": ("edges", 1)}  # fmt: skip


def load_pascal_context(root: Path | str | None, split: str, size: int = 512) -> SceneSet:
    """Tasks `segmentation`, `parts`, `saliency`, `normals` and `edges` on images of size x size.

    `split` is "train" or "test" (val.txt). Parts are unlabelled in images without any. Normals count wherever they
    are given; the class mask that some authors lay over them is not part of the tree.

    Raises ValueError for an unknown split, a size below 1, a root without the tree or a list that is malformed or names
    images that are not there; when a scene is read, for files that are missing, damaged, of another size, or with
    values that the set does not have.
    """
    if split not in SPLITS:
        raise ValueError(f"load_pascal_context: split must be 'train' or 'test', got {split!r}")
    if size < 1:
        raise ValueError(f"load_pascal_context: size must be at least 1, got {size}")
    place = None if root is None else Path(root)
    names_file = place and place / "ImageSets" / "Context" / f"{SPLITS[split]}.txt"
    if place is None or names_file is None or not names_file.is_file() or not (place / "JPEGImages").is_dir():
        raise ValueError(
            f"load_pascal_context: data root must be the PASCAL_MT tree, with ImageSets/Context/{SPLITS[split]}.txt and"
            f" JPEGImages, got {root} (use --data.root)"
        )
    names = _listed(names_file, place / "JPEGImages")
    tasks = tuple(Task(name, classes, size, 3, kind) for name, (kind, classes) in TASKS.items())
    return SceneSet("pascal", tasks, PascalScenes(place, names, size), torch.arange(len(names)))


def _listed(path: Path, images: Path) -> list[str]:
    """The names in a list, one a line; ValueError when one of them is there twice or has no image."""
    with blamed("load_pascal_context", path, "be readable"):
        content = path.read_bytes()
    lines = rows("load_pascal_context", path, content, 1)
    names = [line[0] for line in lines]
    if not names:
        raise ValueError(f"load_pascal_context: {path} must name at least one image, got an empty data set")
    there = {file.stem for file in images.glob("[!.]*.jpg")}
    for name, count in Counter(names).items():
        if name not in there or count > 1:
            got = f"{name} {count} times" if count > 1 else f"{name}, of which {images} has no .jpg"
            raise ValueError(f"load_pascal_context: {path} must name images that are there, each once, got {got}")
    if wide := [line for line in lines if len(line) > 1]:
        raise ValueError(f"load_pascal_context: {path} must name one image a line, got {' '.join(wide[0])!r}")
    return names


class PascalScenes:
    """Reads the scenes of one split."""

    def __init__(self, root: Path, names: Sequence[str], size: int) -> None:
        self.root, self.names, self.size = root, names, size
        self._readers: dict[str, Callable[[str], Tensor]] = {
            "segmentation": self._segmentation,
            "parts": self._parts,
            "saliency": self._saliency,
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

    def _segmentation(self, name: str) -> Tensor:  # int64 [H, W]
        voc = f"semseg/VOC12/{name}.png"
        return self._pixels(voc if (self.root / voc).is_file() else f"semseg/pascal-context/{name}.png", None).long()

    def _saliency(self, name: str) -> Tensor:  # float32 [1, H, W]
        values = self._pixels(f"sal_distill/{name}.png", "L")
        if values.max() == 1:
            raise ValueError(
                f"load_pascal_context: {self.root}/sal_distill/{name}.png must hold saliency of 0..255, got 0..1"
            )
        return (values > 127).float()[None]

    def _parts(self, name: str) -> Tensor:  # int64 [H, W]
        place = f"human_parts/{name}.mat"
        annotation = self._annotation(place, "anno")
        labels = np.zeros(self._pixels(f"JPEGImages/{name}.jpg", "L").shape, np.int64)
        with blamed("load_pascal_context", self.root / place, f"hold parts of {name} as PASCAL-Part has them"):
            for person in _items(annotation["objects"]):
                for part in _items(person["parts"]) if person["class_ind"] == PERSON else ():
                    labels[np.asarray(part["mask"], bool)] = LABEL_OF_PART[part["part_name"]]
        return torch.from_numpy(labels if labels.any() else np.full_like(labels, IGNORE))

    def _label_map(self, name: str) -> Tensor:  # int64 [H, W]
        place = f"pascal-context/trainval/{name}.mat"
        values = self._annotation(place, "LabelMap")
        with blamed("load_pascal_context", self.root / place, "hold a LabelMap of whole numbers [H, W]"):
            if values.ndim != 2 or values.dtype.kind not in "iuf" or (values % 1 != 0).any():
                raise ValueError(f"{values.dtype} {list(values.shape)}")
            return torch.from_numpy(values.astype(np.int64))

    def _annotation(self, place: str, key: str) -> Any:
        from scipy.io import loadmat

        with blamed("load_pascal_context", self.root / place, f"hold {key}"):
            content = (self.root / place).read_bytes()
            check(content)
            return loadmat(io.BytesIO(content), simplify_cells=True)[key]

    def _pixels(self, place: str, mode: str | None) -> Tensor:  # uint8 [H, W] or [H, W, 3]
        with blamed("load_pascal_context", self.root / place, "be a picture"):
            picture = opened(self.root / place)
            return torch.from_numpy(np.array(picture if mode is None else rgb(picture).convert(mode)))


def boundaries(labels: Tensor) -> Tensor:
    """Mark the pixels whose right or lower neighbour has another label: int64 [H, W] -> float32 [H, W] of 0 and 1."""
    edges = torch.zeros(labels.shape, dtype=torch.bool)
    edges[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    edges[:-1] |= labels[1:] != labels[:-1]
    return edges.float()


def framed(values: Tensor, size: int, nothing: float) -> Tensor:
    """Lay [..., H, W] in the upper left of [..., size, size] and fill the rest with `nothing`.

    A larger map is scaled down first, by its nearest pixels.
    """
    height, width = _fitting(values.shape[-2], values.shape[-1], size)
    rows, columns = nearest(values.shape[-2], height), nearest(values.shape[-1], width)
    kept = values[..., rows[:, None], columns]
    return F.pad(kept, (0, size - width, 0, size - height), value=nothing)


def _shrunk(image: Tensor, size: int) -> Tensor:
    """Scale an image [3, H, W] down to fit size x size, with interpolation; a smaller one is returned as it is."""
    fitting = _fitting(image.shape[1], image.shape[2], size)
    if fitting == tuple(image.shape[1:]):
        return image
    return F.interpolate(image[None], size=fitting, mode="bilinear", antialias=True)[0]


def _fitting(height: int, width: int, size: int) -> tuple[int, int]:
    scale = min(1.0, size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _items(value: Any) -> list[Any]:
    """The objects of a MATLAB struct array, which a file with one object holds as the object itself."""
    return [value] if isinstance(value, dict) else list(value)
