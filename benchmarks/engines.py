"""The inference engines that people pick on a CPU, OpenVINO and ONNX Runtime, as dense providers.

Both read one ONNX file of the same network. They come with the extra: ``pip install "den-kernels[peers]"``.
"""

import copy
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from .harness import Expected, Provider

PACKAGES = {"dense-openvino": "openvino", "dense-onnxruntime": "onnxruntime"}
EXPORT = ("onnx", "onnxscript")  # what torch.onnx needs
# ONNX Runtime computes convolutions on a CPU in float32 only; OpenVINO in what it is told, where the CPU has it.
DTYPES = {"dense-openvino": (torch.float32, torch.bfloat16), "dense-onnxruntime": (torch.float32,)}


def missing() -> list[str]:
    """The packages of the extra that are not installed."""
    return [name for name in (*PACKAGES.values(), *EXPORT) if find_spec(name) is None]


def installed() -> tuple[str, ...]:
    """The providers that can run here; none without what exports a network."""
    absent = missing()
    return () if set(absent) & set(EXPORT) else tuple(name for name in PACKAGES if PACKAGES[name] not in absent)


def versions() -> dict[str, str]:
    """The version of each engine that is installed."""
    found = {}
    for package in PACKAGES.values():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def exported(network: nn.Module, images: Tensor) -> bytes:
    """A network [B, c, S, S] -> [B, classes] as ONNX, in float32, its weights inside, for inputs as large as `images`.

    The network itself is left as it is.
    """
    plain = copy.deepcopy(network).float().eval()
    with torch.no_grad():
        program = torch.onnx.export(plain, (images.float().contiguous(),), dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto.SerializeToString()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as cases have it: ``dtype_name(torch.bfloat16) == "bfloat16"``."""
    return str(dtype).removeprefix("torch.")


class OpenVino:
    """A network on OpenVINO's CPU plugin, tuned for the time of one batch: () -> logits [B, classes] float32.

    dtype: float32 or bfloat16, what it is told to compute in; `precision` is the name of what it took: on a CPU without
    instructions for bfloat16 that is float32.
    """

    def __init__(self, model: bytes, images: Tensor, dtype: torch.dtype, threads: int) -> None:  # [B, c, S, S]
        import openvino

        core, hints = openvino.Core(), {torch.float32: "f32", torch.bfloat16: "bf16"}
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hints[dtype]}
        options |= {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
        network = core.compile_model(core.read_model(model), "CPU", options)
        taken = network.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.precision = {hint: dtype_name(dtype) for dtype, hint in hints.items()}.get(taken, taken)
        self.request, self.images = network.create_infer_request(), images.float().contiguous().numpy()
        self.request.set_input_tensor(openvino.Tensor(self.images, shared_memory=True))

    def __call__(self) -> Tensor:
        self.request.infer(share_outputs=True)
        return torch.from_numpy(self.request.get_output_tensor().data)


class OnnxRuntime:
    """A network on ONNX Runtime's CPU provider: () -> logits [B, classes] float32.

    Its threads wait for work in a loop while it runs, as they do by default, but not afterwards, for a twentieth of a
    second, on the cores of what is timed next.
    """

    precision = "float32"

    def __init__(self, model: bytes, images: Tensor, dtype: torch.dtype, threads: int) -> None:  # [B, c, S, S]
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.inputs = {self.session.get_inputs()[0].name: images.float().contiguous().numpy()}

    def __call__(self) -> Tensor:
        return torch.from_numpy(self.session.run(None, self.inputs)[0])


ENGINES: dict[str, Callable[..., OpenVino | OnnxRuntime]] = {
    "dense-openvino": OpenVino,
    "dense-onnxruntime": OnnxRuntime,
}


def providers(network: nn.Module, images: Tensor, expected: Expected, names: Sequence[str]) -> list[Provider]:
    """`network` on those engines of `names` that compute in the dtype of `images` [B, c, S, S], on torch's threads.

    None of them where the images lie on a GPU. The images are put into the engine's form beforehand.
    """
    wanted = [name for name in names if images.is_cpu and images.dtype in DTYPES[name]]
    model = exported(network, images) if wanted else b""
    found = []
    for name in wanted:
        engine = ENGINES[name](model, images, images.dtype, torch.get_num_threads())
        other = None if engine.precision == dtype_name(images.dtype) else engine.precision
        found.append(Provider(name, engine, expected, runtime=PACKAGES[name], precision=other))
    return found
