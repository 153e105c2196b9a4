"""Models of torchvision, timm and transformers, where these are installed beside this torch.

Copies of their blocks are tested in any case (tests/stand_ins.py).
"""

import pytest
import torch
from torch import nn

from benchmarks.packages import build
from den_kernels import convert, extract, levels
from tests.oracle import unlike_new

SIZE = 64
MODELS = {
    "torchvision": ("resnet18", "resnet50", "resnext50_32x4d", "mobilenet_v2", "efficientnet_b0", "convnext_tiny"),
    "timm": ("resnet18", "resnet50", "regnetx_002", "efficientnet_b0", "convnext_atto"),
    "transformers": ("resnet",),
}


def built(name: str) -> nn.Module:
    """A model, parameters and statistics unlike new ones; the test is skipped where its package is not to be had."""
    try:
        return unlike_new(build(name)).eval()
    except (ImportError, RuntimeError) as why:
        pytest.skip(f"{name} cannot be had beside torch {torch.__version__}: {why}")


@pytest.mark.parametrize("name", [f"{package}/{name}" for package, names in MODELS.items() for name in names])
def test_a_model_of_a_package_is_converted(name):
    model = built(name)
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
