"""How many kernels a DAG network launches on a GPU at inference, whatever the number of tasks."""

import pytest
import torch

from den.dag import DagConfig, DagNetwork, reduce
from den.nn.tasks import Task

pytest.importorskip("triton", reason="triton is not installed")

from tests.gpu_launches import counted, on_gpu


def network(tasks: int) -> DagNetwork:
    torch.manual_seed(0)
    made = DagNetwork(DagConfig(tuple(Task(f"t{k}", 5, 8, 1) for k in range(tasks)), 6, 3, 8, trunk_size=8)).eval()
    for k in range(tasks):
        made.keep(k, reduce(made.graph, made.gates.of_task(k), 0.5, ranking="random", seed=k).kept)
    return made


@torch.no_grad()
@pytest.mark.parametrize("tasks", [1, 8, 20])
def test_the_graph_is_a_launch_for_each_edge_and_two(tasks, monkeypatch):
    model = network(tasks)
    names = [task.name for task in model.tasks]
    images, seen = [torch.randn(2, 1, 8, 8) for _ in names], []
    with counted(monkeypatch) as launches:
        model.to("cuda:0")
        images = on_gpu(*images)
        model(images, names)  # folds and plans
        trunk = model.trunk
        monkeypatch.setattr(model, "trunk", lambda *given: seen.append(given) or trunk(*given))
        model(images, names)
        found = launches.of(lambda: trunk(*seen[0]))
    edges, states = len(model.edges), model.graph.states
    assert sum(found.count(f"{kind}_kernel") for kind in ("convolve", "box", "strip")) == edges
    assert len(found) <= states + edges + 1
    assert len(found) == edges + 2
