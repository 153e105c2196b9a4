"""Networks over one shared graph, a topology per task, searched by training (after Choi and Im, CVPR 2023)."""

from den.dag.extract import SubNetwork
from den.dag.graph import Graph, SubGraph
from den.dag.model_config import DagConfig
from den.dag.network import DagNetwork
from den.dag.reduction import Reduction, TaskGates, reduce

__all__ = ["DagConfig", "DagNetwork", "Graph", "Reduction", "SubGraph", "SubNetwork", "TaskGates", "reduce"]
