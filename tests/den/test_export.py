"""Deep Elastic Networks as graphs: of other images, levels and batch sizes; what would be a constant is refused."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import den
from den import Task, create_model
from tests.oracle import unlike_new

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
TASKS = (Task("digits", 10, 8, channels=1), Task("photos", 3, 16))
BATCH = {0: Dim("batch", min=1, max=1024)}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def network(backbone: str = "wrn14_1") -> den.DeepElasticNetwork:
    """A network whose selector chooses varied structures."""
    torch.manual_seed(0)
    model = unlike_new(create_model(backbone, TASKS))
    with torch.no_grad():
        for head in model.selector.heads:
            head.weight.mul_(100)
    return model.eval()


def images(task: Task, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *task.shape, generator=torch.Generator().manual_seed(seed))


class Mixed(nn.Module):
    """A batch of both tasks, and the levels that were chosen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, digits: Tensor, photos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (first, second), levels = self.model([digits, photos], ["digits", "photos"], return_levels=True)
        return first, second, levels


class AtLevels(nn.Module):
    """The estimator of one task, levels as an input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.estimator = model.estimator

    def forward(self, photos: Tensor, levels: Tensor) -> Tensor:
        return self.estimator(photos, "photos", levels)


def traced(model: nn.Module, *given: Tensor) -> nn.Module:
    return torch.jit.trace(model, given)


def exported(model: nn.Module, *given: Tensor) -> nn.Module:
    shapes = [{0: Dim(f"batch{i}", min=1, max=1024)} for i in range(len(given))]
    return torch.export.export(model, given, dynamic_shapes=shapes).module()


@torch.no_grad()
@pytest.mark.parametrize("record", [traced, exported])
def test_a_batch_of_two_tasks_is_recorded_for_other_images_and_sizes(record):
    model = Mixed(network()).eval()
    graph = record(model, images(TASKS[0], 3), images(TASKS[1], 2))
    for counts, seed in (((3, 2), 1), ((4, 5), 2)):
        given = [images(task, count, seed) for task, count in zip(TASKS, counts, strict=True)]
        wanted = model(*given)
        torch.testing.assert_close(graph(*given), wanted, **CLOSE)
        assert len(wanted[2].unique()) > 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("backbone", "constant"), [("wrn14_1", False), ("vgg16", False), ("wrn14_1", True), ("resnext29_4x8d", True)]
)
def test_an_exported_estimator_takes_other_levels(backbone, constant):
    own = network(backbone)
    model = AtLevels(den.for_export(own) if constant else own).eval()
    N = model.estimator.num_blocks
    draw = torch.Generator().manual_seed(0)
    levels = [torch.randint(0, 4, (count, N), generator=draw) for count in (2, 3)]
    graph = torch.export.export(model, (images(TASKS[1], 2), levels[0]), dynamic_shapes=(BATCH, BATCH)).module()
    x = images(TASKS[1], 3, seed=1)
    torch.testing.assert_close(graph(x, levels[1]), own.estimator(x, "photos", levels[1]), **CLOSE)
    ops = [name for node in graph.graph.nodes if "den_kernels.dynamic" in (name := str(node.target))]
    assert len(ops) == N or not constant


@torch.no_grad()
def test_a_copy_for_export_is_the_network_and_shares_nothing_with_it():
    own = network()
    made, x = den.for_export(own), images(TASKS[1], 3)
    torch.testing.assert_close(made(x, "photos", return_levels=True), own(x, "photos", return_levels=True), **CLOSE)
    torch.testing.assert_close(made.estimator(x, "photos"), own.estimator(x, "photos"), **CLOSE)
    wanted = made(x, "photos")
    for parameter in own.parameters():
        parameter.zero_()
    assert torch.equal(made(x, "photos"), wanted)
    with pytest.raises(ValueError, match="for_export: network must not be frozen"):
        den.for_export(own.freeze())


@pytest.mark.parametrize("record", [traced, exported])
def test_what_would_be_a_constant_is_refused(record):
    class Each(nn.Module):
        def __init__(self, call) -> None:
            super().__init__()
            self.call = call

        def forward(self, x: Tensor, tasks: Tensor) -> Tensor:
            return self.call(x, tasks)

    alike = create_model("wrn8_1", [Task("a", 2, 16), Task("b", 3, 16)]).eval()
    engine = den.Engine(alike, device="cpu")
    x, tasks = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for call, message in ((alike, "task must be one task, or a list"), (engine, "Engine: a call must not be recorded")):
        with torch.no_grad(), pytest.raises(Exception, match=message):
            record(Each(call), x, tasks)
