"""Mistakes that a Python file could hold: each changes one comparison, operation, constant, condition or statement."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor", "exp": "log"}
NAMES |= {"amax": "amin", "argmax": "argmin", "sorted": "list", "mean": "sum", "zeros": "ones", "append": "index"}


@dataclass(frozen=True)
class Mistake:
    """A mistake in words, and the whole file with it."""

    words: str
    text: str


def mistakes_of(source: str) -> list[Mistake]:
    """All mistakes that are known to be made in a Python file; not in messages, docstrings and annotations."""
    tree, made = ast.parse(source), []
    for statement, node in list(_walk(tree, tree)):
        for change, undo in _changes(node, statement):
            before = ast.unparse(statement).split("\n")[0]
            change()
            after = ast.unparse(statement).split("\n")[0]
            if before != after:
                made.append(Mistake(f"line {statement.lineno}: {_told(before, after)}", ast.unparse(tree)))
            undo()
    return made


def _told(before: str, after: str, around: int = 30) -> str:
    """Show the part that differs between two lines, and some characters around it."""
    first = _alike(before, after)
    same = _alike(before[:first:-1], after[:first:-1])
    begin = max(0, first - around)
    left, right = (line[begin : len(line) - same + around] for line in (before, after))
    return f"{left} -> {right}"


def _alike(a: str, b: str) -> int:
    """Count the characters that two strings begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# Fields that hold no code which runs in a test, or whose mistakes are found at import.
LEFT_OUT = {"annotation", "returns", "decorator_list", "bases"}
UNSEEN = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)


def _walk(node: ast.AST, statement: ast.AST) -> Iterator[tuple[ast.stmt, ast.AST]]:
    """The nodes in which a mistake counts, each with the statement that it belongs to."""
    for name, value in ast.iter_fields(node):
        if name in LEFT_OUT or (isinstance(node, ast.ClassDef) and name == "keywords"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, UNSEEN) or _is_docstring(child) or _is_typing(child):
                continue
            own = child if isinstance(child, ast.stmt) else statement
            if isinstance(own, ast.stmt):
                yield own, child
            yield from _walk(child, own)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


Change = tuple[Callable[[], None], Callable[[], None]]


def _set(node: ast.AST, name: str, value: object) -> Change:
    old = getattr(node, name)
    return lambda: setattr(node, name, value), lambda: setattr(node, name, old)


def _changes(node: ast.AST, statement: ast.stmt) -> Iterator[Change]:
    """The changes of one node, each with what undoes it."""
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPPED:
        yield _set(node, "op", SWAPPED[type(node.op)]())
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield _set(node, "ops", [*node.ops[:i], SWAPPED[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = node.value
        yield _set(node, "value", not value if isinstance(value, bool) else value + 1)
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield _set(node, "id", NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield _set(node, "attr", NAMES[node.attr])
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield _set(node, "test", ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Return) and node.value is not None:
        yield _set(node, "value", ast.Constant(None))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield _set(node, "value", ast.Constant(None))
    if isinstance(node, ast.Call) and len(node.args) == 2 and ast.unparse(node.func) not in ("isinstance", "getattr"):
        yield _set(node, "args", node.args[::-1])
