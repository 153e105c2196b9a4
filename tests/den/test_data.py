"""Image sets, augmentation and mixed-task batches."""

import gzip
import hashlib
import importlib.util
import io
import lzma
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from den.data import ImageSet, MixedTaskBatches, load_set, set_names
from den.data.batches import split_batch
from den.data.images import apportion, fits, pixel_moments, stratified_split


def augmented(image_set, index):
    """Images augmented with a generator of seed 0."""
    drawn = index, *image_set.draw(len(index), torch.Generator().manual_seed(0))
    return image_set.augmented_examples(drawn)[0][1]


def small_set(name="small", count=10, classes=2, size=4, channels=1, **kwargs):
    pixels = torch.arange(count * channels * size * size) % 251
    images = pixels.to(torch.uint8).view(count, channels, size, size)
    labels = torch.arange(count) % classes
    return ImageSet(name, images, labels, classes, (0.0,) * channels, (1 / 255,) * channels, **kwargs)


@pytest.mark.parametrize(
    ("name", "split", "count", "size"),
    [
        ("digits", "train", 1437, 8),
        ("digits", "test", 360, 8),
        ("fashion", "train", 12000, 28),
        ("fashion", "test", 2000, 28),
    ],
)
def test_packaged_sets_have_their_sizes_and_all_classes_alike(name, split, count, size):
    image_set = load_set(name, split)
    assert tuple(image_set.images.shape) == (count, 1, size, size)
    assert (image_set.task.name, image_set.task.classes, image_set.task.size, image_set.task.channels) == (
        name,
        10,
        size,
        1,
    )
    counts = image_set.labels.bincount(minlength=10)
    assert counts.max() - counts.min() <= (0 if name == "fashion" else 8)
    assert len(image_set.class_names) == 10


def test_digits_splits_are_disjoint_and_together_all_of_the_set():
    from sklearn.datasets import load_digits

    pixels = torch.cat([load_set("digits", split).images for split in ("train", "test")]).flatten(1)
    expected = torch.from_numpy(np.round(load_digits().data * (255 / 16)).astype(np.uint8))
    assert sorted(map(tuple, pixels.tolist())) == sorted(map(tuple, expected.tolist()))


def test_fashion_pixels_are_those_that_were_packed():
    digests = {
        split: hashlib.sha256(load_set("fashion", split).images.numpy().tobytes()).hexdigest()
        for split in ("train", "test")
    }
    assert digests == {
        "train": "89b00066570684898f820da2d6c75d68f30d9d177f690520f5404e5304cfe114",
        "test": "794d195b99f70c4be449f51ead6e50f91aa661d10dcc4bbf2a045c15b0765381",
    }


def test_packed_file_is_small_and_carries_its_licence():
    packed = resources.files("den.data") / "packed"
    assert len((packed / "fashion.npz").read_bytes()) <= 6_000_000
    assert "Zalando" in (packed / "LICENSE-fashion-mnist.txt").read_text()


def test_packing_script_writes_what_it_read(tmp_path, monkeypatch):
    packing = packing_script()
    generator = np.random.default_rng(0)
    originals = {}
    for stem in ("train", "t10k"):
        images, labels = generator.integers(0, 256, (40, 28, 28), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 4
        originals[stem] = images, labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    monkeypatch.setattr(packing, "PER_CLASS", {"train": ("train", 6), "test": ("t10k", 3)})
    packing.pack(tmp_path, tmp_path / "packed.npz")
    with np.load(tmp_path / "packed.npz") as packed:
        for split, stem, count in (("train", "train", 24), ("test", "t10k", 12)):
            index = packed[f"{split}_index"]
            pixels = np.frombuffer(lzma.decompress(packed[f"{split}_images"].tobytes()), np.uint8).reshape(-1, 28, 28)
            assert np.array_equal(pixels, originals[stem][0][index])
            assert np.array_equal(packed[f"{split}_labels"], originals[stem][1][index])
            assert len(set(index)) == count
            assert np.bincount(packed[f"{split}_labels"]).tolist() == [count // 4] * 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "must be a complete gzip file"),
        (gzip.compress(b"\0\0\x08\x01" * 20)[:-9], "must be a complete gzip file"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\0"), "must be an idx file of bytes"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x03ab"), r"must hold \[3\] values as its header says, got 2"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), r"must hold \[\] values as its header says, got 0"),
    ],
    ids=["no gzip", "cut", "of another type", "too few values", "no sizes"],  # the bytes hold the time
)
def test_damaged_originals_are_named_by_the_packing_script(tmp_path, content, message):
    packing = packing_script()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train-images-idx3-ubyte\.gz {message}"):
        packing.pack(tmp_path, tmp_path / "packed.npz")
    assert not (tmp_path / "packed.npz").exists()


def test_too_few_originals_are_told(tmp_path):
    packing = packing_script()
    for kind, shape in (("images-idx3", (3, 28, 28)), ("labels-idx1", (3,))):
        header = b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, ">u4").tobytes()
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + bytes(np.prod(shape))))
    with pytest.raises(ValueError, match=r"1200 of every class, got 3 images and \[3\] labels"):
        packing.pack(tmp_path, tmp_path / "packed.npz")


def packing_script():
    script = Path(__file__).parents[2] / "scripts" / "pack_fashion.py"
    packing = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("pack_fashion", script))
    spec.loader.exec_module(packing)
    return packing


def test_changed_fashion_pixels_are_noticed(tmp_path, monkeypatch):
    with (resources.files("den.data") / "packed" / "fashion.npz").open("rb") as file, np.load(file) as packed:
        arrays = dict(packed)
    pixels = bytearray(lzma.decompress(arrays["test_images"].tobytes()))
    pixels[1000] ^= 1
    arrays["test_images"] = np.frombuffer(lzma.compress(bytes(pixels), preset=0), np.uint8)
    (tmp_path / "packed").mkdir()
    np.savez(tmp_path / "packed" / "fashion.npz", **arrays)
    monkeypatch.setattr("den.data.sets.resources.files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="fashion test must match their sha256"):
        load_set("fashion", "test")
    (tmp_path / "packed" / "fashion.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"fashion\.npz must be complete, got .*; reinstall the package"):
        load_set("fashion", "test")


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_normalised_training_images_have_mean_0_and_standard_deviation_1(name):
    inputs = load_set(name, "train").inputs()
    assert abs(inputs.mean().item()) < 1e-3
    assert abs(inputs.std().item() - 1) < 1e-3


def write_piece(path, images, labels, tile=4):
    """A piece of the layout that `read_tiles` reads: lossless WebP columns of `tile` images."""
    blobs = []
    for start in range(0, len(images), tile):
        file = io.BytesIO()
        Image.fromarray(images[start : start + tile].reshape(-1, 32, 3)).save(file, "WEBP", lossless=True)
        blobs.append(np.frombuffer(file.getvalue(), np.uint8))
    offsets = np.cumsum([0, *map(len, blobs)])
    np.savez(path, shape=images.shape, offsets=offsets, blob=np.concatenate(blobs), tile=tile, **labels)


def test_cifar100_pieces_are_read_in_order_with_either_labels(tmp_path):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    fine, coarse = np.arange(90, 100, dtype=np.uint8), np.arange(10, 20, dtype=np.uint8)
    for piece, part in enumerate((slice(0, 6), slice(6, 10))):
        write_piece(
            tmp_path / f"cifar100-train-{piece}.npz", images[part], {"fine": fine[part], "coarse": coarse[part]}
        )
    image_set = load_set("cifar100", "train", tmp_path)
    assert np.array_equal(image_set.images.permute(0, 2, 3, 1).numpy(), images)
    assert image_set.labels.tolist() == fine.tolist()
    assert load_set("cifar100-coarse", "train", tmp_path).labels.tolist() == coarse.tolist()


def test_damaged_piece_is_named(tmp_path):
    (tmp_path / "cifar100-test.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ValueError, match=r"cifar100-test\.npz must be a complete piece"):
        load_set("cifar100", "test", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "train"), "name must be one of digits, fashion"),
        (("digits", "valid"), "split must be 'train' or 'test', got 'valid'"),
        (("cifar100", "train"), "--data-root"),
        (("cifar100", "train", "/nowhere"), "data root of 'cifar100' must be a folder, got /nowhere"),
    ],
)
def test_sets_that_cannot_be_had_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_set(*arguments)


def test_set_names_are_listed():
    assert {"digits", "fashion", "cifar100", "cifar100-coarse"} <= set(set_names())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(0, 1, 4, 4, dtype=torch.uint8),
            torch.zeros(0, dtype=torch.int64),
            "at least one image, got an empty",
        ),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 3]), r"must lie in 0\.\.2, got 0\.\.3"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([-1, 0]), r"must lie in 0\.\.2, got -1\.\.0"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), r"images must be uint8 \[N, C, H, W\], got torch.float32"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]), r"labels must be int64 \[2\]"),
    ],
)
def test_unfit_sets_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageSet("set", images, labels, 3, (0.0,), (1.0,))


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_crops_of_padded_images_mirrored_or_not(flip):
    """With mean 0 and std 1/255 the inputs are the pixel values, so every crop can be looked for by hand."""
    image_set = small_set(count=6, size=5, channels=2, pad=2, flip=flip)
    index = torch.arange(60) % 6
    images = augmented(image_set, index)
    assert images.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    padded = torch.nn.functional.pad(image_set.images, (2, 2, 2, 2)).float()
    for image, source in zip(images, padded[index], strict=True):
        crops = {
            (top, left, mirrored): crop.flip(2) if mirrored else crop
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for crop in [source[:, top : top + 5, left : left + 5]]
        }
        found = [where for where, crop in crops.items() if torch.allclose(image, crop)]
        assert found
        seen.update(found)
    assert len({(top, left) for top, left, _ in seen}) > 10
    assert any(mirrored for *_, mirrored in seen) == flip


def test_augmentation_without_padding_or_mirroring_is_the_plain_input():
    image_set = small_set(pad=0, flip=False)
    index = torch.tensor([3, 1])
    assert torch.equal(augmented(image_set, index), image_set.inputs(index))


def test_moments_are_those_of_numpy():
    images = torch.randint(256, (7, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = pixel_moments(images)
    values = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-12)


def test_stratified_split_keeps_the_share_of_every_class():
    labels = torch.tensor([0] * 40 + [1] * 60)
    kept, held = stratified_split(labels, 0.1, seed=3)
    assert labels[held].bincount().tolist() == [4, 6]
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(100))
    assert torch.equal(held, stratified_split(labels, 0.1, seed=3)[1])
    assert not torch.equal(held, stratified_split(labels, 0.1, seed=4)[1])


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [(10, [1, 1, 2], [3, 2, 5]), (128, [0.5, 0.5], [64, 64]), (7, [1, 1, 1], [3, 2, 2]), (0, [1, 2], [0, 0])],
)
def test_apportion_adds_up_and_is_proportional(total, shares, expected):
    assert apportion(total, shares) == expected


@pytest.mark.parametrize(
    ("batch", "shares", "tasks", "message"),
    [
        (8, [1.0], 2, "one per task"),
        (8, [1.0, 0.0], 2, "positive"),
        (1, [1.0, 1.0], 2, "every task an image"),
        (0, [1.0], 1, "image"),
    ],
)
def test_batches_that_cannot_hold_every_task_are_refused(batch, shares, tasks, message):
    with pytest.raises(ValueError, match=message):
        split_batch(batch, shares, tasks)


def test_every_batch_holds_all_tasks_and_an_epoch_passes_every_image():
    large = small_set("large", count=23, classes=23, pad=0, flip=False)
    small = small_set("small", count=5, classes=5, size=3, pad=0, flip=False)
    batches = MixedTaskBatches([large, small], batch_size=8, shares=[3, 1], seed=1)
    assert (batches.counts, batches.epoch_steps) == ((6, 2), 4)
    labels = [[], []]
    for _ in range(10):
        batch = batches.next()
        assert batch.tasks == ("large", "small")
        assert [tuple(i.shape) for i in batch.images] == [(6, 1, 4, 4), (2, 1, 3, 3)]
        assert len(batch) == 8
        for seen, part in zip(labels, batch.labels, strict=True):
            seen.extend(part.tolist())
    assert sorted(labels[0][:23]) == list(range(23))
    for cycle in range(4):
        assert sorted(labels[1][5 * cycle : 5 * cycle + 5]) == list(range(5))
    assert labels[1][:5] != labels[1][5:10]


def test_batches_pair_images_with_their_labels():
    image_set = small_set("digits", count=12, classes=12, pad=0, flip=False)
    batch = MixedTaskBatches([image_set], batch_size=12).next()
    assert torch.equal(batch.images[0], image_set.inputs(batch.labels[0]))


def test_restored_batches_continue_where_they_stood():
    sets = [small_set("a", count=11), small_set("b", count=4)]
    first, second = MixedTaskBatches(sets, 6, seed=5), MixedTaskBatches(sets, 6, seed=9)
    for _ in range(3):
        first.next()
    second.load_state_dict({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.state_dict().items()})
    for _ in range(5):
        one, other = first.next(), second.next()
        assert all(torch.equal(a, b) for a, b in zip(one.images + one.labels, other.images + other.labels, strict=True))


def test_state_of_other_sets_is_refused():
    batches = MixedTaskBatches([small_set(count=10)], 4)
    batches.next()
    with pytest.raises(ValueError, match="must be of 11 images, got 10"):
        MixedTaskBatches([small_set(count=11)], 4).load_state_dict(batches.state_dict())


@pytest.mark.parametrize(
    ("size", "free", "expected"), [(50, 100, True), (51, 100, False), (0, 0, True), (10**15, None, True)]
)
def test_images_go_to_a_device_when_half_of_it_holds_them(size, free, expected):
    assert fits(size, free) == expected


def test_sets_on_a_cpu_stay_as_they_are():
    image_set = small_set()
    moved = image_set.to(torch.device("cpu"))
    assert moved.images.data_ptr() == image_set.images.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_that_do_not_fit_on_a_gpu_give_the_same_batches(monkeypatch):
    image_set, index = small_set(), torch.tensor([1, 3])
    there = image_set.to(torch.device("cuda"))
    monkeypatch.setattr("den.data.images.fits", lambda size, free: False)
    here = image_set.to(torch.device("cuda"))
    assert (there.images.device.type, here.images.device.type) == ("cuda", "cpu")
    for one, other in (
        (there.inputs(index), here.inputs(index)),
        (augmented(there, index), augmented(here, index)),
    ):
        assert other.device.type == "cuda"
        assert torch.equal(one, other)
