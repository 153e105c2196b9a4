"""Tests of how an op or a module is called (traced, recorded, watched by hooks), and errors for what ops cannot do."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import Parameter

Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable)
_PLAIN = (Tensor, Parameter)

# Asked in every call, so without a walk through torch's modules.
_is_tracing, _modes = torch._C._is_tracing, torch._C._len_torch_dispatch_stack
_transforms, _profiler = torch._C._are_functorch_transforms_active, torch._C._autograd._profiler_enabled


def is_ordinary(*tensors: Tensor | None) -> bool:
    """True where nothing traces or transforms the call and its tensors [...] are plain.

    Compilers, torch.jit.trace, dispatch modes (in which compilers other than Dynamo trace), torch.func and
    forward-mode derivatives do.
    """
    if is_dynamo_compiling() or _is_tracing() or _modes() or _transforms() or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator takes three times as long)
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return True


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """True for an ordinary call (`is_ordinary`) of tensors [...] that has no gradient to record.

    A call through `torch.library.custom_op` costs about 20 microseconds, and the first one in a process imports the
    whole of torch._dynamo: two seconds and 75 MB. Inference needs neither.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return False
    return is_ordinary(*tensors)


def may_fold(module: nn.Module) -> bool:
    """True where a module may run on folded weights: in eval mode, without gradients, not traced or transformed."""
    return not (module.training or torch.is_grad_enabled()) and is_ordinary()


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """True where hooks or a forward of its own have to see one of the modules being called, or one is being trained."""
    for module in modules:
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["training"] or "forward" in own:
            return True
    return False


def is_traced() -> bool:
    """True where the call becomes part of a graph that runs with other values: nothing may be decided from these."""
    return is_compiling() or _is_tracing() or _transforms()


def is_recorded() -> bool:
    """True where the call becomes a graph that outlives it: torch.export, torch.jit.trace or make_fx records it."""
    if is_compiling():
        return is_exporting()
    return _is_tracing() or (_modes() > 0 and get_proxy_mode() is not None)


def is_transformed() -> bool:
    """True where torch.func transforms the call (grad, vjp, vmap, ...): a custom op takes part in none of them."""
    return _transforms()


def is_profiled() -> bool:
    """True while a profiler runs, which ops show themselves to (`in_range`)."""
    return _profiler()


def in_range(name: str, function: Callable[..., Value], *arguments: Any) -> Value:
    """`function(*arguments)`, in a range `name` of a running profiler, which would not see a plain function."""
    if not _profiler():
        return function(*arguments)
    with torch.autograd.profiler.record_function(name):
        return function(*arguments)


def call_op(op: Any, *arguments: Any) -> Any:
    """`op(*arguments)` of a registered op; while torch.onnx exports, the same in operations that ONNX has.

    Raises RuntimeError in the exporter that records with torch.jit.trace.
    """
    if not torch.onnx.is_in_onnx_export():
        return op(*arguments)
    if _is_tracing():
        raise RuntimeError(f"den_kernels::{op._name}: torch.onnx.export must be with dynamo=True, got dynamo=False")
    from ._masked_ops import in_torch_ops

    return in_torch_ops(op, *arguments)


def in_onnx_export() -> bool:
    """True while torch.onnx.export records a model, by whichever of its ways."""
    return torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result, whose import takes seconds: else Dynamo, one of these ways, says False.
in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def savable(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors [...] as autograd can save them for the backward pass: copies of those made in inference mode."""
    return [tensor.clone() if tensor is not None and tensor.is_inference() else tensor for tensor in tensors]


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError for tensors [...] with forward-mode tangents: a custom op would answer with zeros."""
    if is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op}: inputs must be without tangents, as there is no forward-mode derivative (forward_ad, "
            "torch.func.jvp); got one with a tangent. Use backward()"
        )


def refuse_recording(op: str) -> None:
    """Raises RuntimeError while torch.jit.trace or make_fx records: what is written by no op is not in the graph."""
    if not is_compiling() and is_recorded():
        raise RuntimeError(f"{op}: weights must be packed before the call that is traced, got them inside")


def refuse_transforms(op: str) -> None:
    """Raises RuntimeError inside torch.func (grad, vjp, vmap, ...), for an op that takes part in none of it."""
    if _transforms():
        raise RuntimeError(f"{op}: the call must be outside torch.func transforms, got one inside; loop over the batch")


def refuse_training(op: str, **tensors: Tensor | None) -> None:
    """Raises for an op of inference where a gradient or a tangent has to be recorded (ValueError, RuntimeError), and
    inside torch.func."""
    for name, tensor in tensors.items():
        if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(
                f"{op}: {name} must not require a gradient (the op is for inference), got requires_grad=True; "
                "use torch.no_grad(), or DynamicConv2d and DynamicBatchNorm2d to train"
            )
    refuse_tangents(op, *tensors.values())
    refuse_transforms(op)


def refuse_symbols(op: str, x: Any) -> None:
    """Raises TypeError for anything but a tensor; torch.fx calls functions with symbols that stand for tensors."""
    if not isinstance(x, Tensor):
        symbol = isinstance(x, torch.fx.Proxy)
        hint = " of torch.fx: the call must be inside a module that is a leaf of the tracer" if symbol else ""
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}{hint}")


def as_fx_leaf(module: nn.Module, x: Any, *arguments: Any) -> Any:
    """The node of a torch.fx graph that calls a module, not traced into. Raises TypeError where nothing traces."""
    op = type(module).__name__
    if not isinstance(x, torch.fx.Proxy) or module is getattr(x.tracer, "root", None):
        refuse_symbols(op, x)
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *arguments), {})


def refuse_script(op: Any) -> NoReturn:
    """Raises RuntimeError: what torch.jit.script calls first on a function or module that has it as an attribute."""
    name = getattr(op, "__name__", type(op).__name__)
    raise RuntimeError(
        f"{name}: the call must be made from Python, as TorchScript cannot compile it; got torch.jit.script. Use "
        "torch.export or torch.jit.trace"
    )


def not_scriptable(function: Function) -> Function:
    """The function itself, which torch.jit.script refuses in words of ours."""
    function.__prepare_scriptable__ = lambda: refuse_script(function)  # type: ignore[attr-defined]
    return function
