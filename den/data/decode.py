"""Compressed pictures as arrays of one size."""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from den.data.checks import blamed

PART = 500  # images decoded before they are handed on
SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # none that runs another program, as EPS does
Fit = Callable[[Image.Image], Image.Image]


def is_picture(name: str) -> bool:
    """Return True for the name of a picture file; hidden files are other tools' notes about pictures."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def picture_names(folder: Path) -> list[str]:
    """Sorted names of the pictures in a folder; none where there is no folder."""
    return sorted(filter(is_picture, os.listdir(folder))) if folder.is_dir() else []


def pictures(
    named: Iterable[tuple[str, bytes]], size: tuple[int, int] | None = None, fit: Fit | None = None
) -> Iterator[np.ndarray]:
    """Names and contents of picture files as uint8 [n, H, W, 3], in parts.

    Either all are of `size` (width, height), or `fit` brings each, turned upright, to one size.

    Raises ValueError that names a file that is no picture, or not of that size.
    """
    part: list[np.ndarray] = []
    for name, content in named:
        with blamed("load_set", name, "be a complete picture"):
            picture = opened(io.BytesIO(content), size)
            part.append(np.asarray(rgb(picture) if fit is None else fit(rgb(upright(picture)))))
        if len(part) == PART:
            yield np.stack(part)
            part = []
    if part:
        yield np.stack(part)


class TooManyPixels(ValueError):
    """Raised for a picture that is larger than the caller takes, before its pixels are decoded."""


def opened(
    file: io.BytesIO | Path,
    size: tuple[int, int] | None = None,
    *,
    least: int | None = None,
    most: int | None = None,
) -> Image.Image:
    """The one picture in a file, read to its end; where `size` is given its header must say so.

    least: pixels that each side is to have at least, if it has; a JPEG may be decoded to a smaller scale then.
    most: pixels in all that its header may tell.

    Raises anything that Pillow does, see `den.data.checks.blamed`.
    """
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no file of {', '.join(FORMATS)}") from None
    if size is not None and picture.size != size:
        raise ValueError(f"{picture.size[0]}x{picture.size[1]} pixels instead of {size[0]}x{size[1]}")
    if most is not None and picture.size[0] * picture.size[1] > most:
        raise TooManyPixels(f"{picture.size[0]} x {picture.size[1]} pixels, more than {most:,}")
    if getattr(picture, "is_animated", False) and picture.format != "MPO":  # of MPO the first is the photograph
        raise ValueError(f"{getattr(picture, 'n_frames', 'several')} pictures in one file")
    if least is not None:
        picture.draft(None, (least, least))
    picture.load()
    return picture


def upright(picture: Image.Image) -> Image.Image:
    """The picture itself, turned as the camera noted; a note that cannot be read turns nothing."""
    with suppress(Exception):
        ImageOps.exif_transpose(picture, in_place=True)
    return picture


def rgb(picture: Image.Image) -> Image.Image:
    """8 bits a channel, as a viewer shows it: the upper byte of 16-bit greys, what is transparent before white."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        if picture.mode == "I" and picture.format not in ("PNG", "PPM"):
            raise ValueError("pixels of 32 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("pixels that are fractions")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def squared(picture: Path | io.BytesIO | Image.Image, size: int, *, most: int | None = None) -> Image.Image:
    """A picture, upright and in RGB: the square about its centre, scaled to size x size pixels.

    most: pixels that a file's picture may have. Raises anything that Pillow does, where it cannot be read.
    """
    if not isinstance(picture, Image.Image):
        picture = opened(picture, least=2 * size, most=most)
    return ImageOps.fit(rgb(upright(picture)), (size, size), Image.Resampling.BILINEAR)


def square(size: int) -> Fit:
    """A function that brings pictures to `size` x `size` pixels as the papers do.

    224 is the centre of the picture scaled to 256 x 256; other sizes are scaled to directly.
    """
    if size != 224:
        return lambda picture: picture.resize((size, size), Image.Resampling.BILINEAR)
    return lambda picture: picture.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
