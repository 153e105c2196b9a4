"""den dag extract: the network of one task as a file that needs nothing of this library."""

import importlib.util
import warnings
from pathlib import Path

import torch

from den.dag.config import DagExtract
from den.dag.extract import SubNetwork, alone
from den.runs.dag import import_modules, open_run
from den.support.files import check_file

SUFFIXES = (".pt2", ".onnx")
EXAMPLES = 2  # images of the example; a file takes any number


def main(command: DagExtract) -> None:
    """Write the file and print what is in it; ValueError for a run, task or file that do not fit."""
    if command.out.suffix not in SUFFIXES:
        raise ValueError(f"dag extract: out must end with {' or '.join(SUFFIXES)}, got {command.out}")
    needed = ("onnx", "onnxscript") if command.out.suffix == ".onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(f"dag extract: {' and '.join(missing)} must be installed to write .onnx (pip install)")
    check_file(command.out, "dag extract: out")
    import_modules(command.modules)
    network = alone(open_run(command.run).model, command.task)
    export(network, command.out)
    shape, edges = ", ".join(map(str, network.task.shape)), sum(network.kept.edges)
    print(f"{command.out}: {command.task}, images [B, {shape}], {edges} edges, {network.parameters_count:,} parameters")


def export(network: SubNetwork, out: Path) -> None:
    """Write a network in evaluation mode for images [B, C, H, W] of any number."""
    like = next(network.parameters())
    images = torch.zeros(EXAMPLES, *network.task.shape, dtype=like.dtype, device=like.device)
    shapes = ({0: torch.export.Dim("batch", min=1, max=2**20)},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporters, about themselves
        program = torch.export.export(network, (images,), dynamic_shapes=shapes)
        if out.suffix == ".pt2":
            torch.export.save(program, out)
        else:
            torch.onnx.export(program, (), out, input_names=["images"], output_names=["outputs"], dynamo=True,
                              verbose=False)  # fmt: skip
