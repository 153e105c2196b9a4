"""Tables of text as Markdown, CSV and LaTeX: the first column to the left, the others to the right; and their place in
a document."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

SPECIAL = {
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> str:
    """A table in Markdown, padded so that its source reads as a table, too; left: more columns aligned to the left."""
    columns = [(max(len(row[i]) for row in (head, *rows)), i == 0 or name in left) for i, name in enumerate(head)]

    def line(cells: Sequence[str]) -> str:
        aligned = zip(cells, columns, strict=True)
        return f"| {' | '.join(c.ljust(w) if is_left else c.rjust(w) for c, (w, is_left) in aligned)} |"

    rule = "|".join("-" * (w + 1) + ("-" if is_left else ":") for w, is_left in columns)
    return "\n".join([line(head), f"|{rule}|", *map(line, rows)])


def with_section(document: str, name: str, text: str, what: str) -> str:
    """Replace what stands between the markers of a section in a Markdown document.

    >>> with_section("Title <!-- t:begin --> old <!-- t:end --> rest", "t", "new", "page")
    'Title <!-- t:begin -->\\nnew\\n<!-- t:end --> rest'

    Args:
        name: of the section; its markers are `<!-- NAME:begin -->` and `<!-- NAME:end -->`.
        what: the document, for the message of an error.

    Raises:
        ValueError: a document without both markers, in this order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin_found, rest = document.partition(begin)
    _, end_found, after = rest.partition(end)
    if not (begin_found and end_found):
        raise ValueError(f"{what} must hold the lines {begin} and {end}, in this order")
    return f"{before}{begin}\n{text}\n{end}{after}"


def write_section(page: Path, name: str, text: str) -> None:
    """Write what stands between the markers of a section into a Markdown file: see `with_section`."""
    page.write_text(with_section(page.read_text(encoding="utf-8"), name, text, str(page)), encoding="utf-8")


def csv_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Comma-separated values with a line of names."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def latex_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A `tabular` with rules of booktabs."""
    lines = [" & ".join(map(latex_text, cells)) + r" \\" for cells in (head, *rows)]
    columns = "l" + "r" * (len(head) - 1)
    body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
    return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}\n"


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped: `latex_text("5 %") == r"5 \\%"`."""
    return re.sub("|".join(map(re.escape, SPECIAL)), lambda match: SPECIAL[match[0]], text)
