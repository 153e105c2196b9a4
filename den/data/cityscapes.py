"""Cityscapes: street scenes with labels of 19 or 7 classes and disparity, the inverse of depth.

(Cordts et al., CVPR 2016.)  2,975 training and 500 test images, 128x256 as they are handed on; see
`den.data.npy_scenes` for the layout. Labels lie in `label_19` or `label_7`, or in `label`.
"""

from __future__ import annotations

from pathlib import Path

from den.data.npy_scenes import load_npy_scenes
from den.data.scenes import SceneSet

CLASSES = 19
LARGEST = 128  # disparity in pixels; the published one ends at 126, what is handed on is often scaled to 0..1
SINGLE_TASK = {  # by task and classes: single-task networks in the AdaShare protocol (Sun et al., NeurIPS 2020)
    ("segmentation", CLASSES): {"miou": 0.402, "pixel_accuracy": 0.747},
    ("depth", 1): {"abs_error": 0.017, "rel_error": 0.33},
}


def load_cityscapes(root: Path | str | None, split: str, classes: int = CLASSES) -> SceneSet:
    """Tasks `segmentation` and `depth` (disparity, as in the literature); ValueError as of `load_npy_scenes`."""
    kinds = ("segmentation", "depth")
    return load_npy_scenes("cityscapes", root, split, kinds, classes, farthest=LARGEST, inverse_depth=True)
