"""scripts/sanitize.sh: it runs tests with an extension that holds the sanitizer, or not at all."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
case "$1 $2" in
  "setup.py -q")
    mkdir -p build/temp.here/csrc
    echo "__asan_init __tsan_init" > build/temp.here/csrc/one.o
    echo "{built} for $DEN_KERNELS_FLAGS" > build/temp.here/csrc/two.o ;;
  "-m pytest") cat build/temp.here/csrc/two.o; echo "tests: $*" ;;
esac
"""


def sanitize(folder: Path, built: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script with a stand-in for `python`, which builds an object file of these words."""
    (folder / "python").write_text(PYTHON.format(built=built), encoding="utf-8")
    (folder / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "scripts/sanitize.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_tests_run_with_the_sanitizer_that_was_asked_for(tmp_path):
    done = sanitize(tmp_path, "calls __asan_init", "address", "tests/one.py")
    assert done.returncode == 0, done.stderr
    assert "-fsanitize=address,undefined" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("tests/one.py")


@pytest.mark.parametrize(("kind", "built"), [("address", "plain"), ("thread", "calls __asan_init")])
def test_objects_without_the_sanitizer_are_refused(tmp_path, kind, built):
    done = sanitize(tmp_path, built, kind, "tests/one.py")
    assert done.returncode == 1
    assert "built without the sanitizer: build/temp.here/csrc/two.o" in done.stderr
    assert "tests:" not in done.stdout
