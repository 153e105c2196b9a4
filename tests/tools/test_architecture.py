"""The picture of the parts: how imports are read and ordered, and that the page follows the sources."""

from den.support.tables import with_section
from scripts import architecture
from scripts.draw_parts import draw


def test_the_page_has_the_table_of_the_sources():
    page = architecture.PAGE.read_text(encoding="utf-8")
    text = with_section(page, "parts", architecture.table(architecture.imports()), "page")
    assert text == page, "run scripts/architecture.py"


def test_known_imports_are_found():
    edges = architecture.imports()
    assert edges["den.nn", "den_kernels"] > 5
    assert edges["den_kernels", "csrc"] == 1  # by name, through import_module
    assert not [edge for edge in edges if edge[0] == "den_kernels" and edge[1].startswith("den.")]
    assert not [edge for edge in edges if edge[0] == "den.support"]


def test_relative_imports_and_those_within_functions_count(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("from . import x\nfrom ..q import y\ndef f():\n    import a.q.y\n", encoding="utf-8")
    found = architecture.imported("a.b.c", path, {"a.b.x", "a.q", "a.q.y"})
    assert sorted(found) == ["a.b.x", "a.q.y", "a.q.y"]


def test_a_circle_is_broken_where_it_is_thinnest():
    edges = {("a", "b"): 5, ("b", "c"): 3, ("c", "a"): 1, ("a", "c"): 2}
    kept, against = architecture.without_circles(edges)
    assert against == [("c", "a")]
    assert architecture.rows(kept) == {"a": 2, "b": 1, "c": 0}
    assert architecture.essential(kept) == [("a", "b"), ("b", "c")]  # a -> c follows from them


def test_the_picture_is_drawn(tmp_path):
    row = {"den.a": 2, "den.b": 1, "csrc": 0, "den_kernels": 0}
    edges = [("den.a", "den.b"), ("den.b", "csrc"), ("den.a", "den_kernels")]  # the last passes a row
    draw(row, edges, [("den.b", "den.a")], {part: (part, "words " * 40, "1 file") for part in row}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
