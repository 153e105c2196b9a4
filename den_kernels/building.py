"""Helpers for modules built on the ops: weights derived from parameters, and tests of how a call is made.

are_watched         True where hooks have to see modules being called
FoldCache           keeps a value made from tensors until one of them changes
norm_affine         batch norm in eval mode as scale and shift
fold_norm           a convolution's weight and bias with the batch norm after it
is_ordinary         True for a call that nothing traces, transforms or intercepts
is_recorded         True for a call that becomes a graph which outlives it: torch.export, torch.jit.trace
is_traced           True for a call that becomes part of any graph, torch.compile's included
may_fold            True where a module may run on folded weights
refuse_transforms   raises inside torch.func
Standing            the state of modules that a decision was made from, compared with how they are in one call
enlarge             images, interpolated where they are smaller than a stem reads them
stand_in            a weight's shape, dtype and device without its memory

TaskNetwork         stems and heads of tasks around layers that they share, in one call at inference on a CPU; of
DenseConv           a convolution with bias and ReLU (`takes_conv`: which ones) and
DenseHead           a fully connected layer, in the dtypes that
runs_task_network   tells of
"""

from .eager import are_watched, is_ordinary, is_recorded, is_traced, may_fold, refuse_transforms
from .fold_cache import FoldCache
from .folding import fold_norm, norm_affine
from .residual_weights import stand_in
from .standing import Standing
from .task_network import DenseConv, DenseHead, TaskNetwork, enlarge, takes_conv
from .task_network import runs_here as runs_task_network

__all__ = [
    "DenseConv",
    "DenseHead",
    "FoldCache",
    "Standing",
    "TaskNetwork",
    "are_watched",
    "enlarge",
    "fold_norm",
    "is_ordinary",
    "is_recorded",
    "is_traced",
    "may_fold",
    "norm_affine",
    "refuse_transforms",
    "runs_task_network",
    "stand_in",
    "takes_conv",
]
