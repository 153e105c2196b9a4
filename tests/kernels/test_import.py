"""What importing the library does, and does not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import den_kernels
from den_kernels import _extension
from den_kernels._interface import interface_of, stale

PACKAGE = Path(den_kernels.__file__).parent


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_under_test_has_its_extension():
    assert _extension.extension is not None, (
        f"{_extension.reason} in {PACKAGE}: install first, and start `pytest`, not `python -m pytest`, "
        "which puts the source tree before the installed package"
    )


def test_an_extension_of_other_bindings_is_refused_in_one_line(tmp_path):
    """A checkout whose sources have moved on since it was built."""
    csrc = tmp_path / "csrc"
    assert stale("0123456789abcdef", csrc) == ""  # an installed package has no sources beside it
    csrc.mkdir()
    (csrc / "extension.cpp").write_text("a")
    (csrc / "bind.h").write_text("b")
    now = interface_of(csrc)
    assert stale(now, csrc) == stale("", csrc) == ""
    (csrc / "plan.cpp").write_text("not of the bindings")
    assert stale(now, csrc) == ""
    (csrc / "bind_plan.cpp").write_text("c")
    assert "build it again, with `pip install -e .`" in stale(now, csrc)


def test_the_import_ends_where_the_extension_is_stale():
    code = (
        "import den_kernels._interface as i\n"
        "i.stale = lambda built_from, csrc: 'built from another state'\n"
        "try:\n    from den_kernels import _extension\n"
        "except ImportError as error:\n    print(error)"
    )
    loaded = "import sys, types; sys.modules['den_kernels'] = p = types.ModuleType('den_kernels')\n"
    assert run(f"{loaded}p.__path__ = [{str(PACKAGE)!r}]\n{code}") == "built from another state"


def test_public_names():
    for name in den_kernels.__all__:
        assert getattr(den_kernels, name) is not None
    assert den_kernels.__version__[0].isdigit()


def test_den_imports_public_names_only():
    """From the package itself, `building` and `info`."""
    public = {"den_kernels", "den_kernels.building", "den_kernels.info"}
    found = {}
    for file in sorted((PACKAGE.parent / "den").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "den_kernels":
                names = {alias.name for alias in node.names if alias.name.startswith("_") and alias.name[1] != "_"}
                found |= {str(file): node.module} if node.module not in public or names else {}
            elif isinstance(node, ast.Import):
                deep = [alias.name for alias in node.names if alias.name.startswith("den_kernels.")]
                found |= {str(file): deep} if deep else {}
    assert not found


def test_the_extension_shares_the_openmp_runtime_of_torch():
    code = (
        "import torch; from den_kernels._extension import extension as c\n"
        "torch.set_num_threads(1); print(c.omp_max_threads())\n"
        "torch.set_num_threads(2); print(c.omp_max_threads())"
    )
    assert run(code).split() == ["1", "2"]


def test_no_openmp_to_promote_is_no_error(tmp_path):
    assert _extension.promote_openmp(tmp_path / "torch") is None
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libgomp.so.1").write_bytes(b"not a library, and not loaded")
    assert _extension.promote_openmp(tmp_path / "torch") is None


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("sys.modules['den_kernels._C'] = None", "not built"),
        (
            "class Broken:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'den_kernels._C': raise ImportError('wrong symbols')\n"
            "sys.meta_path.insert(0, Broken())",
            "cannot be loaded: wrong symbols",
        ),
    ],
    ids=["absent", "broken"],
)
def test_without_the_extension_everything_is_there(block, reason):
    code = (
        f"import sys\n{block}\nimport torch, den_kernels\nfrom den_kernels._extension import extension, reason\n"
        "plan = den_kernels.RoutingPlan.from_levels(torch.tensor([[1], [2]]))\n"
        "print(extension, plan.order.tolist(), reason)"
    )
    said = run(code)
    assert said.startswith("None [[1, 0]] ")
    assert reason in said


def test_importing_touches_no_device_and_reads_no_environment_variable():
    code = """
import os, torch
reads = []
def spy(name, keep):
    def read(self, key, *rest):
        import sys
        if "den_kernels" in sys._getframe(1).f_code.co_filename: reads.append(key)
        return keep(self, key, *rest)
    return read
for name in ("__getitem__", "get"):
    setattr(os._Environ, name, spy(name, getattr(os._Environ, name)))
import den_kernels
assert not torch.cuda.is_initialized()
print(reads)
"""
    assert run(code) == "[]"


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module}
    return absolute | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_den_kernels_never_imports_den(path):
    assert not {name for name in imports(path) if name == "den" or name.startswith(("den.", "tests", "benchmarks"))}


@pytest.mark.parametrize("package", ["den_kernels", "den"])
def test_no_environment_variable_is_read(package):
    for path in sorted((PACKAGE.parent / package).rglob("*.py")):
        # What torchrun tells its processes, and what Ray takes from its environment alone.
        if path.match("den/support/launched.py") or path.match("den/serve/command.py"):
            continue
        tree = ast.parse(path.read_text())
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & {"environ", "getenv", "environb"}, path


def test_one_build_for_every_torch():
    """The extension links nothing of torch, nor a CUDA library that a machine without a driver lacks."""
    assert _extension.extension is not None
    linked = subprocess.run(["ldd", _extension.extension.__file__], capture_output=True, text=True, check=True).stdout
    libraries = [Path(line.split()[0]).name for line in linked.splitlines()]  # the addresses behind them may spell c10
    assert any(name.startswith("libc.so") for name in libraries)
    assert not [name for name in libraries if any(foreign in name for foreign in ("torch", "c10", "cuda"))]


def test_poisoned_memory_is_on():
    assert bool(torch.empty(3).isnan().all())
