"""Models of torchvision, timm and transformers, where these are installed beside this torch.

Copies of their blocks are tested in any case (tests/stand_ins.py).
"""

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from den_kernels import convert, extract, levels
from tests.oracle import unlike_new

SIZE = 64
MODELS = {
    "torchvision": ("resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "efficientnet_b0", "convnext_tiny"),
    "timm": ("resnet18", "resnet50", "regnetx_002", "efficientnet_b0", "convnext_atto"),
    "transformers": ("resnet",),
}


class Logits(nn.Module):
    """A model of transformers, whose result is more than a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


DECLARED: list[torch.library.Library] = []


def torchvision_models() -> ModuleType:
    """torchvision.models, also of a torchvision whose compiled operators belong to another torch: no model needs them,
    but importing it needs their names."""
    try:
        return import_module("torchvision.models")
    except RuntimeError as why:
        if "torchvision::" not in str(why):
            raise
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    DECLARED.append(library)
    return import_module("torchvision.models")


def build(package: str, name: str) -> nn.Module:
    try:
        if package == "torchvision":
            return getattr(torchvision_models(), name)()
        module = import_module(package)
        if package == "timm":
            return module.create_model(name)
        return Logits(module.ResNetForImageClassification(module.ResNetConfig(depths=[1, 2, 1, 1])))
    except (ImportError, RuntimeError) as why:
        pytest.skip(f"{package} cannot be imported beside torch {torch.__version__}: {why}")


@pytest.mark.parametrize(("package", "name"), [(p, n) for p, names in MODELS.items() for n in names])
def test_a_model_of_a_package_is_converted(package, name):
    model = unlike_new(build(package, name)).eval()
    x = torch.randn(2, 3, SIZE, SIZE)
    original = model(x)
    report = convert(model, 4, example=x[:1])
    assert len(report) >= 4
    with torch.no_grad(), levels(model, torch.full((2, len(report)), 4)):
        assert torch.equal(model(x), original)
    own = torch.tensor([[2] * len(report), list(report.lowest)])
    with torch.no_grad(), levels(model, own):
        y = model(x)
    for b, structure in enumerate(own.tolist()):
        alone = extract(model, structure)(x[b : b + 1])
        torch.testing.assert_close(y[b : b + 1], alone, rtol=1e-3, atol=1e-3 * float(alone.detach().abs().max()))
