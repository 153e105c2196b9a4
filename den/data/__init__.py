"""Image sets and mixed-task batches."""

from den.data.batches import Batch, MixedTaskBatches
from den.data.images import ImageSet
from den.data.scenes import SceneSet
from den.data.sets import load_set, set_names

__all__ = ["Batch", "ImageSet", "MixedTaskBatches", "SceneSet", "load_set", "set_names"]
