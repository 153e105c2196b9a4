"""Scenes of cards in a room, each card with a character of Omniglot: segmentation, depth and normals of every pixel.

    python scripts/card_scenes.py DATA OUT [--train 800] [--held-out 200] [--side 48]

writes the layout that dense tasks are read from (`den.data.npy_scenes`); `den dag train --data.tasks folder:OUT` learns
them.  A stand-in of ours for NYU-v2, of which no free copy exists: the drawings are real, the room is computed.

Three to six square cards of about the same size hang in front of a wall, anywhere, at depths of 1.2 to 4 and turned by
up to 45 degrees; what is nearer covers what is farther.  A pinhole camera of 53 degrees looks at them.  How bright a
card is depends on how it is turned to the light, so that size, cover, shape and brightness tell depth and normal, as
they do in photographs; its alphabet must be read.  The labels are those of the alphabets, and one more of the wall.

Of the training drawings of each alphabet four of five make the scenes of `train`, the others those of `val`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from den.data import ImageSet
from den.data.omniglot import load_omniglot

FOCAL = 1.0  # in widths of the image
WALL = 5.0  # its depth
LIGHT = (0.3, -0.5, -0.8)  # where the light comes from; x to the right, y down, z away from the camera
CARDS, DEPTHS, HALVES, TILT = (3, 6), (1.2, 4.0), (0.45, 0.55), 1.0
INK, NOISE = 0.2, 0.02  # brightness of ink on a card; deviation of the camera's noise


@dataclass(frozen=True)
class Card:
    """A square in space with a drawing on it."""

    ink: Tensor  # [1, 1, h, w], 0..1
    label: int
    colour: Tensor  # [3]
    centre: Tensor  # [3]
    axes: Tensor  # [3, 3]: to its right, down along it, and its normal, which faces the camera
    half: float  # half of its side


def drawn_card(alphabets: list[ImageSet], generator: torch.Generator) -> Card:
    """A card at random."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    label = int(torch.randint(len(alphabets), (), generator=generator))
    images = alphabets[label].images
    drawing = images[int(torch.randint(len(images), (), generator=generator))].float() / 255
    ink = F.avg_pool2d(F.max_pool2d(drawing[None], 5, 1, 2), 3)  # strokes wide enough to be seen from afar
    depth = uniform(*DEPTHS)
    centre = torch.tensor([uniform(-0.4, 0.4) / FOCAL * depth, uniform(-0.4, 0.4) / FOCAL * depth, depth])
    normal = F.normalize(torch.tensor([uniform(-TILT, TILT), uniform(-TILT, TILT), -1.0]), dim=0)
    right = F.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), -normal), dim=0)
    down = torch.linalg.cross(-normal, right)
    colour = 0.5 + 0.5 * torch.rand(3, generator=generator)
    return Card(ink, label, colour, centre, torch.stack([right, down, normal]), uniform(*HALVES))


def rays(side: int) -> Tensor:
    """Directions that the pixels look along: float32 [side, side, 3], of depth 1."""
    places = (torch.arange(side) + 0.5) / side - 0.5
    y, x = torch.meshgrid(places, places, indexing="ij")
    return torch.stack([x / FOCAL, y / FOCAL, torch.ones_like(x)], 2)


def shade(normal: Tensor) -> float:
    """Brightness of a surface: some of it does not depend on how it is turned to the light."""
    return 0.3 + 0.7 * max(0.0, float(normal @ F.normalize(torch.tensor(LIGHT), dim=0)))


def scene(alphabets: list[ImageSet], side: int, generator: torch.Generator) -> dict[str, np.ndarray]:
    """An image and its targets, as arrays of the folders image, label, depth and normal."""
    low, high = CARDS
    count = int(torch.randint(low, high + 1, (), generator=generator))
    cards = [drawn_card(alphabets, generator) for _ in range(count)]
    facing, ray = torch.tensor([0.0, 0.0, -1.0]), rays(side)
    depth, label = torch.full((side, side), WALL), torch.full((side, side), len(alphabets))
    normal = facing.expand(side, side, 3).clone()
    image = (0.6 * shade(facing) * torch.ones(side, side, 3)).clone()
    for card in cards:
        distance = (card.axes[2] @ card.centre) / (ray @ card.axes[2])
        place = (ray * distance[..., None] - card.centre) @ card.axes[:2].T / card.half  # [side, side, 2], -1..1 on it
        seen = (place.abs() <= 1).all(2) & (distance > 0) & (distance < depth)
        ink = F.grid_sample(card.ink, place[None], align_corners=False)[0, 0, ..., None]
        colours = shade(card.axes[2]) * card.colour * (1 - (1 - INK) * ink)
        depth, label = torch.where(seen, distance, depth), label.masked_fill(seen, card.label)
        normal = torch.where(seen[..., None], card.axes[2], normal)
        image = torch.where(seen[..., None], colours, image)
    image = (image + NOISE * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    return {
        "image": (255 * image).round().to(torch.uint8).numpy(),
        "label": label.to(torch.uint8).numpy(),
        "depth": depth.numpy(),
        "normal": normal.numpy(),
    }


def write_scenes(data: Path, out: Path, train: int, held_out: int, side: int, seed: int = 0) -> None:
    """Write scenes to `out`/train and `out`/val; of folders that are there already, files of the same names are the
    same."""
    splits = [each.split(0.2, seed) for each in load_omniglot(data, "train", 105)]
    parts = {"train": (train, [kept for kept, _ in splits]), "val": (held_out, [held for _, held in splits])}
    for number, (name, (count, alphabets)) in enumerate(parts.items()):
        generator = torch.Generator().manual_seed(2 * seed + number)
        for position in range(count):
            for folder, values in scene(alphabets, side, generator).items():
                place = out / name / folder
                place.mkdir(parents=True, exist_ok=True)
                np.save(place / f"{position}.npy", values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of Omniglot")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=800, help="scenes for training")
    parser.add_argument("--held-out", type=int, default=200, help="scenes of drawings that are held out")
    parser.add_argument("--side", type=int, default=48, help="of the images, in pixels")
    given = parser.parse_args()
    write_scenes(given.data, given.out, given.train, given.held_out, given.side)


if __name__ == "__main__":
    main()
