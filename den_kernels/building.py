"""For modules built on the ops: weights derived from parameters, and what a call may decide.

FoldCache           keeps a value made from tensors until one of them changes
norm_affine         batch norm in eval mode as scale and shift
fold_norm           a convolution's weight and bias with the batch norm after it
is_ordinary         True for a call that nothing traces, transforms or intercepts
refuse_transforms   raises inside torch.func
stand_in            a weight's shape, dtype and device without its memory
"""

from .eager import is_ordinary, refuse_transforms
from .fold_cache import FoldCache
from .folding import fold_norm, norm_affine
from .residual_weights import stand_in

__all__ = ["FoldCache", "fold_norm", "is_ordinary", "norm_affine", "refuse_transforms", "stand_in"]
