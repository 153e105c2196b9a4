"""Files of text: UTF-8 whatever the locale, whole or not at all, where they can be written."""

import ast
import stat
from pathlib import Path

import pytest

import den
import den_kernels
from den import cli
from den.support.files import check_file, check_folder, check_own, is_writable, write_text

PACKAGES = [Path(package.__file__).parent for package in (den, den_kernels)]
SOURCES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
SOURCES += [
    path for name in ("benchmarks", "scripts") for path in sorted((Path(__file__).parents[2] / name).rglob("*.py"))
]
BINARY = {"Image", "tarfile", "zipfile", "lzma", "os"}  # whose `open` is of another kind


def opens_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text of a file."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name in ("read_text", "write_text"):
        return name == "read_text" or isinstance(call.func, ast.Attribute)
    of = getattr(call.func, "value", None)
    if name not in ("open", "fdopen") or (isinstance(of, ast.Name) and of.id in BINARY):
        return False
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return not any("b" in mode and set(mode) <= set("rwaxb+") for mode in modes)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_text_is_read_and_written_in_utf8_whatever_the_locale(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    told = [ast.unparse(call) for call in calls if opens_text(call)]
    assert not [call for call in told if "encoding='utf-8" not in call and "'utf-8')" not in call]


def test_names_that_the_locale_could_not_decode_are_written(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "Δ, " + "läuf".encode().decode("ascii", "surrogateescape") + ", \udcff")
    assert path.read_text(encoding="utf-8") == "Δ, läuf, \ufffd"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "table.md").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "table.md", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_places_are_checked_and_made(tmp_path):
    check_folder(tmp_path / "a" / "b", "report: out")
    assert is_writable(tmp_path / "a" / "b")
    check_file(tmp_path / "c" / "table.md", "dag report: markdown")
    assert list((tmp_path / "c").iterdir()) == []
    (tmp_path / "file").write_text("")
    for check in (check_folder, check_file):
        with pytest.raises(ValueError, match=r"^report: out must be a folder that can be written, got .*file"):
            check(tmp_path / "file" / "b", "report: out")
    with pytest.raises(ValueError, match=r"markdown must be a file, got .*which is a folder"):
        check_file(tmp_path / "a", "dag report: markdown")


def test_a_folder_without_write_permission_is_left_alone(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert not is_writable(tmp_path)
        with pytest.raises(ValueError, match="must be a folder that can be written"):
            check_folder(tmp_path, "report: out")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_file_of_another_program_is_told_from_an_own_one(tmp_path):
    path = tmp_path / "results.json"
    check_own(path, '"quick"', "demo: out")  # there is none
    path.write_text('{"quick": true}', encoding="utf-8")
    check_own(path, '"quick"', "demo: out")
    path.write_bytes(b"\xff mine")
    with pytest.raises(ValueError, match=r"demo: out must be a folder without results\.json of another program"):
        check_own(path, '"quick"', "demo: out")


@pytest.mark.parametrize(("file", "arguments"), [
    ("results.json", ["demo", "--quick", "--out", "{out}"]),
    ("report.md", ["report", "{run}", "--out", "{out}"]),
    ("evaluation.json", ["evaluate", "{run}", "--out", "{out}"]),
    ("run.json", ["bench", "--out", "{out}"]),
], ids=lambda value: value if isinstance(value, str) else value[0])  # fmt: skip
def test_no_command_replaces_a_file_of_another_program(tmp_path, stored_run, capsys, monkeypatch, file, arguments):
    monkeypatch.chdir(Path(__file__).parents[2])  # den bench wants a checkout
    out = tmp_path / "out"
    stored_run(tmp_path / "run")
    path = out / ("quick" if arguments[0] == "demo" else "") / file
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    assert cli.main([a.format(out=out, run=tmp_path / "run") for a in arguments]) == 2
    assert "of another program" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"
