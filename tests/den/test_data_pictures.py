"""Pictures of every make: read as a viewer shows them, or refused by their names."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from den.data.decode import picture_names, pictures, square

GREY = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
RAMP = np.stack([GREY, GREY[::-1], GREY.T], -1)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(content, **options):
    (part,) = pictures([("n07/a.png", content)], **(options or {"size": (8, 8)}))
    return part[0]


def as_grey(array):
    return np.repeat(array[..., None], 3, -1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_greys_keep_their_upper_byte(kind):
    wide = GREY.astype(np.uint16) << 8 | 77
    assert np.array_equal(read(saved(Image.fromarray(wide), kind)), as_grey(GREY))


def test_palettes_one_bit_and_grey_with_alpha_become_colours():
    colours = Image.fromarray(RAMP // 64 * 64).quantize(64)
    assert np.array_equal(read(saved(colours)), np.asarray(colours.convert("RGB")))
    black = np.where(GREY > 99, 255, 0).astype(np.uint8)
    assert np.array_equal(read(saved(Image.fromarray(black).convert("1"))), as_grey(black))
    assert np.array_equal(read(saved(Image.fromarray(GREY).convert("LA"))), as_grey(GREY))
    assert np.array_equal(read(saved(Image.fromarray(RAMP).convert("RGBA"))), RAMP)


def test_what_is_transparent_lies_before_white_and_hides_its_colour():
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    image = read(saved(Image.fromarray(np.dstack([RAMP, alpha]), "RGBA")))
    assert np.array_equal(image[:4], RAMP[:4])
    assert (image[4:] == 255).all()
    palette = Image.fromarray(np.repeat([[0, 1]], 8, 0).repeat(4, 1).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    image = read(saved(palette, transparency=0))
    assert image[0].tolist() == [[255] * 3] * 4 + [[40, 50, 60]] * 4


def test_cmyk_jpegs_have_their_colours():
    red = Image.new("RGB", (8, 8), (250, 10, 20)).convert("CMYK")
    assert np.abs(read(saved(red, "JPEG", quality=100)).astype(int) - [250, 10, 20]).max() <= 3


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_scaled_photographs_are_turned_as_the_camera_noted(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    top_dark = np.zeros((8, 8, 3), np.uint8)
    top_dark[4:] = 255
    stored = np.rot90(top_dark, {1: 0, 3: 2, 6: 1, 8: 3}[turn])
    image = read(saved(Image.fromarray(stored.copy()), "JPEG", exif=exif, quality=100), fit=square(8))
    assert np.abs(image.astype(int) - top_dark).max() <= 3


def test_a_note_that_cannot_be_read_turns_nothing():
    content = saved(Image.fromarray(RAMP), exif=b"Exif\0\0not a directory at all")
    assert np.array_equal(read(content, fit=square(8)), RAMP)


def test_other_files_in_a_folder_are_no_pictures(tmp_path):
    for name in ("b.JPG", "a.jpeg", "c.Png", "._a.jpeg", ".DS_Store", "Thumbs.db", "d.jpeg.part", "e.txt"):
        (tmp_path / name).touch()
    assert picture_names(tmp_path) == ["a.jpeg", "b.JPG", "c.Png"]
    assert picture_names(tmp_path / "none") == []


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *more, depth=8):
    return b"".join([
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)), *more,
        chunk(b"IDAT", zlib.compress(b"\0" * (3 * 8 + 1) * 8)), chunk(b"IEND", b""),
    ])  # fmt: skip


def half(content):
    return content[: len(content) // 2]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
MALFORMED = {
    "empty": b"",
    "a web page": b"<html>404</html>",
    "a bomb": png(60000, 60000),
    "no size": png(0, 8),
    "a large text": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * (3 << 20)))),
    "an impossible depth": png(8, 8, depth=7),
    "half a png": half(saved(NOISE)),
    "half a jpeg": half(saved(NOISE.resize((8, 8)), "JPEG", quality=100)),
    "half a gif": half(saved(NOISE, "GIF")),
    "half a webp": half(saved(NOISE, "WEBP", lossless=True)),
    "half a bmp": half(saved(NOISE, "BMP")),
    "half a tiff": half(saved(NOISE, "TIFF")),
    "a tiff of fractions": saved(Image.new("F", (8, 8), 0.5), "TIFF"),
    "a tiff of 32 bits": saved(Image.new("I", (8, 8), 200), "TIFF"),
    "a dds": b"DDS " + struct.pack("<I", 124) + b"\0" * 120,
    "a qoi": b"qoif" + struct.pack(">II", 8, 8) + b"\3\0\0\0\0",
    "a ppm of 70000": b"P6 8 8 70000\n" + b"\0" * 192,
    "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n",
    "an animated gif": saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "an animated png": saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "an animated webp": saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "a tiff of pages": saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_pictures_are_refused_by_name(content, scaled):
    with pytest.raises(ValueError, match=r"^load_set: n07/a\.png must be a complete picture, got .") as caught:
        read(content, **({"fit": square(8)} if scaled else {}))
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # no address of an object


def test_of_several_pages_for_several_screens_the_first_is_the_photograph():
    content = saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])
    assert np.abs(read(content).astype(int) - [254, 0, 0]).max() <= 3


def test_pictures_of_another_size_are_refused_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"n07/a\.png must be a complete picture, got 8x8 pixels instead of 64x64"):
        read(saved(NOISE), size=(64, 64))
