"""When an op may be called as the plain function that it is."""

import torch
from torch import Tensor
from torch.nn import Parameter


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether nothing but the op itself has to happen: no tracing, no gradient to record, ordinary tensors.

    A call through `torch.library.custom_op` costs about 20 microseconds, and the first one in a process imports the
    whole of torch._dynamo: two seconds and 75 MB. Inference needs neither.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) not in (Tensor, Parameter) for tensor in present):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present))
