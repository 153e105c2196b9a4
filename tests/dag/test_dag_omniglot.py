"""Omniglot in both layouts, from small files of the same make."""

import hashlib
import json
import lzma
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from den.dag.config import DagDataConfig
from den.dag.scenarios import load_tasks
from den.data.omniglot import load_omniglot

ALPHABETS = {"images_background": {"Greek": 3}, "images_evaluation": {"Angelic": 2}}


def write_official(root):
    """Drawer d's character c of an alphabet: a black square at (c, d) of a white 105x105 image."""
    for folder, alphabets in ALPHABETS.items():
        for name, characters in alphabets.items():
            for c in range(characters):
                place = root / folder / name / f"character{c + 1:02d}"
                place.mkdir(parents=True)
                for drawer in range(1, 21):
                    pixels = np.full((105, 105), 255, np.uint8)
                    pixels[15 * c : 15 * c + 15, 5 * drawer - 5 : 5 * drawer] = 0
                    Image.fromarray(pixels).convert("1").save(place / f"{c + 1:04d}_{drawer:02d}.png")


def write_pieces(root, split, drawers, damage=False):
    """Two alphabets of two and three characters."""
    kinds = [(a, y) for a, characters in ((0, (0, 1)), (1, (2, 3, 4))) for y in characters]
    generator = np.random.default_rng(len(split))
    pixels = generator.integers(0, 2, (len(kinds) * drawers, 105, 105)).astype(np.uint8)
    meta = {"kind": "bits", "shape": list(pixels.shape), "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
    if damage:
        pixels[0, 0, 0] ^= 1
    np.savez(
        root / f"omniglot_small.{split}0.npz",
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
        data=np.frombuffer(lzma.compress(np.packbits(pixels, axis=-1).tobytes()), np.uint8),
        c=np.repeat([a for a, _ in kinds], drawers).astype(np.uint8),
        y=np.repeat([y for _, y in kinds], drawers).astype(np.uint8),
    )
    return pixels


def write_fifty(root):
    """Fifty alphabets of one character; drawer d's drawing of alphabet a has d rows of a + 1 black pixels."""
    for alphabet in range(50):
        place = root / "images_background" / f"A{alphabet:02d}" / "character01"
        place.mkdir(parents=True)
        for drawer in range(1, 21):
            pixels = np.full((105, 105), 255, np.uint8)
            pixels[:drawer, : alphabet + 1] = 0
            Image.fromarray(pixels).save(place / f"{alphabet:04d}_{drawer:02d}.png")


def test_protocol_mtl20_is_a_fixed_subset_in_parts_of_50_20_and_30_percent(tmp_path):
    write_fifty(tmp_path)
    parts = {split: load_omniglot(tmp_path, split, protocol="mtl20") for split in ("train", "validation", "test")}
    names = [each.name for each in parts["train"]]
    assert len(names) == 20
    assert all([each.name for each in sets] == names for sets in parts.values())
    again = load_omniglot(tmp_path, "test", 21, "mtl20")
    for train, validation, test, other in zip(*parts.values(), again, strict=True):
        assert train.images.shape[1:] == (1, 105, 105)
        assert [len(each) for each in (train, validation, test)] == [10, 4, 6]
        rows = [set((each.images[:, 0, :, 0] > 0).sum(1).tolist()) for each in (train, validation, test)]
        assert sorted(set.union(*rows)) == list(range(1, 21))  # every drawing once
        assert torch.equal(other.labels, test.labels)
    data = DagDataConfig(root=tmp_path, protocol="mtl20", size=21)
    assert [len(load_tasks(data, split)[3]) for split in ("train", "validation", "test")] == [10, 4, 6]


def test_protocol_mtl20_needs_the_whole_set(tmp_path):
    write_official(tmp_path)
    with pytest.raises(ValueError, match=r"must hold all 50 alphabets.*got 2 in"):
        load_omniglot(tmp_path, "train", protocol="mtl20")
    (tmp_path / "pieces").mkdir()
    write_pieces(tmp_path / "pieces", "train", 15)
    with pytest.raises(ValueError, match=r"must hold all 50 alphabets.*got 0 in"):
        load_omniglot(tmp_path / "pieces", "train", protocol="mtl20")
    with pytest.raises(ValueError, match="protocol must be one of drawers, mtl20, got 'other'"):
        load_omniglot(tmp_path, "train", protocol="other")


def zipped(root):
    for folder in ALPHABETS:
        with zipfile.ZipFile(root / f"{folder}.zip", "w") as archive:
            for path in sorted((root / folder).rglob("*.png")):
                archive.write(path, path.relative_to(root))
        shutil.rmtree(root / folder)


@pytest.mark.parametrize("as_archives", [False, True])
def test_official_layout_gives_a_task_per_alphabet(tmp_path, as_archives):
    write_official(tmp_path)
    if as_archives:
        zipped(tmp_path)
    train, test = (load_omniglot(tmp_path, split, size=21) for split in ("train", "test"))
    assert [(s.name, s.classes, len(s)) for s in train] == [("Angelic", 2, 30), ("Greek", 3, 45)]
    assert [(s.name, s.classes, len(s)) for s in test] == [("Angelic", 2, 10), ("Greek", 3, 15)]
    assert test[1].labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    third = test[1].images[11, 0]  # character 3, drawer 17, a fifth of its size
    assert third[6:9, 16].tolist() == [255] * 3
    assert third.float().sum() == 3 * 255
    assert train[0].mean == test[1].mean


def test_pieces_give_a_task_per_alphabet(tmp_path):
    pixels = write_pieces(tmp_path, "train", 15)
    write_pieces(tmp_path, "test", 5)
    train, test = (load_omniglot(tmp_path, split, size=105) for split in ("train", "test"))
    assert [(s.name, s.classes, len(s)) for s in train] == [("alphabet0", 2, 30), ("alphabet1", 3, 45)]
    assert [len(s) for s in test] == [10, 15]
    assert torch.equal(train[1].images[:, 0], torch.from_numpy(pixels[30:] * np.uint8(255)))
    assert train[1].labels.unique().tolist() == [0, 1, 2]


def test_images_are_scaled_by_averaging(tmp_path):
    write_official(tmp_path)
    small, large = (load_omniglot(tmp_path, "train", size=size)[0] for size in (7, 105))
    assert small.images.shape == (30, 1, 7, 7)
    means = torch.nn.functional.avg_pool2d(large.images.float(), 15)
    assert torch.equal(small.images, means.round().to(torch.uint8))


def test_scenario_picks_tasks_by_name(tmp_path):
    write_official(tmp_path)
    data = DagDataConfig(root=tmp_path, only=("Greek",))
    assert [s.name for s in load_tasks(data, "train")] == ["Greek"]
    with pytest.raises(ValueError, match="only must be among Angelic, Greek, got Latin"):
        load_tasks(DagDataConfig(root=tmp_path, only=("Latin",)), "train")


def test_an_empty_or_missing_root_is_explained(tmp_path):
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match="data root must hold images_background"):
            load_omniglot(root, "train")


def test_damaged_files_are_refused(tmp_path):
    write_pieces(tmp_path, "train", 2, damage=True)
    with pytest.raises(ValueError, match="must match their sha256"):
        load_omniglot(tmp_path, "train")
    (tmp_path / "omniglot_small.train0.npz").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="must be a complete packed piece"):
        load_omniglot(tmp_path, "train")
    (tmp_path / "images_background.zip").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="must be a complete archive"):
        load_omniglot(tmp_path, "train")


@pytest.mark.parametrize(
    ("split", "size", "message"), [("val", 28, "split must be"), ("train", 0, "size must be at least 1")]
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, split, size, message):
    with pytest.raises(ValueError, match=message):
        load_omniglot(tmp_path, split, size)
