"""Small files of the layouts in which the image sets are published."""

import dataclasses
import hashlib
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from den.data import cifar, stl10, tinyimagenet


def random_images(count: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def picture(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def unpack(root: Path, folder: str, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root / folder


def pack(root: Path, archive, members: dict[str, bytes]):
    """The archive, packed; returns `archive` with its md5."""
    path = root / archive.file
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(f"{archive.folder}/{name}", content)
    else:
        with tarfile.open(path, "w:gz") as file:
            for name, content in reversed(members.items()):  # their order is not to matter
                info = tarfile.TarInfo(f"{archive.folder}/{name}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return dataclasses.replace(archive, md5=hashlib.md5(path.read_bytes()).hexdigest())


def cifar_members(name: str, form: int, images: np.ndarray, labels: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Both splits, the training split in the published number of files; every file has the same images."""
    version = cifar.VERSIONS[name][form]
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    if form == 0:
        batch = {"data": rows} | {key: labels[kind].tolist() for kind, key in version.labels.items()}
        content = pickle.dumps(batch, protocol=2)
    else:
        content = np.concatenate([*(labels[kind].astype(np.uint8)[:, None] for kind in version.labels), rows], 1)
        content = content.tobytes()
    return {member: content for members in version.members.values() for member in members}


def small_cifar(monkeypatch, root: Path, name: str, form: int, images: np.ndarray, labels) -> Path:
    """A CIFAR archive of few images, and the tables of `den.data.cifar` to match; returns its path."""
    monkeypatch.setattr(cifar, "TEST_IMAGES", len(images))
    versions = list(cifar.VERSIONS[name])
    archive = pack(root, versions[form].archive, cifar_members(name, form, images, labels))
    versions[form] = dataclasses.replace(versions[form], archive=archive, images=len(images))
    monkeypatch.setitem(cifar.VERSIONS, name, tuple(versions))
    return root / archive.file


def stl10_members(images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    columns = images.transpose(0, 3, 2, 1).tobytes()
    both = {"X": columns, "y": (labels + 1).astype(np.uint8).tobytes()}
    return {f"{split}_{key}.bin": content for split in ("train", "test") for key, content in both.items()}


def tiny_members(images: np.ndarray, names: list[str], each: int) -> dict[str, bytes]:
    """`each` training pictures and one of validation per class, in this order."""
    members = {"wnids.txt": "\n".join(reversed(names)).encode()}
    annotations = []
    for label, name in enumerate(names):
        files = [f"{name}_{k}.JPEG" for k in range(each)]
        members[f"train/{name}/{name}_boxes.txt"] = "".join(f"{file}\t0\t0\t9\t9\n" for file in files).encode()
        for k, file in enumerate(files):
            members[f"train/{name}/images/{file}"] = picture(images[label * (each + 1) + k])
        members[f"val/images/val_{label}.JPEG"] = picture(images[label * (each + 1) + each])
        annotations.insert(0, f"val_{label}.JPEG\t{name}\t0\t0\t9\t9\n")
    members["val/val_annotations.txt"] = "".join(annotations).encode()
    return members


def small_tiny(monkeypatch, root: Path, members: dict[str, bytes]) -> Path:
    archive = pack(root, tinyimagenet.ARCHIVE, members)
    monkeypatch.setattr(tinyimagenet, "ARCHIVE", archive)
    return root / archive.file


def small_stl10(monkeypatch, root: Path, members: dict[str, bytes], count: int) -> Path:
    archive = pack(root, stl10.ARCHIVE, members)
    monkeypatch.setattr(stl10, "ARCHIVE", archive)
    monkeypatch.setattr(stl10, "IMAGES", {"train": count, "test": count})
    return root / archive.file


def median_edge_residuals(images: np.ndarray) -> np.ndarray:
    """What `den.data.pieces` undoes, one pixel of one channel at a time: uint8 [n, 3, H, W]."""
    n, height, width, _ = images.shape
    red, green, blue = (images[..., k].astype(int) for k in range(3))
    residuals = np.zeros((n, 3, height, width), np.uint8)
    for channel, plane in enumerate((green, red - green, blue - green)):
        for b, y, x in np.ndindex(n, height, width):
            left, above, corner = (
                plane[b, y - dy, x - dx] if y >= dy and x >= dx else 0 for dy, dx in ((0, 1), (1, 0), (1, 1))
            )
            low, high = min(left, above), max(left, above)
            predicted = low if corner >= high else high if corner <= low else left + above - corner
            residuals[b, channel, y, x] = (plane[b, y, x] - predicted) & 255
    return residuals


def write_median_edge(path: Path, images: np.ndarray, **labels: np.ndarray) -> None:
    data = np.frombuffer(lzma.compress(median_edge_residuals(images).tobytes()), np.uint8)
    np.savez(path, meta=_meta("med", images), data=data, **labels)


def write_jpegs(path: Path, images: np.ndarray, **labels: np.ndarray) -> np.ndarray:
    """A piece of JPEG files, every other one grey; returns their pixels."""
    files = [_jpeg(image, grey=k % 2 == 1) for k, image in enumerate(images)]
    starts = [file.index(b"\xff\xda") for file in files]
    starts = [s + 2 + int.from_bytes(f[s + 2 : s + 4], "big") for s, f in zip(starts, files, strict=True)]
    scans = [file[start:-2] for file, start in zip(files, starts, strict=True)]
    heads = {f"head{grey}": np.frombuffer(files[grey][: starts[grey]], np.uint8) for grey in (0, 1)}
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    np.savez(
        path, meta=_meta("jpeg", pixels), scan=np.frombuffer(b"".join(scans), np.uint8),
        len=np.array([len(scan) for scan in scans], np.uint16), grey=np.arange(len(images), dtype=np.uint8) % 2,
        **heads, **labels,
    )  # fmt: skip
    return pixels


def _jpeg(image: np.ndarray, grey: bool) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).convert("L" if grey else "RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def _meta(kind: str, pixels: np.ndarray) -> np.ndarray:
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return np.frombuffer(json.dumps({"kind": kind, "shape": pixels.shape, "sha256": digest}).encode(), np.uint8)
