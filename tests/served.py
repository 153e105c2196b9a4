"""Networks to be served, and pictures to be sent to them."""

import dataclasses
import io
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from den import Task, create_model
from den.data.images import Kept
from den.support.settings import to_dict
from den.train.checkpoint import prefixed, save_checkpoint
from den.train.config import DataConfig, NetworkConfig, TrainConfig

TASKS = (Task("folder:pictures/pets@16", 3, 16), Task("digits", 10, 8, channels=1))
KEPT = {
    TASKS[0].name: Kept((0.4, 0.5, 0.6), (0.2, 0.3, 0.25), ("cat", "dog", "<b>newt</b>")),
    "digits": Kept((0.3,), (0.4,)),
}


def store_run(folder: Path, backbone: str = "wrn8_1", mode: str = "den") -> Path:
    """A run of two tasks of different sizes and channels, untrained, whose selector tells images apart."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = create_model(backbone, list(TASKS), trunk_size=8)
    for head in model.selector.heads:
        nn.init.normal_(head.weight)
    config = TrainConfig(
        out=folder, mode=mode, data=DataConfig(tasks=tuple(task.name for task in TASKS)),
        network=NetworkConfig(backbone, trunk_size=8), progress=False,
    )  # fmt: skip
    kept = {name: dataclasses.asdict(own) for name, own in KEPT.items()}
    record = {"model": model.config.to_dict(), "position": {"total_steps": 5}, "data": kept}
    save_checkpoint(folder / "last.safetensors", prefixed("model", model.state_dict()), record)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


def photographs(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth coloured pictures of several sizes."""
    generator = np.random.default_rng(seed)
    small = [Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)) for _ in range(count)]
    return [each.resize((40 + 3 * k % 50, 30 + 7 * k % 40), Image.Resampling.BICUBIC) for k, each in enumerate(small)]


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds, at most so long."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


def free_port() -> int:
    """A port of the loopback that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
