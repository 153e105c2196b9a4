"""NYU-v2, Cityscapes and PASCAL-Context from small files in their layouts; augmentation; what is wrong with files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from den.dag.config import DagDataConfig, DagTrainConfig
from den.dag.scenarios import LOSS_WEIGHTS, SCENARIOS, SINGLE_TASK, load_tasks, loss_weights
from den.data import MixedTaskBatches, load_set
from den.data.cityscapes import load_cityscapes
from den.data.nyuv2 import load_nyuv2
from den.data.pascal_context import boundaries, load_pascal_context
from den.data.scenes import MEAN, STD, Scene, augmented, checked_target, nearest
from den.nn.tasks import IGNORE, Task
from tests.dense_files import write_npy_scenes, write_pascal

COUNTS = {"train": 12, "val": 3}


def targets(scenes, index=slice(None)):
    return {name: target for name, _, target in scenes.examples(index)}


def test_nyuv2_gives_three_tasks_of_the_same_images(tmp_path):
    write_npy_scenes(tmp_path, COUNTS)
    train, test = (load_nyuv2(tmp_path, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 3)
    assert [(t.name, t.kind, t.classes, t.shape) for t in train.tasks] == [
        ("segmentation", "segmentation", 40, (3, 24, 32)),
        ("depth", "depth", 1, (3, 24, 32)),
        ("normals", "normals", 3, (3, 24, 32)),
    ]
    examples = train.examples(torch.tensor([2, 11]))
    assert examples[0][1] is examples[1][1] is examples[2][1]  # one tensor of images
    found = targets(train)
    assert found["segmentation"].dtype == torch.int64
    assert found["segmentation"].unique().tolist() == [0, 1, 39, IGNORE]
    assert (found["segmentation"][:, 0, :3] == IGNORE).all()
    assert found["depth"].shape == (12, 1, 24, 32)
    assert found["depth"].unique().tolist() == [0, 1, 4]
    assert found["normals"][:, :, 5, 5].unique(dim=0).tolist() == [[pytest.approx(v) for v in (0.6, 0.0, 0.8)]]
    pixels = np.load(tmp_path / "train" / "image" / "11.npy")[7, 9]  # in the order of the numbers, not of the letters
    wanted = [(p - m) / s for p, m, s in zip(pixels, MEAN, STD, strict=True)]
    assert examples[0][1][1, :, 7, 9].tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("classes", "folder"), [(19, "label_19"), (7, "label_7"), (7, "label")])
def test_cityscapes_reads_the_labels_of_its_classes(tmp_path, classes, folder):
    write_npy_scenes(tmp_path, COUNTS, classes=classes, label=folder, normals=False)
    scenes = load_cityscapes(tmp_path, "train", classes)
    assert [task.name for task in scenes.tasks] == ["segmentation", "depth"]
    assert targets(scenes)["segmentation"].unique().tolist() == [0, 1, classes - 1, IGNORE]
    assert scenes.inverse_depth


def test_pascal_context_gives_five_tasks_on_square_images(tmp_path):
    write_pascal(tmp_path, {"train": ["a", "empty"], "val": ["b"]})
    scenes = load_pascal_context(tmp_path, "train", 32)
    assert [(t.name, t.kind, t.classes) for t in scenes.tasks] == [
        ("segmentation", "segmentation", 21),
        ("parts", "segmentation", 7),
        ("saliency", "saliency", 1),
        ("normals", "normals", 3),
        ("edges", "edges", 1),
    ]
    found = targets(scenes)
    assert found["segmentation"][0, 10, 15] == 15
    assert found["segmentation"][0, 0, 0] == IGNORE
    assert found["parts"][0, [5, 12, 18], 15].tolist() == [1, 2, 0]  # head, torso, neither
    assert (found["parts"][1] == IGNORE).all()  # no parts in the image
    assert found["saliency"][0, 0, [2, 10], 15].tolist() == [0, 1]
    assert found["normals"][0, :, 4, 4].tolist() == pytest.approx([0, 1, 0], abs=0.01)
    edges = found["edges"][0, 0, :20, :30]
    assert edges[10].nonzero().flatten().tolist() == [9, 19]
    for name, nothing in (("segmentation", IGNORE), ("saliency", IGNORE), ("edges", IGNORE), ("normals", 0)):
        assert (found[name][..., 20:, :] == nothing).all()
        assert (found[name][..., 30:] == nothing).all()
    image = scenes.examples(slice(0, 1))[0][1]
    assert image[0, :, 25].abs().max() < 1e-6  # the mean colour around it


def test_larger_images_are_scaled_down_with_their_targets(tmp_path):
    write_pascal(tmp_path, {"train": ["a"], "val": ["b"]})
    found = targets(load_pascal_context(tmp_path, "train", 15))
    assert found["segmentation"].shape == (1, 15, 15)
    assert found["segmentation"][0, 5, 7] == 15
    assert (found["segmentation"][0, 10:] == IGNORE).all()  # 20x30 becomes 10x15


def test_boundaries_lie_where_the_label_changes():
    labels = torch.tensor([[1, 1, 2], [1, 1, 2], [3, 3, 3]])
    assert boundaries(labels).tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]


def scene(height=12, width=18):
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    image = torch.stack([rows / height, columns / width, torch.zeros_like(rows)])
    tasks = (Task("s", 250, height, 3, "segmentation", width), Task("d", 1, height, 3, "depth", width),
             Task("n", 3, height, 3, "normals", width))  # fmt: skip
    numbers = (rows * width + columns).long()
    normal = torch.stack([image[0] + 0.1, image[1], torch.ones_like(rows)])
    return Scene(image, {"s": numbers, "d": 1 + rows[None], "n": normal}), tasks


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.99, 0.99), (0.5, 0.2)])
def test_zooming_keeps_pixels_and_targets_together_and_brings_things_nearer(place):
    before, tasks = scene()
    after = augmented(before, tasks, 1.5, place, False, False)
    assert after.image.shape == before.image.shape
    rows, columns = after.targets["s"] // 18, after.targets["s"] % 18
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (8, 12)
    torch.testing.assert_close(after.targets["d"][0], (1 + rows) / 1.5)
    torch.testing.assert_close(after.image[0], rows / 12, atol=0.51 / 12, rtol=0)  # interpolated: within half a pixel
    torch.testing.assert_close(after.image[1], columns / 18, atol=0.51 / 18, rtol=0)
    inverse = augmented(before, tasks, 1.5, place, False, True)
    torch.testing.assert_close(inverse.targets["d"][0], (1.0 + rows) * 1.5)


def test_the_nearest_pixels_are_those_of_nearest_interpolation():
    for size in range(1, 12):
        for out_size in range(1, 12):
            values = torch.arange(float(size)).view(1, 1, size)
            wanted = F.interpolate(values, size=out_size, mode="nearest-exact").flatten()
            assert nearest(size, out_size).tolist() == wanted.tolist()


def test_mirroring_turns_the_normals():
    before, tasks = scene()
    after = augmented(before, tasks, 1.0, (0.3, 0.3), True, False)
    assert torch.equal(after.image, before.image.flip(2))
    assert torch.equal(after.targets["s"], before.targets["s"].flip(1))
    assert torch.equal(after.targets["d"], before.targets["d"].flip(2))
    turned = before.targets["n"].flip(2) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    assert torch.equal(after.targets["n"], turned)


def test_batches_hold_all_tasks_of_the_same_images_and_continue_where_they_were(tmp_path):
    write_npy_scenes(tmp_path, COUNTS)
    scenes, digits = load_nyuv2(tmp_path, "train"), load_set("digits", "train")
    batches = MixedTaskBatches([scenes, digits], 6, [1.0, 2.0], seed=3)
    first = batches.next()
    assert first.tasks == ("segmentation", "depth", "normals", "digits")
    assert [len(part) for part in first.images] == [2, 2, 2, 4]
    assert first.images[0] is first.images[1]
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in batches.state_dict().items()}
    wanted = batches.next()
    again = MixedTaskBatches([scenes, digits], 6, [1.0, 2.0], seed=9)
    again.load_state_dict(state)
    got = again.next()
    for a, b in zip([*wanted.images, *wanted.labels], [*got.images, *got.labels], strict=True):
        assert torch.equal(a, b)


def test_a_split_divides_the_images_for_all_tasks(tmp_path):
    write_npy_scenes(tmp_path, COUNTS)
    scenes = load_nyuv2(tmp_path, "train")
    kept, held_out = scenes.split(0.25, seed=1)
    assert (len(kept), len(held_out)) == (9, 3)
    assert sorted([*kept.index.tolist(), *held_out.index.tolist()]) == list(range(12))
    assert held_out.index.tolist() == scenes.split(0.25, seed=1)[1].index.tolist()
    assert kept.tasks == scenes.tasks


def test_scenarios_pick_tasks_by_name(tmp_path):
    write_npy_scenes(tmp_path, COUNTS, classes=13)
    data = DagDataConfig("nyuv2", tmp_path, classes=13, only=("depth",))
    (scenes,) = load_tasks(data, "train")
    assert [name for name, _, _ in scenes.examples(slice(0, 2))] == ["depth"]
    with pytest.raises(ValueError, match="only must be among segmentation, depth, normals, got edges"):
        load_tasks(DagDataConfig("nyuv2", tmp_path, only=("edges",)), "train")


LOADERS = {"nyuv2": load_nyuv2, "cityscapes": load_cityscapes, "pascal_context": load_pascal_context}


@pytest.mark.parametrize("name", LOADERS)
def test_a_root_without_the_set_is_told_what_belongs_there(tmp_path, name):
    layout = {"nyuv2": r"train/\{image,label,depth,normal\}/\*\.npy", "cityscapes": r"train/\{image,label,depth\}",
              "pascal_context": r"PASCAL_MT tree, with ImageSets/Context/train\.txt"}[name]  # fmt: skip
    for root in (None, tmp_path):
        with pytest.raises(ValueError, match=f"load_{name}: data root must .*{layout}.* got .*--data.root"):
            LOADERS[name](root, "train")
    with pytest.raises(ValueError, match=f"load_{name}: split must be 'train' or 'test', got 'val'"):
        LOADERS[name](tmp_path, "val")


def edit(path, change):
    np.save(path, change(np.load(path)))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("label", lambda v: v + 1, r"labels of segmentation must lie in 0\.\.39, got 0\.\.40 in .*label/1\.npy"),
        ("label", lambda v: v - 2, r"labels of segmentation must lie in 0\.\.39, got -3\.\."),
        ("label", lambda v: v[:20], r"segmentation must be \[24, 32\], as its image is \[24, 32\], got \[20, 32\]"),
        ("depth", lambda v: v[:, :30], r"depth must be \[1, 24, 32\], .* got \[1, 24, 30\] in .*depth/1\.npy"),
        ("depth", lambda v: v * np.nan, r"depth must be finite, got nan in .*depth/1\.npy"),
        ("normal", lambda v: v[..., :2], r"normals must be \[3, 24, 32\], .* got \[2, 24, 32\]"),
        ("image", lambda v: v[..., 0], r"image must be \[H, W, 3\], got \[24, 32\] in .*image/1\.npy"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, file, change, message):
    write_npy_scenes(tmp_path, COUNTS)
    edit(tmp_path / "train" / file / "1.npy", change)
    scenes = load_nyuv2(tmp_path, "train")
    scenes.examples(slice(0, 1))
    with pytest.raises(ValueError, match=message):
        scenes.examples(slice(0, 2))


def test_images_of_different_sizes_damaged_and_missing_files_are_refused(tmp_path):
    write_npy_scenes(tmp_path, COUNTS)
    folder = tmp_path / "train"
    for name in ("image", "label", "depth", "normal"):
        edit(folder / name / "2.npy", lambda v: v[:20])
    with pytest.raises(ValueError, match=r"images must be \[3, 24, 32\] as the first one, got \[3, 20, 32\]"):
        load_nyuv2(tmp_path, "train").examples(slice(2, 3))
    (folder / "depth" / "3.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"3\.npy must be a complete \.npy file"):
        load_nyuv2(tmp_path, "train").examples(slice(3, 4))
    (folder / "depth" / "4.npy").unlink()
    with pytest.raises(ValueError, match=r"depth must hold a file for every image, got none for 4\.npy"):
        load_nyuv2(tmp_path, "train")
    for path in (tmp_path / "val" / "image").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="must hold at least one image, got an empty data set"):
        load_nyuv2(tmp_path, "test")


def test_pascal_files_that_do_not_fit_are_named(tmp_path):
    write_pascal(tmp_path, {"train": ["a"], "val": ["b"]})

    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_pascal_context(tmp_path, "train", 32).examples(slice(None))

    Image.fromarray(np.full((20, 30), 21, np.uint8)).save(tmp_path / "semseg" / "VOC12" / "a.png")
    refused(r"labels of segmentation must lie in 0\.\.20, got 21\.\.21 in .*segmentation of a")
    Image.fromarray(np.zeros((20, 29), np.uint8)).save(tmp_path / "semseg" / "VOC12" / "a.png")
    refused(r"segmentation must be \[20, 30\], as its image is \[20, 30\], got \[20, 29\]")
    (tmp_path / "semseg" / "VOC12" / "a.png").unlink()
    refused("semseg/pascal-context/a.png must be a picture")
    (tmp_path / "ImageSets" / "Context" / "train.txt").write_text("\n")
    refused("must name at least one image, got an empty data set")
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        load_pascal_context(tmp_path, "train", 0)
    write_pascal(tmp_path, {"train": ["a"], "val": ["b"]})
    (tmp_path / "human_parts" / "a.mat").write_bytes(b"no")
    refused("human_parts/a.mat must hold anno")
    (tmp_path / "human_parts" / "a.mat").write_bytes((tmp_path / "pascal-context" / "trainval" / "a.mat").read_bytes())
    refused("human_parts/a.mat must hold anno, got 'anno'")


def test_edges_other_than_0_1_and_unknown_are_refused():
    image, task = torch.zeros(3, 2, 2), Task("edges", 1, 2, 3, "edges")
    with pytest.raises(ValueError, match="edges must be 0, 1 or 255, got other values in x"):
        checked_target(task, torch.full((1, 2, 2), 0.5), image, "x")


@pytest.mark.parametrize(("load", "counts"), [(load_nyuv2, (40, 13)), (load_cityscapes, (19, 7))])
def test_the_labels_say_how_many_classes_there_are(tmp_path, load, counts):
    """Widely used trees have 13 (NYU-v2) and 7 classes (Cityscapes) in the folder `label`."""
    for classes in counts:
        root = tmp_path / str(classes)
        write_npy_scenes(root, COUNTS, classes=classes)
        for split in ("train", "test"):
            assert load(root, split).tasks[0].classes == classes
            assert load(root, split, classes).tasks[0].classes == classes


def test_a_folder_named_after_its_classes_is_taken_before_the_other(tmp_path):
    write_npy_scenes(tmp_path, COUNTS, classes=40)
    write_npy_scenes(tmp_path, COUNTS, classes=13, label="label_13")
    assert load_nyuv2(tmp_path, "train").tasks[0].classes == 13
    assert load_nyuv2(tmp_path, "train", 40).tasks[0].classes == 40


def test_a_split_without_the_highest_class_has_the_classes_of_the_training_split(tmp_path):
    write_npy_scenes(tmp_path, {"train": 12}, classes=40)
    write_npy_scenes(tmp_path, {"val": 3}, classes=5)
    assert load_nyuv2(tmp_path, "test").tasks[0].classes == 40


def test_labels_above_the_classes_are_refused_and_classes_that_never_occur_are_told(tmp_path):
    write_npy_scenes(tmp_path, COUNTS, classes=13)
    with pytest.raises(ValueError, match=r"labels of segmentation must lie in 0\.\.6, got 0\.\.12 in .*npy"):
        load_nyuv2(tmp_path, "train", 7).check_targets()
    with pytest.warns(
        UserWarning, match="no label is above 12 in 12 scenes, as if there were 13 classes; there are 40"
    ):
        assert load_nyuv2(tmp_path, "train", 40).tasks[0].classes == 40
    write_npy_scenes(tmp_path / "more", COUNTS, classes=60)
    with pytest.raises(ValueError, match=r"got 0\.\.59 in "):
        load_nyuv2(tmp_path / "more", "train").check_targets()


def test_the_scenarios_weigh_losses_as_the_public_protocols_do():
    weights = {"nyuv2": (1, 3, 20), "cityscapes": (1, 20), "pascal": (1, 2, 5, 10, 50)}
    for name, expected in weights.items():
        assert SCENARIOS[f"dag-{name}"].training.loss_weights == expected
        assert tuple(LOSS_WEIGHTS[name].values()) == expected


def test_loss_weights_are_those_of_the_tasks_that_are_trained(tmp_path):
    write_npy_scenes(tmp_path, COUNTS)
    tasks = load_nyuv2(tmp_path, "train").tasks
    config = replace(SCENARIOS["dag-nyuv2"], data=DagDataConfig("nyuv2", only=("normals", "segmentation")))
    assert loss_weights(config, (tasks[0], tasks[2])) == (1, 20)
    assert loss_weights(DagTrainConfig(), tasks) == (1, 1, 1)
    with pytest.raises(
        ValueError, match=r"training.loss_weights must be one for each of 2 tasks, got \[1.0, 3.0, 20.0\]"
    ):
        loss_weights(replace(config, data=DagDataConfig("nyuv2")), tasks[:2])


def test_published_values_are_of_the_classes_and_the_size_of_the_images():
    nyu, streets = SINGLE_TASK["nyuv2"], SINGLE_TASK["cityscapes"]
    assert nyu(Task("s", 40, 288, 3, "segmentation", 384)) == {"miou": 0.275, "pixel_accuracy": 0.589}
    assert nyu(Task("s", 13, 288, 3, "segmentation", 384)) == {}
    assert len(nyu(Task("n", 3, 288, 3, "normals", 384))) == len(nyu(Task("d", 1, 288, 3, "depth", 384))) == 5
    assert streets(Task("s", 7, 128, 3, "segmentation", 256))["miou"] == 0.519
    assert streets(Task("s", 7, 512, 3, "segmentation", 1024))["miou"] == 0.644
    assert streets(Task("s", 19, 256, 3, "segmentation", 512))["miou"] == 0.402
    assert streets(Task("s", 19, 128, 3, "segmentation", 256)) == streets(Task("d", 1, 128, 3, "depth", 256)) == {}
