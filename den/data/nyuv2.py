"""NYU-v2: indoor scenes with labels of 40 or 13 classes, depth in metres and surface normals.

(Silberman, Hoiem, Kohli and Fergus, ECCV 2012.)  795 training and 654 test images, 288x384 as they are handed on; see
`den.data.npy_scenes` for the layout.
"""

from pathlib import Path

from den.data.npy_scenes import load_npy_scenes
from den.data.scenes import SceneSet
from den.nn.tasks import Task

CLASSES = (40, 13)  # that the set is handed on with, the usual number first
FARTHEST = 20  # metres; the camera sees 10
LOSS_WEIGHTS = {"segmentation": 1.0, "depth": 3.0, "normals": 20.0}  # of the AdaShare protocol
_SINGLE_TASK = {  # by task and classes
    ("segmentation", 40): {"miou": 0.275, "pixel_accuracy": 0.589},
    ("depth", 1): {"abs_error": 0.62, "rel_error": 0.25, "delta_1": 0.579, "delta_2": 0.858, "delta_3": 0.957},
    ("normals", 3): {
        "mean_angle": 17.5, "median_angle": 14.2, "within_11": 0.349, "within_22": 0.733, "within_30": 0.857,
    },
}  # fmt: skip


def single_task(task: Task) -> dict[str, float]:
    """Published metrics of a network for this task alone (AdaShare protocol: Sun et al., NeurIPS 2020); maybe none."""
    return _SINGLE_TASK.get((task.kind, task.classes), {})


def load_nyuv2(root: Path | str | None, split: str, classes: int | None = None) -> SceneSet:
    """Tasks `segmentation`, `depth` and `normals`; `classes` and ValueError as of `load_npy_scenes`."""
    kinds = ("segmentation", "depth", "normals")
    return load_npy_scenes("nyuv2", root, split, kinds, classes, known_classes=CLASSES, farthest=FARTHEST)
