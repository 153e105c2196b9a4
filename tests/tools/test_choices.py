"""scripts/choices.py: what choosing per image is worth on held-out images."""

import pytest
import torch

from den.data import load_set
from den.evaluate.accuracy import evaluate
from den.runs.steering import unseen_images
from den.runs.trained import open_run
from scripts import choices
from scripts.choices import HEAD, halved, right


def test_a_structure_that_was_lucky_on_one_half_is_measured_on_the_other():
    always, never = torch.ones(1, 40), torch.zeros(1, 40)
    assert halved(torch.cat([never, always]), torch.Generator().manual_seed(0)) == 1
    chance = (torch.rand(200, 60, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    assert chance.mean(1).max() > 0.64  # what choosing and measuring on the same images would say
    assert halved(chance, torch.Generator().manual_seed(0)) == pytest.approx(0.5, abs=0.08)


@pytest.fixture
def few_images(monkeypatch):
    whole = {split: load_set("digits", split).subset(torch.arange(300)) for split in ("train", "test")}
    monkeypatch.setattr("den.data.load_set", lambda name, split, root: whole[split])


def test_images_are_right_where_the_evaluation_has_them_right(tmp_path, stored_run, few_images):
    stored_run(tmp_path / "run")
    run = open_run(tmp_path / "run")
    (images,) = unseen_images(run, None)[1]
    report = evaluate(run.model, [images])["digits"]
    assert right(run.model, images, report.levels).mean().item() == pytest.approx(report.accuracy)
    structure = torch.tensor([3, 1, 0])
    found = evaluate(run.model, [images], structure)["digits"].accuracy
    assert right(run.model, images, structure).mean().item() == pytest.approx(found)


def test_the_script_prints_a_row_for_each_run(tmp_path, stored_run, few_images, monkeypatch, capsys):
    for seed in (0, 1):
        stored_run(tmp_path / f"den-s{seed}", seed=seed)
    stored_run(tmp_path / "dense", "dense")
    runs = [str(tmp_path / f"den-s{seed}") for seed in (0, 1)]
    given = ["choices.py", *runs, "--dense", str(tmp_path / "dense"), "--flops", "0.5", "--singles", "5"]
    monkeypatch.setattr("sys.argv", given)
    choices.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == list(HEAD)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert [row[0] for row in rows] == ["den-s0", "den-s1"]
    for row in rows:
        chosen, flops, single, gain = (float(row[HEAD.index(name)]) for name in (
            "chosen %", "FLOPs", "best single %", "gain"
        ))  # fmt: skip
        assert flops == pytest.approx(0.5, abs=0.03)
        assert gain == pytest.approx(chosen - single, abs=0.011)
