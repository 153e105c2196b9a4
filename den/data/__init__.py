"""Image sets and mixed-task batches."""

from den.data.batches import Batch, BatchStream, MixedTaskBatches
from den.data.images import ImageSet
from den.data.scenes import SceneSet
from den.data.sets import fetch_set, load_set, set_names

__all__ = ["Batch", "BatchStream", "ImageSet", "MixedTaskBatches", "SceneSet", "fetch_set", "load_set", "set_names"]
