"""What tests against the strict reference share."""

import torch
from torch import nn

from den_kernels import DynamicConv2d


@torch.no_grad()
def unlike_new(module: nn.Module, bias: float = 0.5) -> nn.Module:
    """The module with a weight, bias and statistics of its own for every batch norm, and a bias for what has one."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.uniform_(-bias, bias)
            layer.running_mean.uniform_(-bias, bias)
            layer.running_var.uniform_(0.5, 1.5)
        elif isinstance(layer, DynamicConv2d) and layer.bias is not None:
            layer.bias.uniform_(-bias, bias)
    return module


def assert_trained_alike(module: nn.Module, oracle: nn.Module, rtol: float = 1e-8, atol: float = 1e-8) -> None:
    """Gradients (none is zero) and running statistics, float64, are the oracle's."""
    for (name, parameter), other in zip(module.named_parameters(), oracle.parameters(), strict=True):
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, other.grad, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    for (name, buffer), other in zip(module.named_buffers(), oracle.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(
                buffer, other, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_steps_alike(
    model: nn.Module, twin: nn.Module, got: torch.Tensor, wanted: torch.Tensor, names: tuple[str, ...]
) -> None:
    """Results [...], and gradients of the parameters whose names begin so, are the twin's but for rounding."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    (got.square().sum() / 100).backward()
    (wanted.square().sum() / 100).backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None and name.startswith(names):
            gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad
            torch.testing.assert_close(gradient, theirs.grad, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
