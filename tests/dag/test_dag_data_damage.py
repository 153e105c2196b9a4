"""Omniglot and dense sets whose files are not what the set is known to be: read right, or refused by name."""

import io
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from den.data.cityscapes import load_cityscapes
from den.data.nyuv2 import load_nyuv2
from den.data.omniglot import load_omniglot
from den.data.pascal_context import load_pascal_context
from tests.dag.test_dag_omniglot import ALPHABETS, write_official, write_pieces, zipped
from tests.dense_files import write_npy_scenes, write_pascal

LETTER = "images_background/Greek/character02"


def drawing(size=105, paper=255):
    file = io.BytesIO()
    Image.new("L", (size, size), paper).save(file, "PNG")
    return file.getvalue()


def as_before(root):
    return [(s.name, s.classes, len(s)) for s in load_omniglot(root, "train", 21)]


WHOLE = [("Angelic", 2, 30), ("Greek", 3, 45)]


def test_empty_folders_hide_no_archives_and_archives_come_first(tmp_path):
    write_official(tmp_path)
    zipped(tmp_path)
    for folder in ALPHABETS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".DS_Store").touch()
    assert as_before(tmp_path) == WHOLE
    (tmp_path / LETTER).mkdir(parents=True)  # unpacked by half
    (tmp_path / LETTER / "0001_01.png").write_bytes(drawing())
    assert as_before(tmp_path) == WHOLE
    (tmp_path / "images_evaluation.zip").unlink()
    with pytest.raises(ValueError, match=r"images_evaluation must hold .* or have images_evaluation\.zip beside it"):
        load_omniglot(tmp_path, "train")


def test_empty_folders_hide_no_pieces(tmp_path):
    write_pieces(tmp_path, "train", 15)
    (tmp_path / "images_background").mkdir()
    assert [name for name, _, _ in as_before(tmp_path)] == ["alphabet0", "alphabet1"]


@pytest.mark.parametrize("as_archive", [False, True])
def test_notes_of_other_tools_and_suffixes_in_capitals_are_no_damage(tmp_path, as_archive):
    write_official(tmp_path)
    for path in sorted((tmp_path / LETTER).iterdir())[:3]:
        path.rename(path.with_suffix(".PNG"))
    (tmp_path / LETTER / "._0002_04.png").write_bytes(b"note")
    (tmp_path / LETTER / "Thumbs.db").write_bytes(b"note")
    if as_archive:
        for folder in ALPHABETS:
            with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
                for path in sorted((tmp_path / folder).rglob("*")):
                    archive.write(path, f"downloads/{path.relative_to(tmp_path)}")
                archive.writestr(f"__MACOSX/{LETTER}/0002_09.png", b"note")
            shutil.rmtree(tmp_path / folder)
    assert as_before(tmp_path) == WHOLE


DRAWINGS = {
    "lost": (lambda f: (f / "0002_07.png").unlink(), "character02 of Greek .* must have a drawing of drawer 7"),
    "a character lost": (shutil.rmtree, "character02 of Greek .* must have a drawing of drawer 1"),
    "one twice": (lambda f: (f / "0009_07.png").write_bytes(drawing()), r"0009_07\.png must be the only drawing"),
    "a character twice": (lambda f: shutil.copytree(f, f.with_name("character2")), "must be the only drawing"),
    "a drawer of none": (lambda f: (f / "0002_21.png").write_bytes(drawing()), r"0002_21\.png must be named"),
    "another name": (lambda f: (f / "a.png").write_bytes(drawing()), r"a\.png must be named"),
    "another size": (lambda f: (f / "0002_07.png").write_bytes(drawing(64)), r"0002_07\.png must be of 105x105 pixels"),
    "negative": (lambda f: (f / "0002_07.png").write_bytes(drawing(paper=0)), r"0002_07\.png must be black ink on"),
    "a web page": (lambda f: (f / "0002_07.png").write_bytes(b"<html>"), r"0002_07\.png must be a PNG, got no file of"),
    "empty": (lambda f: (f / "0002_07.png").write_bytes(b""), r"0002_07\.png must be a PNG, got no file of"),
    "a folder": (lambda f: ((f / "0002_07.png").unlink(), (f / "0002_07.png").mkdir()), r"7\.png must be readable"),
}  # fmt: skip


@pytest.mark.parametrize("case", DRAWINGS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_drawings_that_are_lost_doubled_or_damaged_are_told(tmp_path, case, split):
    write_official(tmp_path)
    damage, message = DRAWINGS[case]
    damage(tmp_path / LETTER)
    with pytest.raises(ValueError, match=f"^load_omniglot: .*{message}"):
        load_omniglot(tmp_path, split)


def test_pieces_of_other_characters_in_testing_are_told(tmp_path):
    write_pieces(tmp_path, "train", 15)
    write_pieces(tmp_path, "test", 5)
    with np.load(tmp_path / "omniglot_small.test0.npz") as piece:
        arrays = dict(piece)
    arrays["y"] = arrays["y"] + (arrays["c"] == 1)  # 3, 4, 5 for 2, 3, 4
    np.savez(tmp_path / "omniglot_small.test0.npz", **arrays)
    with pytest.raises(ValueError, match="the same characters for training and testing, got others of alphabet1"):
        load_omniglot(tmp_path, "test")


SCENES = {  # what is done to a file of scene 1, and what is told: "right" where it is read as before
    "image: bytes": ("image", lambda v: (v * 255).round().astype(np.uint8), "right"),
    "image: half precision": ("image", lambda v: v.astype(np.float16), "right"),
    "image: 0..255": ("image", lambda v: v * 255, r"image must lie in 0\.\.1, got .*\.\."),
    "image: normalised": ("image", lambda v: (v - 0.5) / 0.2, r"image must lie in 0\.\.1, got -"),
    "image: NaN": ("image", lambda v: np.where(v > 0.5, np.nan, v), "image must be finite, got nan"),
    "image: infinite": ("image", lambda v: np.where(v > 0.5, np.inf, v), "image must be finite, got inf"),
    "image: 16 bits": ("image", lambda v: (v * 65535).astype(np.uint16), "image must be floats, got uint16"),
    "image: wide bytes": ("image", lambda v: (v * 255).astype(np.int64), "image must be floats, got int64"),
    "image: channels first": ("image", lambda v: v.transpose(2, 0, 1), r"image must be \[H, W, 3\], got \[3, 24, 32\]"),
    "labels: bytes": ("label", lambda v: v.astype(np.uint8), "right"),
    "labels: floats": ("label", lambda v: v.astype(np.float32), "right"),
    "labels: small": ("label", lambda v: v.astype(np.int8), "right"),
    "labels: fractions": ("label", lambda v: v + 0.25, "labels must be whole numbers, got fractions"),
    "labels: NaN": ("label", lambda v: v * np.nan, "labels must be finite, got nan"),
    "labels: from 1": ("label", lambda v: v + 1, r"labels of segmentation must lie in 0\.\.39, got 0\.\.40"),
    "labels: 0..255": ("label", lambda v: v.clip(0) * 6, r"must lie in 0\.\.39, got 0\.\.234"),
    "labels: a mask": ("label", lambda v: v > 0, "labels must be numbers, got bool"),
    "labels: words": ("label", lambda v: v.astype(str), "labels must be numbers, got <U"),
    "labels: unsigned": ("label", lambda v: v.astype(np.uint16), r"must lie in 0\.\.39, got 1\.\.65535"),
    "labels: an axis more": ("label", lambda v: v[..., None], r"segmentation must be \[24, 32\]"),
    "depth: two axes": ("depth", lambda v: v[..., 0], "right"),
    "depth: millimetres": ("depth", lambda v: v * 1000, r"depth must lie in 0\.\.20, got 0\.\.4000"),
    "depth: centimetres": ("depth", lambda v: v * 100, r"depth must lie in 0\.\.20, got 0\.\.400"),
    "depth: whole": ("depth", lambda v: (v * 1000).astype(np.uint16), "depth must be floats, got uint16"),
    "depth: negative": ("depth", lambda v: -v, r"depth must lie in 0\.\.20, got -4\.\."),
    "depth: infinite": ("depth", lambda v: np.where(v == 0, np.inf, v), "depth must be finite, got inf"),
    "normals: 0..255": ("normal", lambda v: ((v + 1) * 127.5).astype(np.uint8), "normals must be floats, got uint8"),
    "normals: 0..255 as floats": ("normal", lambda v: (v + 1) * 127.5, r"normals must lie in -1\.\.1, got"),
    "normals: 0..1": ("normal", lambda v: (v + 1) / 2, "normals must be of length 1, got 1.3"),
    "normals: NaN": ("normal", lambda v: np.where(v == 0, np.nan, v), "normals must be finite, got nan"),
    "normals: channels first": ("normal", lambda v: v.transpose(2, 0, 1), r"normals must be \[3, 24, 32\]"),
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_npy_scenes(root, {"train": 2, "val": 1})
    return root


@pytest.mark.parametrize("case", SCENES)
def test_values_of_npy_scenes_are_those_of_the_set_or_refused(tmp_path, scenes, case):
    folder, change, wanted = SCENES[case]
    root = shutil.copytree(scenes, tmp_path / "nyuv2")
    path = root / "train" / folder / "1.npy"
    np.save(path, change(np.load(path)))
    if wanted != "right":
        with pytest.raises(ValueError, match=rf"{wanted}.* in .*{folder}/1\.npy"):
            load_nyuv2(root, "train").examples(slice(None))
        return
    before, after = (load_nyuv2(place, "train").examples(slice(None)) for place in (scenes, root))
    for (_, images, targets), (_, wanted_images, wanted_targets) in zip(after, before, strict=True):
        torch.testing.assert_close(images, wanted_images, atol=0.02, rtol=0)
        torch.testing.assert_close(targets, wanted_targets)


def test_disparities_of_published_pictures_are_refused_as_they_are(tmp_path):
    write_npy_scenes(tmp_path, {"train": 1, "val": 1}, classes=19, normals=False)
    path = tmp_path / "train" / "depth" / "0.npy"
    np.save(path, np.load(path) * 256 + 1)
    with pytest.raises(ValueError, match=r"load_cityscapes: depth must lie in 0\.\.128, got 1\.\.1025 in .*0\.npy"):
        load_cityscapes(tmp_path, "train").examples(slice(None))


def test_files_of_npy_scenes_that_are_no_arrays_are_told(tmp_path, scenes):
    root = shutil.copytree(scenes, tmp_path / "nyuv2")
    path = root / "train" / "depth" / "1.npy"
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))
    for content in (None, b"", b"\x93NUMPY\x01\0\xff\xff", b"\x93NUMPY\x01\0\x10\0{'descr': 1}    \n"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^load_nyuv2: .*depth/1\.npy must be a complete \.npy file, got ."):
            load_nyuv2(root, "train").examples(slice(None))


def test_folders_of_npy_scenes_must_hold_the_same_files(tmp_path, scenes):
    root = shutil.copytree(scenes, tmp_path / "nyuv2")
    (root / "train" / "image" / "._0.npy").touch()  # another tool's
    (root / "train" / "label_40").mkdir()  # and one that hides nothing
    assert len(load_nyuv2(root, "train")) == 2
    (root / "train" / "image" / "1.npy").unlink()
    with pytest.raises(ValueError, match=r"train/image must hold the image of every file, got no 1\.npy"):
        load_nyuv2(root, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbfa\r\n\r\nb\r\n", ""),
        (b"a\nb\na\n", "each once, got a 2 times"),
        (b"a\nc\n", r"got c, of which .*JPEGImages has no \.jpg"),
        (b"a -1\nb  1\n", "must name one image a line, got 'a -1'"),
        (b"\xff\xfea\0", "must be text in UTF-8"),
        (b"\n \n", "must name at least one image"),
    ],
)
def test_lists_of_pascal_context_are_read_right_or_refused(tmp_path, content, message):
    write_pascal(tmp_path, {"train": ["a", "b"], "val": []})
    (tmp_path / "ImageSets" / "Context" / "train.txt").write_bytes(content)
    if not message:
        assert load_pascal_context(tmp_path, "train", 32).read.names == ["a", "b"]
        return
    with pytest.raises(ValueError, match=rf"^load_pascal_context: .*train\.txt {message}|train\.txt must .*{message}"):
        load_pascal_context(tmp_path, "train", 32)


def test_files_of_pascal_context_of_other_values_are_told(tmp_path):
    write_pascal(tmp_path, {"train": ["a"], "val": []})

    def refused(message):
        with pytest.raises(ValueError, match=f"^load_pascal_context: {tmp_path}.*{message}"):
            load_pascal_context(tmp_path, "train", 32).examples(slice(None))

    saliency = tmp_path / "sal_distill" / "a.png"
    values = np.asarray(Image.open(saliency))
    before = load_pascal_context(tmp_path, "train", 32).examples(slice(None))
    Image.fromarray(values.astype(np.uint16) * 257).save(saliency)
    after = load_pascal_context(tmp_path, "train", 32).examples(slice(None))
    assert all(torch.equal(one[2], other[2]) for one, other in zip(before, after, strict=True))
    Image.fromarray(values // 255).save(saliency)
    refused(r"sal_distill/a\.png must hold saliency of 0\.\.255, got 0\.\.1")
    saliency.write_bytes(b"<html>")
    refused(r"sal_distill/a\.png must be a picture, got no file of")
    Image.fromarray(values).save(saliency)
    labels = tmp_path / "pascal-context" / "trainval" / "a.mat"
    savemat(labels, {"LabelMap": np.full((20, 30), 0.5)})
    refused(r"a\.mat must hold a LabelMap of whole numbers")
    savemat(labels, {"LabelMap": "words"})
    refused(r"a\.mat must hold a LabelMap of whole numbers")
    savemat(tmp_path / "human_parts" / "a.mat", {"anno": {"objects": 3}})
    refused(r"human_parts/a\.mat must hold parts of a")
    savemat(tmp_path / "human_parts" / "a.mat", {"anno": np.zeros(3)})
    refused(r"human_parts/a\.mat must hold parts of a")
