"""Docstrings name other things as Sphinx does, ``:func:`ringattn.make_plan```, and show code after
``>>>``; the site links the ones and sets the others as code.

An extension of Griffe, which reads the sources for mkdocstrings. What the site has no page of stays
code.
"""

import re

import griffe

_CODE = re.compile(r"(?:^(?:>>>|\.\.\.).*\n?)+", re.MULTILINE)
_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns roles into links that may lead nowhere."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            text = _CODE.sub(_fenced, obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda found: _link(found[1], obj), text)


def _fenced(found: re.Match[str]) -> str:
    """Lines after ``>>>`` as a block of Python, without the prompt."""
    lines = [line[4:] for line in found[0].splitlines()]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _link(name: str, inside: griffe.Object) -> str:
    """A name without a dot is of the same module, or of the same class."""
    scope = inside.path if inside.is_class else (inside.parent or inside).path
    identifier = name if "." in name else f"{scope}.{name}"
    return f'<autoref optional identifier="{identifier}"><code>{name}</code></autoref>'
