"""Whether a figure has been drawn."""

from pathlib import Path

from PIL import Image


def assert_drawn(path: Path) -> None:
    """Raise AssertionError unless a picture has sides of 200 pixels and more, and more than 20 colours."""
    with Image.open(path) as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
