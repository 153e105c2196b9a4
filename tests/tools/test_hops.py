"""The counter of functions that an image and a training step pass: its numbers, and the functions that must run."""

import sys

import pytest

from den.train.engine import Engine
from den_kernels._extension import extension
from scripts import hops
from scripts.hops import Hops, of_inference, of_steps


def names(found: Hops) -> set[str]:
    return {name for _, name in found.calls}


def test_calls_of_other_code_and_comprehensions_are_not_counted():
    from den.nn.levels import level_fractions

    found = Hops()
    found.start()
    sorted(level_fractions(3))
    level_fractions(4)
    found.stop()
    level_fractions(5)
    assert found.calls == {("den/nn/levels.py", "level_fractions"): 2}
    assert sys.getprofile() is None


@pytest.mark.parametrize("frozen", [False, True])
def test_one_image(frozen):
    found = of_inference("wrn14_1", frozen)
    assert {"DeepElasticNetwork.forward", "Selector.choose", "Estimator.part_logits"} <= names(found)
    direct = extension is not None and extension.has_direct_float32()
    for call in ("TaskNetwork.choose", "TaskNetwork.__call__"):  # the selector in one call, the estimator in another
        assert found.calls.get(("den_kernels/task_network.py", call), 0) == direct
    assert 5 < len(found.files) < len(found.calls) < 100


def test_one_step_of_each_network():
    update = Engine.update
    found = of_steps("wrn14_1")
    assert Engine.update is update
    assert sys.getprofile() is None
    for name, own, other in (
        ("estimator", "initial_structures", "reinforce"),
        ("selector", "reinforce", "initial_structures"),
    ):
        called = names(found[name])
        assert {"Engine.update", "MixedTaskBatches.next", own} <= called
        assert other not in called
        assert found[name].calls["den/train/engine.py", "Engine.update"] == 1
        assert 10 < len(found[name].files) < len(found[name].calls) < 250


def test_the_table_is_printed(monkeypatch, capsys):
    found = Hops()
    found.calls.update({("den/nn/model.py", "create_model"): 3, ("den/nn/model.py", "freeze"): 1})
    monkeypatch.setattr(hops, "of_inference", lambda *_, **__: found)
    monkeypatch.setattr(hops, "of_steps", lambda _: {"estimator": found})
    hops.main(["--list"])
    head, _, first, *_ = printed = capsys.readouterr().out.splitlines()
    assert head.split() == ["|", "what", "|", "functions", "|", "files", "|", "calls", "|"]
    assert [cell.strip() for cell in first.strip("|").split("|")] == ["inference, one image", "2", "1", "4"]
    assert "    create_model x3" in printed
