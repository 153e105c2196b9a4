"""Image sets whose lists, folders or arrays are not what the set is known to be: read right, or refused by name."""

import lzma
import pickle
import re
import shutil
import tracemalloc

import numpy as np
import pytest

from den.dag.config import DagDataConfig
from den.dag.scenarios import load_tasks
from den.data import cifar, load_set, stl10
from den.data.checks import matching, rows, whole_labels
from den.data.pieces import unpacked
from tests.den.test_data import write_piece
from tests.image_files import (
    cifar_members,
    picture,
    random_images,
    small_cifar,
    stl10_members,
    tiny_members,
    unpack,
    write_jpegs,
    write_median_edge,
)

NAMES = [f"n{k:08d}" for k in range(200)]


def painted(count, size):
    """Pictures of which number k is k: wrong labels can be seen."""
    return np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Unpacked sets, whole, to be copied and damaged."""
    root = tmp_path_factory.mktemp("published")
    unpack(root, "tiny-imagenet-200", tiny_members(np.repeat(painted(200, 64), 2, 0), NAMES, each=1))
    for k in range(50):
        for split in ("train", "val"):
            unpack(root, f"imagenet50/{split}/{NAMES[k]}", {"a.JPEG": picture(painted(200, 8)[4 * k])})
    rows = {name: ["filename,label"] for name in ("train", "val", "test")}
    for k in range(300):
        rows[("train", "val", "test")[k // 6 % 3]].append(f"p{k}.jpg,{NAMES[k // 6]}")
    members = {f"images/p{k}.jpg": picture(painted(200, 8)[4 * (k // 6)]) for k in range(300)}
    unpack(root, "mini-imagenet", members | {f"{name}.csv": "\n".join(each).encode() for name, each in rows.items()})
    return root


def edited(change, encoding="utf-8"):
    return lambda path: path.write_bytes(change(path.read_text()).encode(encoding))


def lines(change):
    return edited(lambda text: "\n".join(change(text.splitlines())))


def before(content):
    return lambda path: path.write_bytes(content + path.read_bytes())


BOXES = f"train/{NAMES[3]}/{NAMES[3]}_boxes.txt"
TINY = {  # what is done to a file, and the split that reads it
    "wnids: a byte-order mark": ("wnids.txt", before(b"\xef\xbb\xbf"), "right"),
    "wnids: CRLF": ("wnids.txt", edited(lambda text: text.replace("\n", "\r\n")), "right"),
    "wnids: another order": ("wnids.txt", lines(lambda each: each[::-1]), "right"),
    "wnids: blank lines and blanks": ("wnids.txt", lines(lambda each: [f" {line} \n" for line in each]), "right"),
    "wnids: UTF-16": ("wnids.txt", edited(str, "utf-16"), "must be text in UTF-8"),
    "wnids: cut": ("wnids.txt", lines(lambda each: each[::10]), "must list 200 classes, one a line, got 20 in 20"),
    "wnids: empty": ("wnids.txt", edited(lambda _: ""), "must list 200 classes, one a line, got 0"),
    "wnids: one twice": ("wnids.txt", lines(lambda each: [each[1], *each[1:]]), "200 classes, one a line, got 199"),
    "wnids: words behind": ("wnids.txt", lines(lambda each: [f"{line}\tdog" for line in each]), "one a line"),
    "wnids: another class": ("wnids.txt", edited(lambda text: text.replace(NAMES[3], "n99999999")), "(n0{7}3|n9{8})"),
    "list: a byte-order mark": ("{list}", before(b"\xef\xbb\xbf"), "right"),
    "list: CRLF": ("{list}", edited(lambda text: text.replace("\n", "\r\n")), "right"),
    "list: spaces for tabs": ("{list}", edited(lambda text: text.replace("\t", "  ")), "right"),
    "list: blank lines": ("{list}", lines(lambda each: ["", *each, " ", ""]), "right"),
    "list: cut": ("{list}", lines(lambda each: each[: len(each) // 2]), "must name all that .*images holds, got no "),
    "list: one twice": ("{list}", lines(lambda each: [*each, each[0]]), "must name everything once, got .* twice"),
    "list: of another": ("{list}", edited(lambda text: text.replace("_", "-")), "must name what .*images holds, got"),
    "list: commas": ("{list}", edited(lambda text: text.replace("\t", ",")), "{list}"),
    "list: binary": ("{list}", lambda path: path.write_bytes(b"\xff\xfe\0\x81"), "must be text in UTF-8"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("case", TINY)
def test_lists_of_tiny_imagenet_are_read_right_or_refused(tmp_path, published, case, split):
    file, damage, wanted = TINY[case]
    listed = {"train": BOXES, "test": "val/val_annotations.txt"}[split]
    folder = shutil.copytree(published / "tiny-imagenet-200", tmp_path / "tiny-imagenet-200")
    damage(folder / file.format(list=listed))
    if wanted == "right":
        found = load_set("tinyimagenet", split, tmp_path)
        assert sorted(found.labels.tolist()) == list(range(200))
        assert found.images[:, 0, 0, 0].tolist() == found.labels.tolist()
    else:
        with pytest.raises(ValueError, match=rf"^load_set: .*tiny-imagenet-200.*{wanted.replace('{list}', listed)}"):
            load_set("tinyimagenet", split, tmp_path)


@pytest.mark.parametrize(
    ("split", "damage", "message"),
    [
        ("train", lambda f: shutil.rmtree(f / "train" / NAMES[7]), f"wnids.txt must name what .*{NAMES[7]}"),
        ("train", lambda f: (f / "train" / "n99").mkdir(), "wnids.txt must name all that .*train holds, got no n99"),
        ("train", lambda f: (f / BOXES).with_name("images").joinpath("x.JPEG").touch(), r"_boxes.txt .*got no x\.JPEG"),
        ("test", lambda f: (f / "val/images/val_9.JPEG").unlink(), r"got val_9\.JPEG which is not there"),
        ("test", lambda f: shutil.rmtree(f / "val/images"), "which is not there"),
        ("test", lambda f: (f / "val/images/val_9.JPEG").write_bytes(picture(painted(1, 32)[0])), "val_9.*32x32"),
        ("test", lambda f: lines(lambda each: [line.replace(NAMES[3], NAMES[4]) for line in each])(
            f / "val/val_annotations.txt"), "val_annotations.txt must name all that .*wnids"),
    ],
)  # fmt: skip
def test_folders_of_tiny_imagenet_must_fit_its_lists(tmp_path, published, split, damage, message):
    damage(shutil.copytree(published / "tiny-imagenet-200", tmp_path / "tiny-imagenet-200"))
    with pytest.raises(ValueError, match=f"^load_set: .*tiny-imagenet-200.*{message}"):
        load_set("tinyimagenet", split, tmp_path)


def test_notes_of_other_tools_are_passed_over(tmp_path, published):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    for place in ("tiny-imagenet-200/val/images/._val_0.JPEG", "tiny-imagenet-200/train/.DS_Store",
                  "imagenet50/val/.ipynb_checkpoints/a.JPEG", f"imagenet50/val/{NAMES[0]}/._a.JPEG",
                  f"imagenet50/val/{NAMES[0]}/Thumbs.db", "mini-imagenet/images/._p0.jpg"):  # fmt: skip
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"\0note")
    for name, count in (("tinyimagenet", 200), ("imagenet50@8", 50), ("miniimagenet@8", 50)):
        for split in ("train", "test"):
            assert len(load_set(name, split, tmp_path)) == count * (5 if (name[0], split) == ("m", "train") else 1)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "val" / NAMES[0]).rename(f / "val" / "n99"), "val must be those of .*train, got n99"),
        (lambda f: (f / "train" / NAMES[0]).rename(f / "train" / "n99"), "must be those of .*train, got n00000000"),
        (lambda f: shutil.rmtree(f / "val" / NAMES[0]), "of 50 classes, got 49 in .*val"),
        (lambda f: (f / "train" / "n99").mkdir(), "of 50 classes, got 51 in .*train"),
        (lambda f: shutil.rmtree(f / "val"), "of 50 classes, got 0 in .*val"),
    ],
)  # fmt: skip
def test_both_splits_of_imagenet50_must_have_the_same_classes(tmp_path, published, split, change, message):
    change(shutil.copytree(published / "imagenet50", tmp_path / "imagenet50"))
    with pytest.raises(ValueError, match=f"^load_set: .*{message}"):
        load_set("imagenet50", split, tmp_path)


def test_a_task_numbers_its_classes_alike_in_both_splits_also_where_one_has_no_images(tmp_path):
    dogs, y = np.array([4, 5, 6, 7, 8]), np.array([5, 8])
    write_jpegs(tmp_path / "tin50.train0.npz", random_images(5, 64), y=dogs, c=np.zeros(5, int))
    write_jpegs(tmp_path / "tin50.val0.npz", random_images(2, 64), y=y, c=np.array([0, 0]))
    assert load_set("tin50-0", "test", tmp_path).labels.tolist() == [1, 4]
    with pytest.raises(ValueError, match=r"must hold images of 'tin50-3' \(test\), got none"):
        load_set("tin50-3", "test", tmp_path)
    write_jpegs(tmp_path / "tin50.val0.npz", random_images(2, 64), y=y, c=np.array([0, 3]))
    with pytest.raises(ValueError, match=r"class 8 of tin50 in .* must be of one kind, got 0 and 3"):
        load_set("tin50", "test", tmp_path)
    write_jpegs(tmp_path / "tin50.val0.npz", random_images(2, 64), y=y + 10, c=np.array([0, 0]))
    with pytest.raises(ValueError, match=r"kind 0 of tin50 in .* must be of 5 classes, got 7"):
        load_set("tin50", "test", tmp_path)


MINI = {
    "a byte-order mark": (before(b"\xef\xbb\xbf"), "right"),
    "CRLF and blank lines": (edited(lambda text: text.replace("\n", "\r\n\r\n")), "right"),
    "blanks": (edited(lambda text: text.replace(",", " , ")), "right"),
    "another column": (lines(lambda each: [f"{k},{line}" for k, line in enumerate(each)]), "right"),
    "quotes": (lines(lambda each: [each[0], *(f'"{line.replace(",", chr(34) + "," + chr(34))}"' for line in each[1:])]),
               "right"),
    "no header": (lines(lambda each: each[1:]), "must begin with a line filename,label, got 'p"),
    "semicolons": (edited(lambda text: text.replace(",", ";")), "must begin with a line filename,label, got"),
    "empty": (edited(lambda _: ""), "must begin with a line filename,label, got ''"),
    "a web page": (edited(lambda _: "<html>\n"), "must begin with a line filename,label"),
    "a short line": (lines(lambda each: [*each, "p0.jpg"]), "val.csv must have filename,label, got 'p0.jpg'"),
    "a long line": (lines(lambda each: [*each, "p0.jpg,n,1"]), "val.csv must have filename,label, got 'p0"),
    "no label": (lines(lambda each: [*each[:-1], "p299.jpg,"]), "val.csv must have filename,label, got"),
    "latin-1": (edited(lambda text: text.replace("n0", "é"), "latin-1"), "must be text in UTF-8"),
    "an open quote": (lines(lambda each: [*each, '"p0.jpg,n']), "must be a table of comma-separated values"),
    "NUL": (edited(lambda text: text + "\0"), "val.csv must be text in UTF-8, got a NUL"),
    "cut in a class": (lines(lambda each: each[:-2]), "must name all that .*images holds, got no p"),
    "cut between classes": (lines(lambda each: each[:-6]), "got 49|must name all"),
    "one twice": (lines(lambda each: [*each, each[-1]]), "must name everything once, got p.* twice"),
    "a picture elsewhere": (edited(lambda text: text.replace("p6.jpg", "../p6.jpg")), r"got \.\./p6.jpg which is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", MINI)
def test_lists_of_miniimagenet_are_read_right_or_refused(tmp_path, published, case):
    damage, wanted = MINI[case]
    folder = shutil.copytree(published / "mini-imagenet", tmp_path / "mini-imagenet")
    damage(folder / "val.csv")
    if wanted == "right":
        found = load_set("miniimagenet@8", "train", tmp_path)
        assert found.labels.tolist() == [k for k in range(50) for _ in range(5)]
        assert (found.images[:, 0, 0, 0] - 4 * found.labels).abs().max() == 0
    else:
        with pytest.raises(ValueError, match=f"^load_set: .*mini-imagenet.*({wanted})"):
            load_set("miniimagenet@8", "train", tmp_path)


def test_classes_of_miniimagenet_of_different_sizes_are_told(tmp_path, published):
    folder = shutil.copytree(published / "mini-imagenet", tmp_path / "mini-imagenet")
    listed = (folder / "val.csv").read_text().split("\n")
    (folder / "images" / listed[-1].split(",")[0]).unlink()
    (folder / "val.csv").write_text("\n".join(listed[:-1]))
    with pytest.raises(ValueError, match=r"as many images of every class, got 5 of n00000049 and 6 of"):
        load_set("miniimagenet@8", "train", tmp_path)


def batch(**changes):
    return {"data": np.zeros((20, 3072), np.uint8), "labels": [k % 10 for k in range(20)], **changes}


FLOATS = np.random.default_rng(0).random((20, 3072))
CIFAR = {
    "0..1 for 0..255": (batch(data=FLOATS), r"uint8 \[20, 3072\] of red, green and blue planes, got float64"),
    "float32": (batch(data=(FLOATS * 255).astype(np.float32)), r"got float32 \[20, 3072\]"),
    "height, width, channels": (batch(data=np.zeros((20, 32, 32, 3), np.uint8)), r"got uint8 \[20, 32, 32, 3\]"),
    "fewer": (batch(data=np.zeros((19, 3072), np.uint8)), r"got uint8 \[19, 3072\]"),
    "lists": (batch(data=[[0] * 3072] * 20), "got list"),
    "fewer labels": (batch(labels=list(range(10))), "must have 20 labels, got 10 of y"),
    "fractional labels": (batch(labels=[k % 10 + 0.5 for k in range(20)]), r"whole labels of 0\.\.9, got 0\.5"),
    "labels of NaN": (batch(labels=[float("nan")] * 20), r"whole labels of 0\.\.9, got nan"),
    "labels from 1": (batch(labels=[k % 10 + 1 for k in range(20)]), r"whole labels of 0\.\.9, got 10"),
    "negative labels": (batch(labels=[k % 10 - 1 for k in range(20)]), r"whole labels of 0\.\.9, got -1"),
    "names": (batch(labels=["cat"] * 20), "a number as the label of each image"),
    "ragged labels": (batch(labels=[[1], [1, 2]] * 10), "must hold labels that are numbers"),
    "one hot": (batch(labels=np.eye(10)[np.arange(20) % 10]), r"a number as the label .* got float64 \[20, 10\]"),
    "half of the classes": (batch(labels=[k % 5 for k in range(20)]), "all 10 classes, got none of class 5"),
    "no labels": ({"data": np.zeros((20, 3072), np.uint8)}, "must be a file of CIFAR, got 'labels'"),
    "no dictionary": ([1, 2], "must be a file of CIFAR"),
    "nothing": (None, "must be a file of CIFAR"),
}


@pytest.mark.parametrize("case", CIFAR)
def test_arrays_that_are_not_cifars_are_refused(tmp_path, monkeypatch, case):
    content, message = CIFAR[case]
    monkeypatch.setattr(cifar, "TEST_IMAGES", 20)
    unpack(tmp_path, "cifar-10-batches-py", {"test_batch": b"" if content is None else pickle.dumps(content)})
    with pytest.raises(ValueError, match=f"^load_set: .*test_batch.*{message}|^load_set: y labels of test.*{message}"):
        load_set("cifar10", "test", tmp_path)


def test_whole_labels_that_are_stored_as_floats_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "TEST_IMAGES", 20)
    content = pickle.dumps(batch(labels=[float(k % 10) for k in range(20)]))
    unpack(tmp_path, "cifar-10-batches-py", {"test_batch": content})
    assert load_set("cifar10", "test", tmp_path).labels.tolist() == [k % 10 for k in range(20)]


def test_labels_of_the_binary_versions_are_checked(tmp_path, monkeypatch):
    labels, images = {"y": np.arange(10)}, random_images(10, 32)
    small_cifar(monkeypatch, tmp_path, "cifar10", 1, images, labels).unlink()
    unpack(tmp_path, "cifar-10-batches-bin", cifar_members("cifar10", 1, images, {"y": np.arange(1, 11)}))
    with pytest.raises(ValueError, match=r"test_batch\.bin of .* whole labels of 0\.\.9, got 10"):
        load_set("cifar10", "test", tmp_path)
    monkeypatch.setattr(stl10, "IMAGES", {"train": 10, "test": 10})
    unpack(tmp_path, "stl10_binary", stl10_members(random_images(10, 96), np.arange(10) - 1))
    with pytest.raises(ValueError, match=r"test_y\.bin, less 1, must hold whole labels of 0\.\.9, got -1"):
        load_set("stl10", "test", tmp_path)


def test_an_empty_folder_hides_nothing(tmp_path, monkeypatch):
    images, labels = random_images(10, 32), {"y": np.arange(10)}
    small_cifar(monkeypatch, tmp_path, "cifar10", 1, images, labels).unlink()
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / ".DS_Store").touch()
    with pytest.raises(ValueError, match="data root of 'cifar10' must hold"):
        load_set("cifar10", "test", tmp_path)
    unpack(tmp_path, "cifar-10-batches-bin", cifar_members("cifar10", 1, images, labels))
    assert load_set("cifar10", "test", tmp_path).labels.tolist() == list(range(10))


def test_pieces_must_go_together_and_hold_the_labels_of_their_set(tmp_path):
    def refused(name, message):
        with pytest.raises(ValueError, match=f"^load_set: .*{message}"):
            load_set(name, "train", tmp_path)

    write_median_edge(tmp_path / "stl10.train0.npz", random_images(2, 8), y=np.array([1, 10]))
    refused("stl10", r"stl10\.train0\.npz, y, must hold whole labels of 0\.\.9, got 10")
    write_median_edge(tmp_path / "stl10.train0.npz", random_images(2, 8), y=np.array([1]))
    refused("stl10", "must hold 2 labels y, got 1")
    write_median_edge(tmp_path / "stl10.train0.npz", random_images(2, 8), y=np.array([1, 2]))
    write_median_edge(tmp_path / "stl10.train1.npz", random_images(2, 8), i=np.array([1, 2]))
    refused("stl10", r"train1\.npz must hold 2 labels y, got 0")
    write_median_edge(tmp_path / "stl10.train1.npz", random_images(2, 9), y=np.array([1, 2]))
    refused("stl10", r"train1\.npz must hold images \[8, 8, 3\] as the first, got \[9, 9, 3\]")
    np.save(tmp_path / "stl10.train1.npz.npy", np.zeros(3))
    (tmp_path / "stl10.train1.npz.npy").rename(tmp_path / "stl10.train1.npz")
    refused("stl10", r"train1\.npz must be a complete packed piece")
    labels = {"fine": np.array([1, 100]), "coarse": np.array([1, 2])}
    write_piece(tmp_path / "cifar100-train-0.npz", random_images(2, 32), labels)
    refused("cifar100", r"cifar100-train-0\.npz, fine, must hold whole labels of 0\.\.99, got 100")


def test_tasks_of_cifar100_that_lack_a_class_are_told(tmp_path):
    fine = np.arange(99)
    write_piece(tmp_path / "cifar100-test.npz", random_images(99, 32), {"fine": fine, "coarse": fine // 5}, tile=33)
    with pytest.raises(ValueError, match="must have 20 coarse labels of 5 classes, got 4 in coarse19"):
        load_tasks(DagDataConfig("cifar100", tmp_path), "test")


def test_second_copies_of_pieces_are_not_counted(tmp_path):
    for name in ("stl10.train0.npz", "stl10.train0 (1).npz", "stl10.train0-old.npz"):
        write_median_edge(tmp_path / name, random_images(2, 8), y=np.array([1, 2]))
    assert len(load_set("stl10", "train", tmp_path)) == 2
    for name in ("cifar100-train-0.npz", "cifar100-train-0 (1).npz", "cifar100-training.npz"):
        write_piece(tmp_path / name, random_images(2, 32), {"fine": np.array([1, 2]), "coarse": np.array([1, 2])})
    assert len(load_set("cifar100", "train", tmp_path)) == 2


def test_what_lists_are_told_of():
    assert rows("op", "x", b"\xef\xbb\xbfa b\r\n\r\n c\td \n", 2) == [["a", "b"], ["c", "d"]]
    with pytest.raises(ValueError, match=re.escape("op: line 3 of x must have at least 2 fields, got 'c'")):
        rows("op", "x", b"a b\n\nc\n", 2)
    matching("op", "x", ["b", "a"], {"a", "b"}, "y")
    assert whole_labels("op", "x", np.array([0, 2], np.uint64), 3).dtype == np.int64
    assert whole_labels("op", "x", [], 3).tolist() == []
    with pytest.raises(ValueError, match="a number as the label of each image, got bool"):
        whole_labels("op", "x", [True, False], 2)


@pytest.mark.parametrize(
    ("content", "size", "message"),
    [
        (lzma.compress(bytes(40_000_000), preset=0), 12, "more than 12 bytes instead of 12"),
        (lzma.compress(bytes(12)), 13, "12 bytes instead of 13"),
        (lzma.compress(bytes(12))[:-1], 12, "12 bytes instead of 12"),
        (lzma.compress(bytes(12)), 2**40, "more than 2,147,483,648"),
        (b"", 12, "0 bytes instead of 12"),
    ],
    ids=["bomb", "short", "torn", "huge", "empty"],
)
def test_a_stream_is_unpacked_no_further_than_its_set_says(content, size, message):
    assert unpacked(lzma.compress(bytes(range(12))), 12).tolist() == list(range(12))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            unpacked(content, size)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000  # the decoder's own dictionary has eight
    finally:
        tracemalloc.stop()
