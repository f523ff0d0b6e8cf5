"""Masks as text: ``"documents & sliding_window(4096) | sinks(4)"``, for train.py and the command
line alike: calls of :mod:`ringattn.planning.masks` joined by ``&``, ``|`` and ``-``, nothing else.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from ringattn.planning import masks
from ringattn.planning.masks import Mask

_OPERATORS = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Sub: operator.sub,
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def parse(text: str, n: int, documents: Sequence[int] | None = None) -> Mask:
    """The mask that ``text`` describes, of ``n`` tokens.

    ``n`` stands for the number of tokens. What a builder takes first it is given where it is left
    out: ``n``, or the lengths of the ``documents`` in the sequence: ``causal``,
    ``sliding_window(512)``, ``documents``. Raises ValueError.
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Expression():
                return value(node.body)
            case ast.Constant(value=int() | None):
                return node.value
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
            case ast.List() | ast.Tuple():
                return [value(item) for item in node.elts]
            case ast.Name(id="n"):
                return n
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.Name():
                return built(node.id, [], {})
            case ast.Call(func=ast.Name()):
                _builder(node.func.id)
                keywords = {word.arg: value(word.value) for word in node.keywords}
                return built(node.func.id, [value(item) for item in node.args], keywords)
        raise ValueError("only calls of masks, n, integers, lists and & | - + * // are understood")

    def built(name: str, arguments: list[Any], keywords: dict[str, Any]) -> Mask:
        build = _builder(name)
        signature = inspect.signature(build)
        first = next(iter(signature.parameters))
        if first == "lengths" and not any(isinstance(x, list) for x in arguments):
            if documents is None:
                raise ValueError(f"{name} needs the lengths of documents, as {name}([100, 28])")
            arguments = [documents, *arguments]
        elif first in ("n", "n_q") and first not in keywords and not _binds(
            signature, arguments, keywords
        ):  # fmt: skip
            arguments = [n, *arguments]
        signature.bind(*arguments, **keywords)
        return build(*arguments, **keywords)

    try:
        mask = value(ast.parse(text, mode="eval"))
    except SyntaxError:
        raise ValueError("not an expression") from None
    except (TypeError, ArithmeticError) as error:
        raise ValueError(str(error)) from None
    if not isinstance(mask, Mask):
        raise ValueError("this is no mask")
    return mask


def _builder(name: str) -> Callable[..., Mask]:
    if name not in masks.BUILDERS:
        near = difflib.get_close_matches(name, masks.BUILDERS, 3, 0.5) or list(masks.BUILDERS)
        raise ValueError(f"unknown mask {name!r}; did you mean: {', '.join(near)}?")
    return masks.BUILDERS[name]


def _binds(signature: inspect.Signature, arguments: list[Any], keywords: dict[str, Any]) -> bool:
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True
