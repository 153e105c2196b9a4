"""The store of decoded sets: what makes it decode anew, what it leaves behind, what it does without room or locks."""

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from den.data import load_set, store
from tests.image_files import random_images, unpack, write_median_edge

ROOT = Path(__file__).resolve().parents[2]


def pixels(image_set):
    return image_set.images.permute(0, 2, 3, 1).numpy()


def painted(value, count=2, size=4):
    return np.full((count, size, size, 3), value, np.uint8)


def found(source, value=7, count=2, calls=None):
    def decode():
        if calls is not None:
            calls.append(value)
        return store.Pixels((count, 4, 4, 3), {"y": np.arange(count)}, [painted(value, count)])

    return store.Found((source,), decode)


def entries(root):
    return sorted(path.name for path in (root / store.FOLDER).iterdir())


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"as published")
    return path


def test_sets_are_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    write_median_edge(tmp_path / "stl10.test0.npz", random_images(2, 8), y=np.array([1, 2]))
    first = load_set("stl10", "test", tmp_path)
    monkeypatch.setattr("den.data.stl10.open_pieces", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load_set("stl10", "test", tmp_path).images, first.images)
    monkeypatch.undo()
    del first
    changed = random_images(3, 8, seed=1)
    write_median_edge(tmp_path / "stl10.test0.npz", changed, y=np.array([1, 2, 3]))
    assert np.array_equal(pixels(load_set("stl10", "test", tmp_path)), changed)
    assert len(entries(tmp_path)) == 1  # what was decoded before is gone


def test_files_that_change_while_they_are_decoded_are_told(tmp_path, source):
    def parts():
        source.write_bytes(b"still being copied")
        yield painted(1)

    changing = store.Found((source,), lambda: store.Pixels((2, 4, 4, 3), {"y": np.zeros(2)}, parts()))
    with pytest.raises(ValueError, match=r"files of set in .* must not change while they are decoded"):
        store.stored(changing, tmp_path, "set")
    assert entries(tmp_path) == []


def test_interrupted_decoding_leaves_nothing_behind(tmp_path, source):
    def interrupted():
        yield np.zeros((1, 4, 4, 3), np.uint8)
        raise KeyboardInterrupt

    stopped = store.Found((source,), lambda: store.Pixels((2, 4, 4, 3), {"y": np.zeros(2)}, interrupted()))
    with pytest.raises(KeyboardInterrupt):
        store.stored(stopped, tmp_path, "set")
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("shape", "parts", "message"),
    [
        ((2, 4, 4, 3), [painted(0, 1)], "set must have 2 images, got 1"),
        ((2, 4, 4, 3), [painted(0, 1), painted(0, 2)], "set must have 2 images, got 3"),
        ((2, 4, 4, 3), [painted(0, 2, size=5)], r"images uint8 \[4, 4, 3\], got uint8 \[5, 5, 3\]"),
        ((2, 4, 4, 3), [painted(0).astype(np.float32)], r"images uint8 \[4, 4, 3\], got float32"),
        ((0, 4, 4, 3), [], "at least one image, got an empty data set"),
    ],
)
def test_decoders_that_do_not_keep_their_word_are_told(tmp_path, source, shape, parts, message):
    with pytest.raises(ValueError, match=message):
        store.stored(store.Found((source,), lambda: store.Pixels(shape, {}, parts)), tmp_path, "set")
    assert entries(tmp_path) == []


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def repainted(path):
    """Other pixels in place: of the same size and in a whole file."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "images cut": ("images.npy", cut),
    "images empty": ("images.npy", lambda path: path.write_bytes(b"")),
    "images gone": ("images.npy", Path.unlink),
    "images of another shape": ("images.npy", lambda path: np.save(path, painted(9, 3))),
    "images of another size": ("images.npy", lambda path: np.save(path, painted(9, 2, size=5))),
    "images of another type": ("images.npy", lambda path: np.save(path, painted(9).astype(np.int64))),
    "images written over": ("images.npy", repainted),
    "labels cut": ("labels.npz", cut),
    "labels gone": ("labels.npz", Path.unlink),
    "labels of other images": ("labels.npz", lambda path: np.savez(path, y=np.arange(3))),
    "labels no archive": ("labels.npz", lambda path: path.write_bytes(b"<html>")),
    "labels a folder": ("labels.npz", lambda path: (path.unlink(), path.mkdir())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entries_are_noticed_and_decoded_anew(tmp_path, source, damage):
    calls = []
    store.stored(found(source, calls=calls), tmp_path, "set")
    (name,) = entries(tmp_path)
    file, change = DAMAGES[damage]
    change(tmp_path / store.FOLDER / name / file)
    for _ in range(2):  # healed, and for good
        images, labels = store.stored(found(source, calls=calls), tmp_path, "set")
        assert images.unique().tolist() == [7]
        assert labels["y"].tolist() == [0, 1]
        assert len(calls) == 2
    assert entries(tmp_path) == [name]


SCRIPT = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from den.data import store

    def parts():
        yield np.zeros((1, 4, 4, 3), np.uint8)
        print("decoding", flush=True)
        time.sleep(float(sys.argv[2]))
        yield np.ones((1, 4, 4, 3), np.uint8)

    root = Path(sys.argv[1])
    found = store.Found((root / "file",), lambda: store.Pixels((2, 4, 4, 3), {"y": np.zeros(2)}, parts()))
    images, _ = store.stored(found, root, "set")
    print("done", flush=True)
    time.sleep(60 if len(sys.argv) > 3 else 0)
"""


def decoding(root, seconds, *more):
    """A process that has decoded half of the set and waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(root), str(seconds), *more],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "decoding\n"
    return process


def test_what_a_killed_process_left_is_removed_by_the_next_load(tmp_path, source):
    process = decoding(tmp_path, 60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = entries(tmp_path)
    assert left.startswith(".set-")
    shutil.copytree(tmp_path / store.FOLDER, tmp_path / "kept")
    store.stored(found(source), tmp_path, "other")  # the next, whatever it loads
    assert [name.rpartition("-")[0] for name in entries(tmp_path)] == ["other"]
    shutil.rmtree(tmp_path / store.FOLDER)
    (tmp_path / "kept").rename(tmp_path / store.FOLDER)
    images, _ = store.stored(found(source), tmp_path, "set")
    assert images.unique().tolist() == [7]
    assert entries(tmp_path) == [left.removeprefix(".")]


def test_a_process_that_is_decoding_is_waited_for_and_not_disturbed(tmp_path, source):
    process, calls = decoding(tmp_path, 2), []
    store.stored(found(source, calls=calls), tmp_path, "other")
    assert len(entries(tmp_path)) == 2  # the half of the other process is still there
    images, _ = store.stored(found(source, calls=calls), tmp_path, "set")
    assert images.unique().tolist() == [0, 1]  # what it decoded
    assert calls == [7]
    assert process.communicate()[0] == "done\n"
    assert process.returncode == 0


def test_entries_in_use_stay_until_they_are_not(tmp_path, source):
    process = decoding(tmp_path, 0, "and keep it")
    assert process.stdout.readline() == "done\n"
    (used,) = entries(tmp_path)
    source.write_bytes(b"another")
    store.stored(found(source), tmp_path, "set")
    assert used in entries(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store.stored(found(source), tmp_path, "set")
    assert len(entries(tmp_path)) == 1
    assert used not in entries(tmp_path)


def test_hidden_folders_of_others_stay(tmp_path, source):
    home = tmp_path / store.FOLDER
    unpack(home, ".snapshot", {"kept": b""})
    unpack(home, "set-of-mine", {"kept": b""})
    unpack(home, ".ab12cd_x/set", {"images.npy": b"half"})  # of the versions without locks
    store.stored(found(source), tmp_path, "set")
    assert (home / ".snapshot" / "kept").exists()
    assert (home / "set-of-mine" / "kept").exists()
    assert not (home / ".ab12cd_x").exists()


def test_threads_that_load_at_once_decode_once(tmp_path, source):
    calls, results = [], []

    def load():
        results.append(store.stored(found(source, calls=calls), tmp_path, "set")[0])

    threads = [threading.Thread(target=load) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(calls) == 1
    assert all(torch.equal(images, results[0]) for images in results)


@pytest.mark.parametrize("system", [False, True], ids=["file-system", "system"])
def test_without_locks_it_still_decodes_and_clears_nothing(tmp_path, source, monkeypatch, system):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("den.data.locks.fcntl", None) if system else monkeypatch.setattr("fcntl.flock", no_locks)
    calls = []
    for _ in range(2):
        images, _ = store.stored(found(source, calls=calls), tmp_path, "set")
        assert images.unique().tolist() == [7]
    assert len(calls) == 1
    assert len(entries(tmp_path)) == 1
    source.write_bytes(b"another")
    store.stored(found(source), tmp_path, "set")
    assert len(entries(tmp_path)) == 2


def test_a_full_disk_is_told_before_the_decoding_and_leaves_nothing(tmp_path, source):
    """A limit on the size of files stands for the disk: the kernel refuses in the same places."""
    large = store.Found(
        (source,),
        lambda: store.Pixels((1000, 64, 64, 3), {"y": np.zeros(1000)}, iter(lambda: pytest.fail("decoded"), None)),
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ValueError, match=r"den-cache must take the decoded images of set, got .*12 MB are needed"):
            store.stored(large, tmp_path, "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == []


def test_a_disk_that_fills_up_meanwhile_is_told_too(tmp_path, source, monkeypatch):
    """Where room cannot be kept, writing tells: an error in words, where a mapping would end the process."""

    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", cannot)
    parts = (painted(1, 100, size=64) for _ in range(10))
    large = store.Found((source,), lambda: store.Pixels((1000, 64, 64, 3), {"y": np.zeros(1000)}, parts))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ValueError, match=r"must take the decoded images of set, got .*File too large"):
            store.stored(large, tmp_path, "set")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert entries(tmp_path) == []
    images, _ = store.stored(found(source), tmp_path, "set")
    assert images.unique().tolist() == [7]


@pytest.mark.parametrize("decoded_before", [False, True])
def test_roots_without_write_permission_are_left_alone(tmp_path, monkeypatch, decoded_before):
    root, cache = tmp_path / "root", tmp_path / "cache"
    unpack(tmp_path, "root", {"file": b"1"})
    monkeypatch.setattr("pooch.os_cache", lambda _: cache)
    calls, before = [], []
    if decoded_before:
        store.stored(found(root / "file", calls=calls), root, "set")
        before = [store.FOLDER]
    for path in (*root.glob("*/*"), *root.glob("den-cache"), root):
        path.chmod(0o555)
    try:
        for _ in range(2):
            images, _ = store.stored(found(root / "file", calls=calls), root, "set")
            assert images.unique().tolist() == [7]
        assert len(calls) == 1  # what was decoded before is used
        assert sorted(path.name for path in root.iterdir()) == sorted([*before, "file"])
        assert len(list(cache.iterdir())) == (0 if decoded_before else 1)
        other = shutil.copytree(root, tmp_path / "other")  # a root of the same sets has its own entries there
        store.stored(found(other / "file", value=8), other, "set")
        assert len(list(cache.iterdir())) == (1 if decoded_before else 2)
        assert store.stored(found(root / "file", calls=calls), root, "set")[0].unique().tolist() == [7]
    finally:
        for path in (root, *root.glob("den-cache"), *root.glob("*/*"), tmp_path / "other"):
            if path.exists():
                path.chmod(0o755)


def test_a_file_in_place_of_the_folder_is_told(tmp_path, source):
    (tmp_path / store.FOLDER).write_text("another tool's")
    with pytest.raises(ValueError, match="den-cache must be a folder that can be written"):
        store.stored(found(source), tmp_path, "set")


@pytest.mark.parametrize("stderr", ["no terminal", "closed", "none"])
def test_no_bar_is_drawn_without_a_terminal(tmp_path, source, monkeypatch, capsys, stderr):
    if stderr != "no terminal":
        file = None if stderr == "none" else io.StringIO()
        monkeypatch.setattr(sys, "stderr", file)
        if file:
            file.close()
    store.stored(found(source), tmp_path, "set")
    if stderr == "no terminal":
        assert capsys.readouterr().err == ""
