"""Which changes of the files of a set make it be decoded anew."""

import os

import numpy as np
import pytest

from den.data import load_set, store
from tests.den.test_data_store import found
from tests.image_files import picture, tiny_members, unpack

NAMES = [f"n{k:08d}" for k in range(200)]


@pytest.mark.parametrize("kept", ["", "size", "size and times"])
@pytest.mark.parametrize("depth", [1, 3])
def test_any_file_of_a_folder_counts_whatever_of_it_is_kept(tmp_path, depth, kept):
    place = tmp_path / "set" / "/".join("abc"[:depth])
    place.mkdir(parents=True)
    path = place / "picture"
    path.write_bytes(b"0123")
    folder, calls = tmp_path / "set", []
    store.stored(found(folder, calls=calls), tmp_path, "set")
    store.stored(found(folder, calls=calls), tmp_path, "set")
    assert len(calls) == 1
    before = path.stat()
    path.write_bytes(b"abcd" if kept else b"longer")
    if kept == "size and times":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    store.stored(found(folder, calls=calls), tmp_path, "set")
    assert len(calls) == 2


def test_files_that_come_go_or_are_renamed_count_and_hidden_ones_do_not(tmp_path):
    folder, calls = tmp_path / "set", []
    unpack(tmp_path, "set", {"a/1": b"1", "b/2": b"2"})

    def decodings():
        store.stored(found(folder, calls=calls), tmp_path, "set")
        return len(calls)

    assert decodings() == 1
    (folder / "a" / "3").touch()
    assert decodings() == 2
    (folder / "a" / "3").unlink()
    assert decodings() == 3
    (folder / "a").rename(folder / "c")
    assert decodings() == 4
    (folder / ".DS_Store").touch()
    assert decodings() == 4
    (folder / "empty").mkdir()
    assert decodings() == 5


def test_a_link_counts_with_what_it_leads_to(tmp_path):
    folder, calls = tmp_path / "set", []
    unpack(tmp_path, "elsewhere", {"1": b"1"})
    folder.mkdir()
    (folder / "a").symlink_to(tmp_path / "elsewhere")
    store.stored(found(folder, calls=calls), tmp_path, "set")
    (tmp_path / "elsewhere" / "1").write_bytes(b"22")
    store.stored(found(folder, calls=calls), tmp_path, "set")
    assert len(calls) == 2


def test_a_moved_root_keeps_what_was_decoded(tmp_path):
    root, calls = tmp_path / "a", []
    unpack(tmp_path, "a", {"file": b"1"})
    store.stored(found(root / "file", calls=calls), root, "set")
    moved = root.rename(tmp_path / "b")
    store.stored(found(moved / "file", calls=calls), moved, "set")
    assert len(calls) == 1


def test_lists_and_pictures_of_an_unpacked_set_are_followed(tmp_path):
    images = np.repeat(np.arange(200, dtype=np.uint8), 2)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    folder = unpack(tmp_path, "tiny-imagenet-200", tiny_members(images, NAMES, each=1))
    assert load_set("tinyimagenet", "test", tmp_path).labels.tolist() == list(range(199, -1, -1))
    lines = [f"val_{k}.JPEG\t{NAMES[k]}\t0\t0\t9\t9\n" for k in range(200)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    assert load_set("tinyimagenet", "test", tmp_path).labels.tolist() == list(range(200))
    (folder / "val" / "images" / "val_3.JPEG").write_bytes(picture(np.full((64, 64, 3), 250, np.uint8)))
    assert load_set("tinyimagenet", "test", tmp_path).images[3].unique().tolist() == [250]
    load_set("tinyimagenet", "train", tmp_path)
    (folder / "train" / NAMES[5] / "images" / f"{NAMES[5]}_0.JPEG").write_bytes(
        picture(np.full((64, 64, 3), 251, np.uint8))
    )
    assert load_set("tinyimagenet", "train", tmp_path).images[5].unique().tolist() == [251]
