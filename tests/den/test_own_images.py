"""People's own images: folders of classes, Hugging Face data sets; what a run keeps of them."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from den.data import load_set
from den.data.folder import parse
from den.data.images import Kept
from den.runs.trained import as_trained

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "owl": (30, 30, 200)}


def save_picture(path, colour, size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of each of three classes, of three formats."""
    for name, colour in COLOURS.items():
        for k in range(10):
            save_picture(tmp_path / "pics" / name / f"{k}.{('jpg', 'png', 'webp')[k % 3]}", colour)
    return tmp_path / "pics"


def test_classes_are_the_folders_and_a_fifth_of_each_is_for_testing(folder):
    train, test = (load_set(f"folder:{folder}@16", split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("cat", "dog", "owl")
    assert (train.labels.bincount().tolist(), test.labels.bincount().tolist()) == ([8] * 3, [2] * 3)
    assert train.images.shape == (24, 3, 16, 16)
    for image, label in zip(test.images, test.labels.tolist(), strict=True):
        expected = torch.tensor(list(COLOURS.values())[label]).view(3, 1, 1)
        assert (image.int() - expected).abs().max() < 12  # JPEG
    assert (train.mean, train.std) == (test.mean, test.std)
    assert train.inputs().mean((0, 2, 3)).abs().max() < 1e-3


def test_the_splits_that_a_folder_has_are_kept(folder):
    for name, colour in COLOURS.items():
        save_picture(folder.parent / "split" / "train" / name / "deep" / "a.png", colour)
    save_picture(folder.parent / "split" / "val" / "owl" / "b.png", COLOURS["owl"])
    train, test = (load_set("folder:split@8", split, folder.parent) for split in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist(), test.classes) == ([0, 1, 2], [2], 3)
    save_picture(folder.parent / "split" / "val" / "rat" / "b.png", (0, 0, 0))
    with pytest.raises(ValueError, match=r"must be those of .*train, got rat"):
        load_set("folder:split@8", "test", folder.parent)


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [("L", "png", {}), ("RGBA", "png", {}), ("P", "gif", {}), ("CMYK", "jpg", {"quality": 95}), ("LA", "png", {})],
)
def test_pictures_of_all_kinds_are_read(folder, mode, suffix, options):
    save_picture(folder / "owl" / f"other.{suffix}", (90, 90, 90), mode=mode, **options)
    both = [load_set(f"folder:{folder}@8", split) for split in ("train", "test")]
    means = torch.cat([s.images for s in both]).float().mean((2, 3))
    assert len(means) == 31
    assert ((means - 90).abs() < 4).all(1).sum() == 1


def test_a_turned_photograph_is_turned_upright(folder):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter clockwise to see it
    for k in range(10):
        Image.fromarray(pixels).save(folder / "owl" / f"turned{k}.jpg", exif=exif, quality=95)
    images = torch.cat([load_set(f"folder:{folder}@8", split).images for split in ("train", "test")]).float()
    turned = images[(images.amax((1, 2, 3)) > 240)]
    assert len(turned) == 10
    assert (turned[:, :, 0] > 200).all()  # white above, black below
    assert (turned[:, :, -1] < 60).all()


def test_broken_files_are_named_left_out_and_counted_every_time(folder, capsys):
    (folder / "cat" / "broken.jpg").write_bytes(b"nothing")
    whole = (folder / "cat" / "1.png").read_bytes()
    (folder / "dog" / "half.png").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        train = load_set(f"folder:{folder}@8", "train")
        told = capsys.readouterr().err
        assert len(train) == 24
        assert "left out 2 of 32 pictures" in told
        assert "broken.jpg" in told
        assert "half.png" in told


def test_a_class_without_a_whole_picture_is_named(folder):
    save_picture(folder / "rat" / "a.png", (0, 0, 0))
    (folder / "rat" / "a.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="rat must hold a picture that can be read"):
        load_set(f"folder:{folder}@8", "train")
    (folder / "rat" / "a.png").unlink()
    with pytest.raises(ValueError, match="rat must hold pictures, got none"):
        load_set(f"folder:{folder}@8", "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder:absent@8", "folder of folder:absent must be there, got none of"),
        ("folder:empty@8", "must hold a folder of pictures for each class, got none"),
        ("folder:pics@0", "size of pics must be in 1..1024"),
        ("folder:", "name must be folder:PATH@SIZE"),
    ],
)
def test_wrong_folders_are_told(folder, name, message):
    (folder.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        load_set(name, "train", folder.parent)


def test_a_folder_that_has_moved_is_found_in_the_data_root(folder, tmp_path):
    new = tmp_path / "elsewhere"
    new.mkdir()
    folder.rename(new / "pics")
    assert len(load_set(f"folder:{folder}@8", "test", new)) == 6


def test_names():
    assert parse("folder:a@b/c-3@32", "folder:") == ("a@b/c-3", 32)


def test_a_changed_folder_keeps_the_runs_normalisation_and_must_keep_its_classes(folder):
    now = load_set(f"folder:{folder}@8", "test")
    kept = Kept((0.5,) * 3, (0.25,) * 3, now.class_names)
    assert (as_trained(now, kept).mean, as_trained(now, None).mean) == ((0.5,) * 3, now.mean)
    with pytest.raises(ValueError, match="must be those that the run has learnt, got others: owl, pig"):
        as_trained(now, Kept(now.mean, now.std, ("cat", "dog", "pig")))


class FakeRows:
    """What is used of `datasets.Dataset`."""

    def __init__(self, pictures, labels):
        self.rows = [{"img": p, "kind": y} for p, y in zip(pictures, labels, strict=True)]
        names = types.SimpleNamespace
        self.features = {"img": type("Image", (), {})(), "kind": type("ClassLabel", (names,), {})(names=["a", "b"])}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]

    def select(self, index):
        return FakeRows([self.rows[k]["img"] for k in index], [self.rows[k]["kind"] for k in index])


def test_a_set_of_hugging_face(monkeypatch, capsys):
    pictures = [Image.new("RGB", (9, 9), (10 * k, 0, 0)) for k in range(12)]
    whole, hidden = FakeRows([*pictures[:10], None], [0, 1] * 5 + [1]), FakeRows(pictures[10:], [1, -1])
    splits = {"train": whole, "validation": hidden}
    asked = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *names: asked.append(names) or splits
    monkeypatch.setitem(sys.modules, "datasets", module)
    train, test = (load_set("hf:someone/things:small@8", split) for split in ("train", "test"))
    assert asked[0] == ("someone/things", "small")
    assert (len(train), test.labels.tolist(), train.class_names) == (
        10,
        [1],
        ("a", "b"),
    )  # -1: not told
    assert train.images[3, 0].unique().tolist() == [30]
    assert "picture 10 of hf:someone/things:small@8 (train)" in capsys.readouterr().err


def test_hugging_faces_library_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="not installed \\(pip install datasets\\)"):
        load_set("hf:cifar10", "train")


def test_a_saved_set_of_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pictures = [Image.new("RGB", (9, 9), (10 * k, 0, 0)) for k in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 5}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    train, test = (load_set(f"hf:{tmp_path / 'saved'}@8", split, tmp_path) for split in ("train", "test"))
    assert (len(train), len(test), train.class_names) == (8, 2, ("a", "b"))
    assert list((tmp_path / "den-cache").glob("hf-*"))
