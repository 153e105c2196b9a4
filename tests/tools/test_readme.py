"""The README: what it shows was measured, what it links exists, what it tells to type runs."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # at the end: an installed den_kernels stays the one that is tested

from benchmarks import report, results  # noqa: E402
from den.support.tables import with_section  # noqa: E402

README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_of_the_kept_results():
    if not results.results_files():
        pytest.skip("no results are kept")
    for document, make in ((README, report.readme_section), (report.PAGE.read_text(), report.page_section)):
        assert with_section(document, "benchmarks", make(results.results_files()), "document") == document


DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"]
DOCUMENTS += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_its_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text())
    missing = [link for link in links if "://" not in link and not ((ROOT / document).parent / link).exists()]
    assert missing == []


def test_its_first_example_runs():
    [code, *_] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["y"].shape == (8, 64, 32, 32)
    assert (names["y"][0] == names["conv2"].bias[:, None, None]).all()  # level 0: nothing but the bias
