"""Models of torchvision, timm, transformers and pytorchcv by name, wherever these can be imported beside this torch."""

import sys
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn

_DECLARED: list[torch.library.Library] = []


class Logits(nn.Module):
    """A model of transformers, whose result is more than a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def torchvision_models() -> ModuleType:
    """torchvision.models, also of a torchvision whose compiled operators belong to another torch: no model needs them,
    but importing it needs their names. Raises ImportError or RuntimeError where it cannot be imported."""
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
    _DECLARED.append(library)
    return import_module("torchvision.models")


def build(name: str) -> nn.Module:
    """The model of a name PACKAGE/MODEL with random weights: images [B, 3, S, S] -> logits [B, classes].

    Of transformers there are `resnet-50` and `resnet`, a small one. Raises ImportError or RuntimeError for a package
    that is missing or does not fit this torch.
    """
    package, _, model = name.partition("/")
    if package == "torchvision":
        return getattr(torchvision_models(), model)()
    if package == "pytorchcv":
        return import_module("pytorchcv.model_provider").get_model(model, pretrained=False)
    module = import_module(package)
    if package == "timm":
        return module.create_model(model)
    sizes = {} if model == "resnet-50" else {"depths": [1, 2, 1, 1]}
    return Logits(module.ResNetForImageClassification(module.ResNetConfig(**sizes)))
