"""The documentation builds without a warning, and has every public name."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import den
import den_kernels

pytest.importorskip("material", reason="mkdocs-material is not installed (pip install '.[docs]')")
pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (pip install '.[docs]')")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("package", [den, den_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(site, package):
    page = (site / "api" / f"{package.__name__}.html").read_text(encoding="utf-8")
    documented = {identity.rpartition(".")[2] for identity in re.findall(r'id="([\w.]+)"', page)}
    assert set(package.__all__) - documented == {"__version__"}


def test_doctests_are_blocks_of_code(site):
    pages = [path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html")]
    assert any("&gt;&gt;&gt;" in page for page in pages)
    assert not any(re.search(r"<(p|blockquote)>\s*&gt;&gt;&gt;", page) for page in pages)


def test_no_page_asks_another_machine_for_anything(site):
    """Scripts, styles, fonts and pictures come with the pages."""
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]*?(?:src|href)="([^"]+)"', path.read_text(encoding="utf-8"))
        assert [address for address in loaded if "//" in address] == []
