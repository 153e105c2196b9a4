"""What decides whether a module may run on folded weights, and what those depend on."""

import torch
from torch import Tensor, nn


def may_fold(module: nn.Module) -> bool:
    """Whether ``module`` may run on folded weights: in eval mode, without gradients, not being traced."""
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling())


def norm_tensors(norm: nn.BatchNorm2d | None) -> tuple[Tensor, ...]:
    """The tensors of a batch norm that its eval mode depends on."""
    return () if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
