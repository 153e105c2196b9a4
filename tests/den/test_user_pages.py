"""docs/your-images.md, read-the-figures.md, choose-a-budget.md, serve.md: their commands exist, their programs run."""

import os
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from den.commands import parse
from den.data import load_set
from den.nn.backbones import named_backbone

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("your-images.md", "read-the-figures.md", "choose-a-budget.md", "serve.md")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture
def runs(tmp_path, monkeypatch, stored_run):
    monkeypatch.chdir(tmp_path)
    for name in ("flowers", "flowers-dense"):
        stored_run(tmp_path / "runs" / name)
    (tmp_path / "new").mkdir()
    for name, image in zip("ab", load_set("digits", "test").images, strict=False):
        Image.fromarray(image[0].numpy()).save(tmp_path / "new" / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_is_one(runs, page):
    lines = [line.strip() for block in blocks(page, "bash") for line in block.splitlines()]
    commands = [re.sub(r"\$(RHO|SEED)", "1", line) for line in lines if line.startswith("den ")]
    assert commands or page == "read-the-figures.md"
    for line in commands:
        parse(shlex.split(line)[1:])


def test_the_programs_of_the_page_run(runs, capsys):
    predict, backbone = blocks("your-images.md", "python")
    exec(predict, {})
    assert len(re.findall(r"new/[ab]\.png \d \d+% \(\d, \d, \d\) \d+% of the FLOPs", capsys.readouterr().out)) == 2
    Path("slim.py").write_text(backbone)
    assert named_backbone("slim.py:slim").stages == ((24, 2), (48, 2), (96, 2))


def test_the_figures_of_the_table_are_those_that_a_report_draws():
    drawn = Path(DOCS.parent / "den" / "report" / "command.py").read_text()
    names = re.findall(r"`…-([a-z-]+?)(?:-…)?\.png`", (DOCS / "read-the-figures.md").read_text())
    assert len(names) == 7
    assert all(f"-{name}" in drawn for name in names), os.linesep.join(names)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "absent.py:slim", "absent.py must be a Python file, got none there"),
        ("1 / 0", "own.py:slim", "must run, got ZeroDivisionError"),
        ("fat = 1", "own.py:slim", "must define slim, got none of that name"),
        ("slim = 1", "own.py:slim", "must be a den.Backbone, got int"),
        ("def slim():\n    raise KeyError('x')", "own.py:slim", "must return a Backbone, got KeyError"),
    ],
)
def test_a_file_without_a_backbone_is_told(tmp_path, monkeypatch, content, name, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("own.py").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        named_backbone(name)
