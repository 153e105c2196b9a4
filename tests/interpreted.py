"""Repairs of Triton's interpreter, for tests and rehearsals only; TRITON_INTERPRET=1 chooses it.

bfloat16 lives there as its bit pattern in uint16, and arithmetic works on the pattern. Kernels here widen to float32
before they calculate, as they do on a GPU, so that three operations need repair: products of matrices, widening, and
narrowing, which truncated instead of rounding to the nearest even. A scalar must be an index to be a loop's bound, and
one that is true or false must stay so when it is spread over a block (Triton 3.9 makes bytes of it, no mask).
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def repair() -> None:
    """Once for a process, before a kernel runs."""
    if getattr(interpreter, "is_repaired", False):
        return
    interpreter.is_repaired = True
    builder = interpreter.InterpreterBuilder
    create_dot, cast_impl, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor
    create_splat = builder.create_splat

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widen(a), widen(b), *rest)

    def cast(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32:
            return widen(source)
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return interpreter.TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
        return cast_impl(self, source, kind)

    def splat(self: Any, kind: Any, value: Any) -> Any:
        made = create_splat(self, kind, value)
        return interpreter.TensorHandle(made.data.astype(bool), tl.int1) if kind.scalar == tl.int1 else made

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        index = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])  # noqa: E731
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index

    builder.create_dot, builder.cast_impl, builder.create_splat = dot, cast, splat
    interpreter._patch_lang_tensor = patch_tensor
