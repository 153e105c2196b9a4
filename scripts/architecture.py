#!/usr/bin/env python3
"""Draws the parts of this project and which of them import which, read from the sources.

    scripts/architecture.py            writes docs/architecture.png and the table in docs/architecture.md
    scripts/architecture.py --check    writes nothing; status 1 where the table is not that of the sources

A part is a folder of den/, the modules that lie in den/ itself (the command line), den_kernels, or csrc. A part stands
above all parts that it imports. Where imports run in a circle, the fewest of them that break it count as against the
order, and are drawn in red.
"""

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import networkx as nx

from den.support.tables import with_section

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs/architecture.md", ROOT / "docs/architecture.png"
FACADES = ("den", "den._moved")  # they stand for the others: names of the package, names that modules had before
SPOKEN_FOR = {"den": "den/commands.py"}  # the file whose first sentence describes a part
CSRC = "C++ and CUDA: the kernels, and den_kernels._C, which binds them"
Edges = Mapping[tuple[str, str], int]  # (part, part that it imports): number of imports


def modules() -> dict[str, Path]:
    """The Python modules of both packages by their dotted names."""
    files = (path for package in ("den", "den_kernels") for path in sorted((ROOT / package).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def part_of(module: str) -> str:
    """The part that a module belongs to.

    >>> part_of("den.nn.blocks.pair"), part_of("den.cli"), part_of("den_kernels.plan"), part_of("den_kernels._C")
    ('den.nn', 'den', 'den_kernels', 'csrc')
    """
    package, _, rest = module.partition(".")
    if package != "den":
        return "csrc" if rest == "_C" else package
    folder = rest.partition(".")[0]
    return f"den.{folder}" if folder and (ROOT / "den" / folder).is_dir() else "den"


def imported(module: str, path: Path, known: Iterable[str]) -> Iterator[str]:
    """The modules of ours that a module imports, wherever in it the import stands."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            names = [str(word.value) for word in ast.walk(node) if isinstance(word, ast.Constant)]
        else:
            continue
        yield from (name for name in names if name in known)


def imports() -> Counter[tuple[str, str]]:
    """The number of imports that lead from each part to each other one."""
    known, found = modules(), Counter[tuple[str, str]]()
    for module, path in known.items():
        if module not in FACADES:
            for name in imported(module, path, {*known, "den_kernels._C"}):
                found[part_of(module), part_of(name)] += 1
    return Counter({edge: count for edge, count in found.items() if edge[0] != edge[1]})


def without_circles(edges: Edges) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(imports that keep to an order, imports against it): of every circle the thinnest import goes."""
    kept, against = sorted(edges), []
    while circular := [edge for edge in kept if nx.has_path(nx.DiGraph(kept), edge[1], edge[0])]:
        thinnest = min(circular, key=lambda edge: (edges[edge], edge))
        kept.remove(thinnest)
        against.append(thinnest)
    return kept, against


def rows(kept: list[tuple[str, str]]) -> dict[str, int]:
    """The row of every part, 0 at the bottom: one above the highest of those that it imports."""
    generations = nx.topological_generations(nx.DiGraph(kept).reverse())
    return {part: row for row, parts in enumerate(generations) for part in sorted(parts)}


def essential(kept: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports that follow from no others: the transitive reduction."""
    return sorted(nx.transitive_reduction(nx.DiGraph(kept)).edges)


def files_of(part: str) -> list[Path]:
    """The source files of a part."""
    if part == "csrc":
        return [path for path in sorted((ROOT / "csrc").iterdir()) if path.is_file()]
    return [path for module, path in modules().items() if part_of(module) == part]


def description(part: str) -> str:
    """The first sentence of the file that speaks for a part."""
    if part == "csrc":
        return CSRC
    path = ROOT / SPOKEN_FOR.get(part, f"{part.replace('.', '/')}/__init__.py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def size(part: str) -> str:
    """Files and lines of a part, in words."""
    files = files_of(part)
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in files)
    return f"{len(files)} files, {round(lines, -2):,} lines"


def title(part: str) -> str:
    """The folder of a part, as one would write it in a shell."""
    return "den/*.py" if part == "den" else f"{part.replace('.', '/')}/"


def table(edges: Edges) -> str:
    """The parts from top to bottom, what each holds and which parts it imports, in Markdown."""
    kept, against = without_circles(edges)
    row = rows(kept)
    lines = ["| part | holds | imports |", "|---|---|---|"]
    for part in sorted(row, key=lambda part: (-row[part], part)):
        used = sorted((below for above, below in edges if above == part), key=lambda below: (-row[below], below))
        names = ", ".join(f"**{title(u)}**" if (part, u) in against else title(u) for u in used)
        lines.append(f"| `{title(part)}` | {description(part)} | {names or 'nothing of ours'} |")
    if against:
        lines += ["", "In bold: imports against the order."]
    return "\n".join(lines)


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the table with the sources, write nothing")
    options: Any = parser.parse_args()
    edges, page = imports(), PAGE.read_text(encoding="utf-8")
    text = with_section(page, "parts", table(edges), "architecture: docs/architecture.md")
    if options.check:
        if text != page:
            print(f"{PAGE.name}: the table is not that of the sources; run scripts/architecture.py", file=sys.stderr)
        return int(text != page)
    PAGE.write_text(text, encoding="utf-8")
    sys.path.insert(0, str(Path(__file__).parent))
    from draw_parts import draw

    kept, against = without_circles(edges)
    words = {part: (title(part), description(part), size(part)) for part in rows(kept)}
    draw(rows(kept), essential(kept), against, words, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
