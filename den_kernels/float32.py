"""The precision of float32 in a convolution on a GPU, on every path: Triton, CUDA C++ and PyTorch's through cuDNN."""

from typing import Any

import torch


def allows_tf32() -> bool:
    """True where products of float32 convolutions may be rounded to TF32, as cuDNN's are under the same settings.

    `torch.backends.cudnn.conv.fp32_precision` decides. It takes over `torch.backends.cudnn.fp32_precision` and
    `torch.backends.fp32_precision` where it was not set itself, and shows what was said through the older
    `torch.backends.cudnn.allow_tf32`, which raises an error when read after the new settings disagree. On a CPU our own
    kernels multiply in float32 whatever the settings say.
    """
    cudnn: Any = torch.backends.cudnn  # torch's annotations leave out `conv`
    return bool(cudnn.conv.fp32_precision == "tf32")
