"""Which state of the bindings in csrc an extension was built from; setup.py runs this file for the compiler's flag."""

import hashlib
from pathlib import Path


def interface_of(csrc: Path) -> str:
    """A hash of the sources that bind C++ to Python: csrc/bind*.h, csrc/bind*.cpp and csrc/extension.cpp."""
    files = sorted([*csrc.glob("bind*.h"), *csrc.glob("bind*.cpp"), csrc / "extension.cpp"])
    return hashlib.sha256(b"\0".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()[:16]


def stale(built_from: str, csrc: Path) -> str:
    """Why an extension does not belong to these sources, or an empty string.

    Args:
        built_from: its `interface`; empty where a build without setup.py has left it out, so that nothing is known.
        csrc: the folder of sources; where there is none, as beside an installed package, nothing can differ.
    """
    if not built_from or not (csrc / "extension.cpp").exists() or built_from == interface_of(csrc):
        return ""
    return "den_kernels._C was built from another state of csrc/: build it again, with `pip install -e .`"


if __name__ == "__main__":
    print(f'-DBINDINGS="{interface_of(Path("csrc"))}"')  # for the compiler
