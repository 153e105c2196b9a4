"""The scenes of cards on which the dense settings were chosen, and the tables of what was measured."""

import json

import pytest
import torch
import torch.nn.functional as F

from den.data import ImageSet
from den.data.npy_scenes import load_npy_scenes
from scripts import card_scenes, dag_tables

SIDE = 48


def test_depth_normals_and_labels_belong_to_the_same_surfaces():
    """Neighbouring pixels of one surface lie in a plane whose normal is theirs, and that faces the camera."""
    ink = torch.zeros(2, 1, 105, 105, dtype=torch.uint8)
    alphabets = [ImageSet(f"a{k}", ink, torch.zeros(2, dtype=torch.int64), 1, (0.0,), (1.0,)) for k in range(3)]
    generator, ray, turned = torch.Generator().manual_seed(0), card_scenes.rays(SIDE), 0
    for _ in range(10):
        made = {name: torch.from_numpy(each) for name, each in card_scenes.scene(alphabets, SIDE, generator).items()}
        points, normal = ray * made["depth"][..., None], made["normal"]
        same = (normal[1:, 1:] == normal[:-1, 1:]).all(2) & (normal[1:, 1:] == normal[1:, :-1]).all(2)
        down, right = points[1:, 1:] - points[:-1, 1:], points[1:, 1:] - points[1:, :-1]
        plane = F.normalize(torch.linalg.cross(down, right), dim=2)
        flat = same & (down.norm(dim=2) < 0.5) & (right.norm(dim=2) < 0.5)  # not two cards that are turned alike
        assert flat.float().mean() > 0.6
        torch.testing.assert_close(plane[flat], normal[1:, 1:][flat], atol=1e-3, rtol=0)
        assert ((normal * ray).sum(2) < 0).all()
        wall = made["label"] == 3
        assert (made["depth"][wall] == card_scenes.WALL).all()
        assert (made["depth"][~wall] < card_scenes.WALL).all()
        turned += int((normal[..., :2].abs().sum(2) > 0.1).sum())
    assert turned > 1000


def test_scenes_are_dense_tasks_on_drawings_that_are_held_out(tmp_path, monkeypatch):
    ink = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 105, 105)  # a drawing is its brightness
    alphabets = [ImageSet(f"a{k}", ink, torch.arange(10) % 2, 2, (0.0,), (1.0,)) for k in range(3)]
    monkeypatch.setattr(card_scenes, "load_omniglot", lambda root, split, size: alphabets)
    seen, scene = [], card_scenes.scene
    monkeypatch.setattr(card_scenes, "scene", lambda each, *rest: seen.append(each) or scene(each, *rest))
    card_scenes.write_scenes(tmp_path, tmp_path / "cards", 6, 3, SIDE)
    for first, last in zip(seen[0], seen[-1], strict=True):
        drawings = [set(each.images[:, 0, 0, 0].tolist()) for each in (first, last)]
        assert drawings[0] | drawings[1] == set(range(10))
        assert not drawings[0] & drawings[1]
    kinds = ("segmentation", "depth", "normals")
    found = {split: load_npy_scenes("cards", tmp_path / "cards", split, kinds, None, known_classes=(4,),
                                    farthest=card_scenes.WALL) for split in ("train", "test")}  # fmt: skip
    assert {split: len(each) for split, each in found.items()} == {"train": 6, "test": 3}
    assert not torch.equal(*(each.read(0, each.tasks).image for each in found.values()))


def run(accuracy, flops=1e6):
    return {"metrics": {"a": {"accuracy": accuracy}}, "parameters": 10, "task parameters": 5, "flops": flops}


def test_accuracy_tables_compare_seed_by_seed():
    runs = {f"dag-s{seed}": run(0.8 + seed / 100) for seed in range(3)}
    runs |= {f"hard-s{seed}": run(0.7 + seed / 100 + seed / 1000) for seed in range(2)} | {"gates-s0": run(0.9)}
    first, gates, hard = dag_tables.accuracy_table(runs, dag_tables.MAIN).splitlines()[2:]
    assert [cell.strip() for cell in first.split("|")][2:5] == ["0, 1, 2", "81.00%", "1.00"]
    assert "+9.95 [+9.31, +10.59], 2 seeds |    yes" in hard
    assert "-10.00, 1 seed, so no interval |   open" in gates


def test_delta_is_the_mean_of_relative_gains_of_all_metrics():
    single = [{"metrics": {"depth": {"abs_error": 0.1, "delta_1": 0.5}}}, {"metrics": {"depth": {"abs_error": 0.3,
              "delta_1": 0.5}}}]  # fmt: skip
    values = {"metrics": {"depth": {"abs_error": 0.1, "delta_1": 0.6}}}
    assert dag_tables.delta(values, single) == {"depth": pytest.approx((0.5 + 0.2) / 2)}


@pytest.mark.parametrize("name", dag_tables.PAGES)
def test_pages_show_what_was_measured(name):
    make, parts = dag_tables.PAGES[name]
    runs = json.loads((dag_tables.FOLDER / f"dag-{name}.json").read_text(encoding="utf-8"))
    page = (dag_tables.FOLDER / f"dag-{name}.md").read_text(encoding="utf-8")
    for part, names in parts.items():
        assert f"<!-- {part}:begin -->\n{make(runs, names)}\n<!-- {part}:end -->" in page
