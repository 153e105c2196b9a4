"""A way to make `nn.SyncBatchNorm.convert_sync_batchnorm` keep our batch norms, which share statistics themselves.

It replaces every batch norm, by its base class, with one that takes no selection. There is nothing to override in the
module that is replaced, so the method itself is wrapped; for all other modules it does what it did.
"""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

Kind = TypeVar("Kind", bound=type[nn.Module])


def kept_by_convert_sync_batchnorm(kind: Kind) -> Kind:
    """Decorate a class whose instances are then kept: only their `process_group` is set, to "world" for None."""
    replace: Any = nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]

    def convert_sync_batchnorm(
        cls: type, module: nn.Module, process_group: dist.ProcessGroup | None = None
    ) -> nn.Module:
        if not isinstance(module, kind):
            return replace(cls, module, process_group)
        module.process_group = "world" if process_group is None else process_group  # type: ignore[assignment]
        return module

    convert_sync_batchnorm.__doc__ = replace.__doc__
    nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(convert_sync_batchnorm)  # type: ignore[assignment]
    return kind
