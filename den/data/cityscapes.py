"""Cityscapes: street scenes with labels of 19 or 7 classes and disparity, the inverse of depth.

(Cordts et al., CVPR 2016.)  2,975 training and 500 test images, 128x256 as they are handed on; see
`den.data.npy_scenes` for the layout. Labels lie in `label_19` or `label_7`, or in `label`.
"""

from pathlib import Path

from den.data.npy_scenes import load_npy_scenes
from den.data.scenes import SceneSet
from den.nn.tasks import Task

CLASSES = (19, 7)  # that the set is handed on with, the usual number first
LARGEST = 128  # disparity in pixels; the published one ends at 126, what is handed on is often scaled to 0..1
LOSS_WEIGHTS = {"segmentation": 1.0, "depth": 20.0}  # of the AdaShare protocol
SMALL = 128  # rows of the images as they are mostly handed on; the larger ones have 256 or more
_SINGLE_TASK = {  # by task, classes and whether the images are small
    ("segmentation", 19, False): {"miou": 0.402, "pixel_accuracy": 0.747},
    ("segmentation", 7, False): {"miou": 0.644, "pixel_accuracy": 0.778},
    ("segmentation", 7, True): {"miou": 0.519, "pixel_accuracy": 0.722},
    ("depth", 1, False): {
        "abs_error": 0.017, "rel_error": 0.33, "delta_1": 0.703, "delta_2": 0.863, "delta_3": 0.933,
    },
}  # fmt: skip


def single_task(task: Task) -> dict[str, float]:
    """Published metrics of a network for this task alone, at the size of its images; maybe none.

    19 classes and depth: the AdaShare protocol (Sun et al., NeurIPS 2020); 7 classes: networks of LibMTL's protocol.
    """
    return _SINGLE_TASK.get((task.kind, task.classes, task.size <= SMALL), {})


def load_cityscapes(root: Path | str | None, split: str, classes: int | None = None) -> SceneSet:
    """Tasks `segmentation` and `depth` (disparity, as in the literature); `classes` and ValueError as of
    `load_npy_scenes`."""
    return load_npy_scenes(
        "cityscapes", root, split, ("segmentation", "depth"), classes,
        known_classes=CLASSES, farthest=LARGEST, inverse_depth=True,
    )  # fmt: skip
