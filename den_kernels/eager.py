"""When an op may be called as the plain function that it is."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether nothing traces or transforms the call and its tensors are plain.

    Compilers, dispatch modes, torch.func and forward-mode derivatives do.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return all(tensor is None or type(tensor) in (Tensor, Parameter) for tensor in tensors)


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether nothing but the op itself has to happen: an ordinary call, with no gradient to record.

    A call through `torch.library.custom_op` costs about 20 microseconds, and the first one in a process imports the
    whole of torch._dynamo: two seconds and 75 MB. Inference needs neither.
    """
    records = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return not records and is_ordinary(*tensors)


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raises RuntimeError in forward-mode differentiation: a custom op would answer with tangents of 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op}: inputs must be without tangents, as there is no forward-mode derivative (forward_ad, "
            "torch.func.jvp); got one with a tangent. Use backward()"
        )
