"""Makes Markdown of what docstrings have besides: doctests and tables of the source become blocks of code.

mkdocs.yml loads it into mkdocstrings. Without it the lines of a doctest are quotations, and lists of numbers links.
"""

import re

import griffe

BLOCK = re.compile(r"(?:^(?:>>> |={3,}(?:  ={3,})*$).*(?:\n.+)*)", re.MULTILINE)  # up to the next empty line


def fenced(text: str) -> str:
    r"""A docstring with its doctests and tables in fences.

    >>> fenced("Adds.\n\n>>> 1 + 1\n2\n\nNothing else.").split("\n")
    ['Adds.', '', '```python', '>>> 1 + 1', '2', '```', '', 'Nothing else.']
    """
    return BLOCK.sub(lambda match: f"```{'' if match[0][0] == '=' else 'python'}\n{match[0]}\n```", text)


class DocstringBlocks(griffe.Extension):
    """Changes the docstring of every object that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Put the blocks of its docstring into fences."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
