"""docs/export.md: its program runs, in C++ too."""

import re
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
HAS_ONNX = all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def program(leave_out: tuple[str, ...]) -> dict:
    """The names that the page's Python leaves, without the blocks under comments that begin with one of these words."""
    names: dict = {}
    for word, code in re.findall(r"(?:<!-- (\w+).*? -->\n)?```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if word not in leave_out:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(code, names)
    return names


def block(language: str) -> str:
    [code] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return code


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = program(("aot",) if HAS_ONNX else ("aot", "onnx"))
    assert "levels must be set inside the call" in names["refused"]
    if HAS_ONNX:
        assert {path.name for path in tmp_path.glob("*.onnx")} == {"elastic.onnx", "half.onnx"}


@pytest.mark.release
def test_its_packages_run_in_python_and_in_cpp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = program(("onnx",))
    Path("main.cpp").write_text(block("cpp"))
    done = subprocess.run(["bash", "-euc", block("bash")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = torch.linspace(-1, 1, 6 * 3 * 16 * 16).view(6, 3, 16, 16)
    levels = torch.arange(12).view(6, 2) % 5
    got = torch.tensor([float(line) for line in done.stdout.split()]).view(6, 10)
    with torch.no_grad():
        torch.testing.assert_close(got, names["whole"](x, levels), rtol=1e-4, atol=1e-4)
