"""Networks over one shared graph, a topology per task, searched by training (after Choi and Im, CVPR 2023)."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from den.dag.extract import SubNetwork
    from den.dag.graph import Graph, SubGraph
    from den.dag.kinds import Kind, Metrics, register_kind
    from den.dag.model_config import DagConfig
    from den.dag.network import DagNetwork
    from den.dag.own import OwnTask
    from den.dag.reduction import Reduction, TaskGates, reduce

# Imported when they are asked for, so that the command line has its settings before torch.
_HOMES = {
    "DagConfig": "model_config", "DagNetwork": "network", "Graph": "graph", "Kind": "kinds", "Metrics": "kinds",
    "OwnTask": "own", "Reduction": "reduction", "SubGraph": "graph", "SubNetwork": "extract", "TaskGates": "reduction",
    "reduce": "reduction", "register_kind": "kinds",
}  # fmt: skip

__all__ = [
    "DagConfig", "DagNetwork", "Graph", "Kind", "Metrics", "OwnTask", "Reduction", "SubGraph", "SubNetwork",
    "TaskGates", "reduce", "register_kind",
]  # fmt: skip


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
