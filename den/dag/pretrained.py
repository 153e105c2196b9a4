"""Stems that are layers of a published network, of torchvision or timm; both packages are optional.

``torchvision:NAME:LAYER``, such as ``torchvision:resnet18:layer2``, is what comes out of a layer, by the name that
`torchvision.models.feature_extraction` gives it; ``timm:NAME:STAGE``, such as ``timm:resnet18:2``, a stage by its
number. Images are those of the task, normalised as its set is; grey ones are given to torchvision's networks three
times.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from den.dag.model_config import DagConfig
from den.nn.ends import ConvNormReLU
from den.nn.tasks import Task


class PretrainedStem(nn.Module):
    """Images [B, C_k, H_k, W_k] of one task -> [B, channels, h, w], channels-last in memory.

    Layers of a published network, and a 1x1 convolution, batch norm and ReLU of their own to the trunk's channels.  The
    weights are random until `load_pretrained`.

    Raises ValueError for a name that is not known, a package that is missing, and maps of another size than the
    trunk's.
    """

    def __init__(self, task: Task, config: DagConfig) -> None:
        super().__init__()
        self.name, self.shape = config.stem, task.shape
        self.body, self.grey = make_body(config.stem, task.channels, pretrained=False)
        channels, *size = self._probe().shape[1:]
        if tuple(size) != config.map_size():
            raise ValueError(
                f"DagConfig: trunk_size must be {tuple(size)}, the maps of {config.stem} on images of {task.name}, got"
                f" {config.map_size()}"
            )
        self.conv = ConvNormReLU(channels, config.channels, 1, 1, 0)

    def forward(self, images: Tensor) -> Tensor:  # [B, C_k, H_k, W_k] -> [B, C, h, w]
        return self.conv(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The maps that the published layers make of images: [B, C', h, w]."""
        if self.grey and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        found = self.body(images)
        return next(iter(found.values())) if isinstance(found, dict) else found[0]

    def flops(self) -> int:
        """Twice the multiply-adds of its convolutions for one image, as torch counts them."""
        like = self.conv.conv.weight
        with FlopCounterMode(display=False) as counter:
            maps = self._probe()
        return counter.get_total_flops() + 2 * like.numel() * maps.shape[2] * maps.shape[3]

    @torch.no_grad()
    def _probe(self) -> Tensor:
        like, training = next(self.body.parameters()), self.body.training
        self.body.eval()
        try:
            return self.features(torch.zeros(1, *self.shape, dtype=like.dtype, device=like.device))
        finally:
            self.body.train(training)


def make_body(name: str, channels: int, pretrained: bool) -> tuple[nn.Module, bool]:
    """The layers that a name stands for, and True where they take three channels only.

    Raises ValueError for a name that is not known, a package that is missing, and weights that cannot be had.
    """
    package, _, rest = name.partition(":")
    network, _, place = rest.partition(":")
    if package not in ("torchvision", "timm") or not network or not place:
        raise ValueError(f"config: network.stem must be conv, torchvision:NAME:LAYER or timm:NAME:STAGE, got {name!r}")
    with _explained(name, package):
        if package == "timm":
            import timm

            body = timm.create_model(
                network, pretrained=pretrained, features_only=True, out_indices=(int(place),), in_chans=channels
            )
            return body, False
        from torchvision.models import get_model
        from torchvision.models.feature_extraction import create_feature_extractor

        whole = get_model(network, weights="DEFAULT" if pretrained else None)
        return create_feature_extractor(whole, {place: "maps"}), True


def pretrained_map_size(name: str, tasks: Sequence[Task]) -> tuple[int, int]:
    """Height and width of the maps that published layers make of the images of the first task."""
    body, grey = make_body(name, tasks[0].channels, pretrained=False)
    channels, height, width = tasks[0].shape
    with torch.no_grad():
        found = body.eval()(torch.zeros(1, 3 if grey else channels, height, width))
    maps = next(iter(found.values())) if isinstance(found, dict) else found[0]
    return maps.shape[2], maps.shape[3]


def load_pretrained(model: nn.Module) -> None:
    """Give all stems of a network their published weights; ValueError where these cannot be had."""
    known: dict[tuple[str, int], dict[str, Tensor]] = {}
    for stem in model.modules():
        if isinstance(stem, PretrainedStem):
            key = stem.name, stem.shape[0]
            if key not in known:
                known[key] = make_body(*key, pretrained=True)[0].state_dict()
            stem.body.load_state_dict(known[key])


@contextmanager
def _explained(name: str, package: str) -> Iterator[None]:
    """Turn what goes wrong in another package into a ValueError of one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config: network.stem {name} needs the package {package} (pip install {package}), got none: {error}"
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"config: network.stem {name} must be known to {package}, got {reason}") from error
