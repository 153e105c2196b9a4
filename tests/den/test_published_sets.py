"""Image sets in the layouts in which they are published: archives, folders, packed pieces; damage; the store."""

import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from den.data import cifar, fetch_set, load_set, stl10, tinyimagenet
from den.data.archives import Archive
from den.data.archives import fetch as fetch_archive
from den.data.decode import square
from den.data.images import resized
from den.data.sets import KINDS
from tests.image_files import (
    cifar_members,
    median_edge_residuals,
    picture,
    random_images,
    small_cifar,
    small_stl10,
    small_tiny,
    stl10_members,
    tiny_members,
    unpack,
    write_jpegs,
    write_median_edge,
)


def pixels(image_set):
    return image_set.images.permute(0, 2, 3, 1).numpy()


FINE = np.random.default_rng(1).permutation(100)
CIFAR_LABELS = {"cifar10": {"y": FINE[FINE < 10]}, "cifar100": {"fine": FINE, "coarse": FINE // 5}}


@pytest.mark.parametrize("form", [0, 1], ids=["python", "binary"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_either_version_packed_or_unpacked(tmp_path, monkeypatch, name, form):
    labels = CIFAR_LABELS[name]
    images = random_images(len(next(iter(labels.values()))), 32)
    archive = small_cifar(monkeypatch, tmp_path, name, form, images, labels)
    packed = [load_set(name, split, tmp_path) for split in ("train", "test")]
    archive.unlink()
    unpack(tmp_path, cifar.VERSIONS[name][form].archive.folder, cifar_members(name, form, images, labels))
    unpacked = [load_set(name, split, tmp_path) for split in ("train", "test")]
    for train, test in (packed, unpacked):
        repeats = 5 if name == "cifar10" else 1
        assert np.array_equal(pixels(train), np.concatenate([images] * repeats))
        assert np.array_equal(pixels(test), images)
        assert test.labels.tolist() == labels[KINDS[name].label].tolist()
    if name == "cifar100":
        coarse = load_set("cifar100-coarse", "test", tmp_path)
        assert (coarse.labels.tolist(), coarse.classes) == (labels["coarse"].tolist(), 20)


def test_pickles_that_run_code_are_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    monkeypatch.setattr(cifar, "TEST_IMAGES", 1)
    unpack(tmp_path, "cifar-10-batches-py", {"test_batch": pickle.dumps({"data": Evil()})})
    with pytest.raises(ValueError, match=r"test_batch of .* must be a file of CIFAR, got an object of builtins.print"):
        load_set("cifar10", "test", tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_stl10_images_are_stored_by_columns_and_labels_from_1(tmp_path, monkeypatch, packed):
    images, labels = random_images(10, 96), FINE[FINE < 10]
    members = stl10_members(images, labels)
    archive = small_stl10(monkeypatch, tmp_path, members, 10)
    if not packed:
        archive.unlink()
        unpack(tmp_path, "stl10_binary", members)
    found = load_set("stl10", "test", tmp_path)
    assert np.array_equal(pixels(found), images)
    assert found.labels.tolist() == labels.tolist()


NAMES = [f"n{k:08d}" for k in range(200)]


@pytest.mark.parametrize("packed", [True, False])
def test_tiny_imagenet_classes_are_in_the_order_of_their_names(tmp_path, monkeypatch, packed):
    images = random_images(3 * 200, 64)
    members = tiny_members(images, NAMES, each=2)
    archive = small_tiny(monkeypatch, tmp_path, members)
    if not packed:
        archive.unlink()
        unpack(tmp_path, "tiny-imagenet-200", members)
    train, test = (load_set("tinyimagenet", split, tmp_path) for split in ("train", "test"))
    assert train.labels.tolist() == [k // 2 for k in range(400)]
    assert np.array_equal(pixels(train), images[[k for k in range(600) if k % 3 < 2]])
    assert test.labels.tolist() == list(range(199, -1, -1))
    assert np.array_equal(pixels(test), images[599::-3])


def test_tin50_of_the_archive_is_fifty_classes_in_ten_tasks(tmp_path, monkeypatch):
    images = np.repeat(np.arange(200, dtype=np.uint8), 2)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    small_tiny(monkeypatch, tmp_path, tiny_members(images, NAMES, each=1))
    whole = load_set("tin50", "train", tmp_path)
    assert sorted(whole.labels.tolist()) == list(range(50))
    assert whole.images[:, 0, 0, 0].tolist() == sorted(sum(tinyimagenet.KINDS.values(), ()))
    for k, members in enumerate(tinyimagenet.KINDS.values()):
        task = load_set(f"tin50-{k}", "train", tmp_path)
        assert (task.name, task.classes, task.labels.tolist()) == (f"tin50-{k}", 5, [0, 1, 2, 3, 4])
        assert task.images[:, 0, 0, 0].tolist() == list(members)


def test_kinds_of_tin50_are_ten_of_five_different_classes():
    classes = sum(tinyimagenet.KINDS.values(), ())
    assert len(set(classes)) == 50
    assert {len(members) for members in tinyimagenet.KINDS.values()} == {5}


def test_packed_stl10_is_read_in_the_order_of_its_pieces(tmp_path):
    images = random_images(5, 12)
    images[0] = [255, 0, 255]  # the largest differences of the channels
    images[1] = [0, 255, 0]
    for piece, part in enumerate((slice(0, 3), slice(3, 5))):
        write_median_edge(
            tmp_path / f"stl10.train{piece}.npz", images[part], y=np.arange(5)[part], i=np.arange(5)[part]
        )
    found = load_set("stl10", "train", tmp_path)
    assert np.array_equal(pixels(found), images)
    assert found.labels.tolist() == [0, 1, 2, 3, 4]


def test_residuals_of_a_flat_image_are_all_but_one_zero():
    flat = np.full((1, 3, 3, 3), 7, np.uint8)
    residuals = median_edge_residuals(flat)
    assert residuals.sum() == residuals[0, 0, 0, 0] == 7


def test_packed_jpegs_are_the_files_that_were_packed(tmp_path):
    y, c = np.array([0, 5, 6, 49, 6]), np.array([4, 0, 0, 9, 0])
    expected = write_jpegs(tmp_path / "tin50.val0.npz", random_images(5, 64), y=y, c=c, y200=y, i=y)
    assert np.array_equal(pixels(load_set("tin50", "test", tmp_path)), expected)
    dogs = load_set("tin50-0", "test", tmp_path)
    assert np.array_equal(pixels(dogs), expected[[1, 2, 4]])
    assert dogs.labels.tolist() == [0, 1, 1]


def image_folder(root, sizes=(40, 30)):
    for k in range(50):
        for split, count in (("train", 2), ("val", 1)):
            members = {f"{m}.JPEG": picture(np.full((*sizes, 3), 4 * k + m, np.uint8)) for m in range(count)}
            unpack(root, f"imagenet50/{split}/n{k:02d}", members)


def test_fifty_classes_of_imagenet_are_scaled_and_make_ten_tasks(tmp_path):
    image_folder(tmp_path)
    for name, size in (("imagenet50-3@16", 16), ("imagenet50-3", 84)):
        task = load_set(name, "train", tmp_path)
        assert tuple(task.images.shape) == (10, 3, size, size)
        assert task.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert task.images[:, 0, 0, 0].tolist() == [4 * k + m for k in range(15, 20) for m in (0, 1)]
        assert (task.name, task.classes, task.pad) == (name, 5, 0)


def test_miniimagenet_holds_out_the_last_sixth_of_every_class(tmp_path):
    rows = {name: [] for name in ("train", "val", "test")}
    members = {}
    for k in range(60):
        for m in range(6):
            members[f"images/n{k:02d}{m}.jpg"] = picture(np.full((84, 84, 3), 4 * k + m, np.uint8))
            rows[("train", "val", "test")[k % 3]].append(f"n{k:02d}{m}.jpg,n{k:02d}")
    members |= {f"{name}.csv": "\n".join(["filename,label", *lines]).encode() for name, lines in rows.items()}
    unpack(tmp_path, "mini-imagenet", members)
    train, test = (load_set("miniimagenet", split, tmp_path) for split in ("train", "test"))
    assert train.images[:, 0, 0, 0].tolist() == [4 * k + m for k in range(50) for m in range(5)]
    assert test.images[:, 0, 0, 0].tolist() == [4 * k + 5 for k in range(50)]
    (tmp_path / "mini-imagenet" / "val.csv").unlink()
    with pytest.raises(ValueError, match=r"got .*mini-imagenet without val\.csv"):
        load_set("miniimagenet", "train", tmp_path)


def test_224_pixels_are_the_centre_of_256():
    from PIL import Image

    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    cut = np.asarray(square(224)(Image.fromarray(ramp)))
    assert np.array_equal(cut, ramp[16:240, 16:240])


def test_scaled_sets_are_means_over_areas(tmp_path):
    images = random_images(3, 96)
    write_median_edge(tmp_path / "stl10.test0.npz", images[:, :12, :12], y=np.arange(3))
    small = load_set("stl10@6", "test", tmp_path)
    means = images[:, :12, :12].reshape(3, 6, 2, 6, 2, 3).mean((2, 4))
    assert np.abs(pixels(small) - means).max() <= 0.5
    assert (small.name, small.task.size) == ("stl10@6", 6)
    assert resized(small, 9).images.shape[-1] == 9


def truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_wrong_checksums_are_told(tmp_path, monkeypatch):
    archive = small_cifar(monkeypatch, tmp_path, "cifar10", 1, random_images(10, 32), CIFAR_LABELS["cifar10"])
    truncated(archive)
    with pytest.raises(ValueError, match=r"md5 of .*cifar-10-binary\.tar\.gz must be .*, got .*; the download"):
        load_set("cifar10", "test", tmp_path)


@pytest.mark.parametrize(
    ("kind", "removed", "message"),
    [
        ("cifar", "data_batch_3.bin", r"must be complete, got one without .*data_batch_3\.bin; unpack cifar-10-binary"),
        ("stl10", "train_y.bin", r"must be complete, got one without .*train_y\.bin; unpack stl10_binary"),
        (
            "tiny",
            f"train/{NAMES[1]}/{NAMES[1]}_boxes.txt",
            r"must be complete, got one without .*_boxes\.txt; unpack tiny-imagenet-200",
        ),
        (
            "tiny",
            f"train/{NAMES[1]}/images/{NAMES[1]}_0.JPEG",
            r"must name what .*images holds, got .*_0\.JPEG which is",
        ),
        ("tiny", "wnids.txt", r"got one without .*wnids\.txt"),
    ],
)
def test_folders_unpacked_by_half_are_told(tmp_path, monkeypatch, kind, removed, message):
    if kind == "cifar":
        small_cifar(monkeypatch, tmp_path, "cifar10", 1, random_images(10, 32), CIFAR_LABELS["cifar10"]).unlink()
        members = cifar_members("cifar10", 1, random_images(10, 32), CIFAR_LABELS["cifar10"])
        folder = unpack(tmp_path, "cifar-10-batches-bin", members)
    elif kind == "stl10":
        folder = unpack(tmp_path, "stl10_binary", stl10_members(random_images(1, 96), np.array([1])))
    else:
        folder = unpack(tmp_path, "tiny-imagenet-200", tiny_members(random_images(400, 64), NAMES, each=1))
    (folder / removed).unlink()
    name = {"cifar": "cifar10", "stl10": "stl10", "tiny": "tinyimagenet"}[kind]
    with pytest.raises(ValueError, match=message):
        load_set(name, "train", tmp_path)


def test_short_files_and_damaged_pictures_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(stl10, "IMAGES", {"train": 2, "test": 2})
    unpack(tmp_path, "stl10_binary", stl10_members(random_images(1, 96), np.array([1])))
    with pytest.raises(ValueError, match=r"must have 2 images and labels of train, got 1 and 1; unpack"):
        load_set("stl10", "train", tmp_path)
    folder = unpack(tmp_path, "tiny-imagenet-200", tiny_members(random_images(400, 64), NAMES, each=1))
    truncated(folder / "val" / "images" / "val_1.JPEG")
    with pytest.raises(ValueError, match=r"val/images/val_1\.JPEG must be a complete picture"):
        load_set("tinyimagenet", "test", tmp_path)
    image_folder(tmp_path)
    for path in (tmp_path / "imagenet50" / "train" / "n07").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"n07 must hold pictures, got none"):
        load_set("imagenet50", "train", tmp_path)


def test_damaged_pieces_are_told(tmp_path):
    path = tmp_path / "stl10.test0.npz"
    write_median_edge(path, random_images(2, 8), y=np.array([1, 2]))
    with np.load(path) as piece:
        arrays = dict(piece)
    arrays["meta"] = np.frombuffer(arrays["meta"].tobytes().replace(b'"sha256": "', b'"sha256": "0'), np.uint8)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="must match their sha256"):
        load_set("stl10", "test", tmp_path)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="must be a complete packed piece"):
        load_set("stl10", "test", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"must hold cifar-10-python\.tar\.gz or cifar-10-binary\.tar\.gz.*den fetch cifar10 --data-root"),
        ("stl10", r"must hold stl10_binary\.tar\.gz, packed or unpacked, got .* \(get it from https://cs\.stanford"),
        ("tinyimagenet", r"must hold tiny-imagenet-200\.zip"),
        ("imagenet50", r"imagenet50/train/CLASS/\* .*of 50 classes, got 0 in"),
        ("miniimagenet", r"mini-imagenet/images and train\.csv.* without train\.csv, val\.csv, test\.csv"),
        ("tin50-10", r"a number of 0\.\.9 behind tin50-, got 'tin50-10'"),
        ("stl10-1", "no number behind stl10-, got 'stl10-1'"),
        ("stl10@0", r"size of stl10 must be in 1\.\.1024"),
        ("tiny", "name must be one of digits, fashion, cifar10, cifar100, cifar100-coarse, stl10, tinyimagenet"),
    ],
)
def test_sets_that_are_not_there_say_what_is_wanted_and_where_from(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        load_set(name, "train", tmp_path)


@pytest.fixture
def served(tmp_path):
    """A folder that a web server on this machine hands out, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_archives_are_fetched_checked_and_not_fetched_twice(tmp_path, served):
    folder, address = served
    (folder / "set.zip").write_bytes(b"content")
    archive = Archive("set.zip", "set", "the page", f"{address}/set.zip", "9a0364b9e99bb480dd25e1f0284c8555")
    assert fetch_archive(archive, tmp_path).read_bytes() == b"content"
    (folder / "set.zip").unlink()
    assert fetch_archive(archive, tmp_path).read_bytes() == b"content"
    with pytest.raises(
        ValueError, match=r"set\.zip must be reachable and have md5 .*, got HTTPError.*of the page into"
    ):
        fetch_archive(archive, tmp_path / "other")
    (folder / "set.zip").write_bytes(b"other content")
    with pytest.raises(ValueError, match="must be reachable and have md5"):
        fetch_archive(archive, tmp_path / "other")
    assert not (tmp_path / "other" / "set.zip").exists()


def test_sets_without_an_archive_cannot_be_fetched(tmp_path):
    with pytest.raises(ValueError, match=r"fetch: name must be one of cifar10, cifar100, .*, got 'imagenet50'"):
        fetch_set("imagenet50", tmp_path)
