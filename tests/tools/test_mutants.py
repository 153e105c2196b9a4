"""The mistakes in C++ of scripts/mutants.py: each changes code that stands there once, and has tests to find it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mistakes():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import cpp_mistakes

        yield cpp_mistakes
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_what_a_mistake_changes_stands_there_once(mistakes):
    for file, right, wrong in mistakes.CPP:
        assert ((ROOT / file).read_text(encoding="utf-8").count(right), right != wrong) == (1, True), (file, right)


def test_every_mistake_has_sources_to_build_and_tests_that_exist(mistakes):
    assert set(mistakes.PARTS) == {file for file, _, _ in mistakes.CPP}
    for part in mistakes.PARTS.values():
        for name in part.objects:
            assert (ROOT / f"csrc/{name.format(isa='avx2')}.cpp").exists(), name
        assert all((ROOT / test).exists() for test in part.tests)


def test_survivors_that_are_no_mistakes_are_tried(mistakes):
    tried = {f"{file}: {' '.join(wrong.split())}" for file, _, wrong in mistakes.CPP}
    assert set(mistakes.EQUIVALENT) <= tried
