"""Every public name says what it takes and gives: shapes, dtypes, units, errors."""

import inspect
import re
import sys
from dataclasses import is_dataclass

import pytest

from .public import interface

PUBLIC = interface()
_REFERS = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")
# What the trainer calls, not the user: they are transformers' own methods, overridden.
OVERRIDES = ("ringattn.hf.SplitSequences.",)


def members(name, value):
    """(dotted name, function or class) of a public name and of its own public methods."""
    yield name, value
    if inspect.isclass(value):
        for own, method in vars(value).items():
            method = getattr(method, "__func__", getattr(method, "func", method))
            method = method.fget if isinstance(method, property) else method
            if not own.startswith("_") and inspect.isfunction(method):
                yield f"{name}.{own}", method


EVERY = [
    (dotted, member, value)
    for name, value in PUBLIC.items()
    for dotted, member in members(name, value)
    if not dotted.startswith(OVERRIDES)
]
IDS = [dotted for dotted, *_ in EVERY]


def said(member, owner, depth=2):
    """The docstring, those of its class and module, and of what it refers to."""
    module = sys.modules[owner.__module__]
    texts = [inspect.getdoc(x) or "" for x in (member, owner, module)]
    if depth:
        for name in _REFERS.findall(" ".join(texts)):
            last = name.rpartition(".")[2]
            other = next(
                (
                    x
                    for dotted, x in PUBLIC.items()
                    if dotted == name or dotted.endswith(f".{last}")
                ),
                None,
            )
            if other is not None and other is not owner:
                texts.append(said(other, other, depth - 1))
    return "\n".join(texts)


@pytest.mark.parametrize(("dotted", "member", "owner"), EVERY, ids=IDS)
def test_it_is_described(dotted, member, owner):
    own = inspect.getdoc(member)
    assert own, f"{dotted} has no docstring"
    text = said(member, owner)
    if inspect.isclass(member):
        wanted = [x for x in vars(member).get("__annotations__", {}) if not x.startswith("_")]
        parameters = []
        # A dataclass and a protocol have one that nobody wrote.
        made = is_dataclass(member) or getattr(member, "_is_protocol", False)
        if inspect.isfunction(vars(member).get("__init__")) and not made:
            parameters = list(inspect.signature(member).parameters.values())
            wanted += [p.name for p in parameters]
    else:
        parameters = list(inspect.signature(member).parameters.values())
        wanted = [p.name for p in parameters if p.name not in ("self", "cls", "arguments")]
    lacking = [name for name in wanted if not re.search(rf"\b{name}\b", text)]
    assert not lacking, f"{dotted} does not say what {lacking} are"
    given = " ".join(str(p.annotation) for p in parameters)
    if "Tensor" in given:
        assert re.search(r"\[[a-z .0-9*]+[,\]]", text), f"{dotted} gives no shapes"
    if not inspect.isclass(member) and re.search(r"^\s+raise \w", inspect.getsource(member), re.M):
        assert re.search(r"\bRaises?\b|Error|\brefused\b", text), (
            f"{dotted} does not say what it raises"
        )
