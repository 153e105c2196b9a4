"""ONNX files of elastic models and of every op: onnxruntime computes what PyTorch does."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from den_kernels import ElasticModel, WithLevels, convert, freeze
from tests.call_kinds import LEVELS, MODULES, OTHER_LEVELS, module
from tests.call_kinds import images as maps
from tests.foreign_models import foreign, images, random_levels

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = {0: Dim("batch", min=1, max=1024)}
OPS = sorted(name for name in MODULES if "frozen" not in name)
NAME = "pytorchcv_resnet"


class Selector(nn.Module):
    """Levels by the sign of each image's sum."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1).sum(1, keepdim=True) > 0).long().expand(-1, 4) + 1


def run(model: nn.Module, given: tuple[Tensor, ...], other: tuple[Tensor, ...], path: str) -> Tensor:
    """What onnxruntime makes of other inputs, of the file that was exported with the given ones."""
    torch.onnx.export(model, given, path, dynamic_shapes=(BATCH,) * len(given), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    [y] = session.run(None, dict(zip(names, [tensor.numpy() for tensor in other], strict=True)))
    return torch.from_numpy(y)


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param("levels", marks=pytest.mark.release), "selector"])  # docs: levels, too
def test_a_converted_model_runs_in_onnxruntime(kind, tmp_path):
    model, x = foreign(NAME), images(NAME)
    report = convert(model, 2, example=x[:1])
    given = x, random_levels(len(x), report.lowest, 2)
    other = images(NAME, 4, seed=1), random_levels(4, report.lowest, 2, seed=1)
    whole = WithLevels(model) if kind == "levels" else ElasticModel(model, Selector()).eval()
    count = 2 if kind == "levels" else 1
    got = run(whole, given[:count], other[:count], str(tmp_path / "model.onnx"))
    torch.testing.assert_close(got, whole(*other[:count]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_frozen_model_is_refused(tmp_path):
    model, x = foreign(NAME), images(NAME)
    report = convert(model, 2, example=x[:1])
    frozen, own = WithLevels(freeze(model, x[:1])), random_levels(len(x), report.lowest, 2)
    for model in (frozen, frozen.model):
        with pytest.raises(Exception, match=r"torch\.onnx\.export must be given a model that is not frozen"):
            torch.onnx.export(model, (x, own)[: 2 if model is frozen else 1], tmp_path / "frozen.onnx", verbose=False)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.release
@pytest.mark.parametrize("name", OPS)
def test_every_op_runs_in_onnxruntime(name, tmp_path):
    function = module(name)
    other = maps(2).repeat(2, 1, 1, 1)[1:], OTHER_LEVELS.repeat(2)[1:]
    got = run(function, (maps(), LEVELS), other, str(tmp_path / "op.onnx"))
    torch.testing.assert_close(got, function(*other), rtol=1e-4, atol=1e-4)
