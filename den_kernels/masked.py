"""Exported programs in operations of PyTorch alone, for runtimes that do not have ours."""

import copy

import torch
from torch.export import ExportedProgram

_OP = "masked"
_LIBRARY = "den_kernels"


def masked(program: ExportedProgram) -> ExportedProgram:
    """A program of `torch.export` with the ops of den_kernels written out in operations of PyTorch.

    It computes the same, to rounding, for any levels, and runs where den_kernels is not:
    `torch.onnx.export(masked(program), (), path)`, or in C++ through AOTInductor. But it computes all channels for all
    instances and sets those that were not selected to 0, so that its levels save no time; a warning says so. One
    structure that is fast everywhere is `extract(model, structure)`. The program that is given stays as it is.

    Levels out of range are clamped in it. Raises TypeError for anything else than an `ExportedProgram`, ValueError for
    one without ops of den_kernels, or with frozen weights, which are kept only as the kernels read them.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"{_OP}: program must be what torch.export.export returns, got {type(program).__name__}")
    if not any(_is_ours(node.target) for node in program.graph.nodes):
        raise ValueError(f"{_OP}: program must hold ops of den_kernels, got one without any")
    from ._masked_ops import DECOMPOSED, warn_of_masks

    ops = getattr(torch.ops, _LIBRARY)
    table = {getattr(ops, name).default: function for name, function in DECOMPOSED.items()}
    made = _functional(program).run_decompositions(table)
    warn_of_masks()
    return made


def _is_ours(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == _LIBRARY


def _functional(program: ExportedProgram) -> ExportedProgram:
    """The program; where ops of ours write over their input a copy in which others, whose result is copied, do it."""
    if not any(_is_ours(node.target) and node.target._schema.is_mutable for node in program.graph.nodes):
        return program
    kept = (*program.state_dict.values(), *program.constants.values())
    own = copy.deepcopy(program, {id(value): value for value in kept})
    for node in list(own.graph.nodes):
        if _is_ours(node.target) and node.target._schema.is_mutable:
            functional = getattr(getattr(torch.ops, _LIBRARY), node.target._schema.name.partition("::")[2][:-1])
            with own.graph.inserting_before(node):
                made = own.graph.call_function(functional.default, node.args)
                own.graph.call_function(torch.ops.aten.copy_.default, (node.args[0], made))
            own.graph.erase_node(node)
    return own
