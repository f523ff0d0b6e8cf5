"""KEY=VALUE arguments: parsed, checked and made into masks, layouts and plans."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import inspect
import operator
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn import layouts, masks
from ringattn.layouts import Layout
from ringattn.masks import Mask
from ringattn.plan import Plan, make_plan


class RequestError(ValueError):
    """One line that names the argument, what was given and what is legal."""


@dataclass(frozen=True)
class Key:
    """One KEY of a command: how its text is read, its default and what --help says."""

    read: Callable[[str], Any]
    default: Any
    text: str


def count(text: str) -> int:
    """A positive integer; 64k is 64 * 1024, 1M is 1024 * 1024."""
    match = re.fullmatch(r"(\d{1,12})([kKM]?)", text)
    if not match or not int(match[1]):
        raise ValueError("an integer of at least 1, such as 4096, 64k or 1M")
    return int(match[1]) * {"": 1, "k": 2**10, "K": 2**10, "M": 2**20}[match[2]]


def integer(text: str) -> int:
    """Any integer."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("an integer") from None


def drawable(file: str) -> None:
    """Before anything is computed: a picture can be drawn and written. Raises RequestError."""
    folder = Path(file).resolve().parent
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install matplotlib")
    if not os.access(folder, os.W_OK) or Path(file).suffix.lower() not in _PICTURES:
        raise RequestError(
            f"--plot {file}: a file ending in {', '.join(_PICTURES)} in a folder that can be "
            "written is needed"
        )


def choice(*legal: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in legal:
            raise ValueError(f"one of: {', '.join(legal)}")
        return text

    return read


ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
_PICTURES = (".png", ".svg", ".pdf")

PLAN_KEYS = {
    "mask": Key(str, "causal", "such as causal or 'sliding_window(n, 512) | sinks(n, 4)'"),
    "n": Key(count, None, "tokens, where the mask does not say"),
    "layout": Key(choice(*layouts.NAMES), "zigzag", f"one of {', '.join(layouts.NAMES)}"),
    "chunk": Key(count, None, "tokens of a chunk, for layout=balanced"),
    "schedule": Key(str, "ring", "ring, double_ring, all_gather, direct, auto"),
    "ulysses": Key(count, None, "ranks that split the heads among them"),
    "node_size": Key(count, None, "neighbouring ranks with a fast link"),
    "heads": Key(count, 8, "query heads"),
    "kv_heads": Key(count, None, "K/V heads; by default as many"),
    "head_dim": Key(count, 64, "of q and k"),
    "v_dim": Key(count, None, "head_dim of v; by default the same"),
    "batch": Key(count, 1, "sequences"),
    "dtype": Key(choice(*ITEMSIZE), "bf16", f"of q, k and v: {', '.join(ITEMSIZE)}"),
}  # fmt: skip


def parse(
    command: str,
    keys: dict[str, Key],
    arguments: Sequence[str],
    flags: Callable[[argparse.ArgumentParser], None],
) -> tuple[dict[str, Any], argparse.Namespace]:
    """(value of every key, flags). Raises RequestError."""
    lines = [
        f"  {name:10s} {key.text}" + ("" if key.default is None else f" (default {key.default})")
        for name, key in keys.items()
    ]
    parser = argparse.ArgumentParser(
        prog=f"ringattn {command}",
        usage=f"ringattn {command} KEY=VALUE... [flags]",
        epilog="keys:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("given", nargs="*", metavar="KEY=VALUE")
    flags(parser)
    try:
        options, unknown = parser.parse_known_intermixed_args(list(arguments))
    except argparse.ArgumentError as error:
        raise RequestError(str(error)) from None
    if unknown:
        raise RequestError(f"unknown flag {unknown[0]}; --help lists them")
    values = {name: key.default for name, key in keys.items()}
    seen: set[str] = set()
    for item in options.given:
        name, equals, text = item.partition("=")
        if not equals:
            raise RequestError(f"{item!r} is not KEY=VALUE")
        if name in seen:
            raise RequestError(f"{name} is given twice")
        seen.add(name)
        if name not in keys:
            near = difflib.get_close_matches(name, keys, 3, 0.5) or list(keys)
            raise RequestError(f"unknown key {name!r}; did you mean: {', '.join(near)}?")
        try:
            values[name] = keys[name].read(text)
        except ValueError as error:
            raise RequestError(f"{name} must be {error}; got {text!r}") from None
    return values, options


def planned(values: dict[str, Any], world: int, tokens: int) -> Plan:
    """The plan that the keys of :data:`PLAN_KEYS` ask for; ``tokens`` where nothing says how many.

    Raises RequestError.
    """
    mask = mask_of(values["mask"], values["n"], tokens)
    try:
        layout = layout_of(values["layout"], mask, world, values["chunk"])
        keys = None if mask.n_q == mask.n_k else keys_of(values["layout"], mask, world)
        return make_plan(
            mask,
            layout,
            values["schedule"],
            values["ulysses"],
            key_layout=keys,
            node_size=values["node_size"],
            heads=values["heads"],
            kv_heads=values["kv_heads"],
            head_dim=values["head_dim"],
            v_dim=values["v_dim"],
            itemsize=ITEMSIZE[values["dtype"]],
        )
    except (ValueError, OverflowError, MemoryError) as error:
        raise RequestError(str(error)) from None


def layout_of(name: str, mask: Mask, world: int, chunk: int | None = None) -> Layout:
    """The layout of the queries; ``chunk`` is for balanced only."""
    if name == "balanced":
        return layouts.balanced(mask, world, chunk)
    if chunk is not None:
        raise RequestError(f"chunk={chunk} means nothing for layout={name}; only for balanced")
    return layouts.build(name, mask, world)


def keys_of(name: str, mask: Mask, world: int) -> Layout:
    """The layout of the keys where they are not the queries' tokens."""
    build = layouts.BUILDERS.get(name, layouts.contiguous)
    return build(mask.n_k, world)


_OPERATORS = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Sub: operator.sub,
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def mask_of(text: str, n: int | None, default: int) -> Mask:
    """The mask that ``text`` describes: calls of :mod:`ringattn.masks` joined by ``&``, ``|`` and
    ``-``. ``n`` stands for the number of tokens (``default`` where it is None); a bare name such as
    ``causal`` is given it.

    Nothing else is evaluated. Raises RequestError.
    """
    tokens = default if n is None else n

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
                return tokens
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.Name():
                return builder(node.id)(tokens)
            case ast.Call(func=ast.Name()):
                build = builder(node.func.id)
                keywords = {word.arg: value(word.value) for word in node.keywords}
                arguments = [value(item) for item in node.args]
                inspect.signature(build).bind(*arguments, **keywords)
                return build(*arguments, **keywords)
        raise ValueError("only calls of masks, n, integers, lists and & | - + * // are understood")

    def builder(name: str) -> Callable[..., Mask]:
        if name not in masks.BUILDERS:
            near = difflib.get_close_matches(name, masks.BUILDERS, 3, 0.5) or list(masks.BUILDERS)
            raise ValueError(f"unknown mask {name!r}; did you mean: {', '.join(near)}?")
        return masks.BUILDERS[name]

    try:
        mask = value(ast.parse(text, mode="eval"))
        if not isinstance(mask, Mask):
            raise ValueError("this is no mask")
    except SyntaxError:
        raise RequestError(f"mask={text!r}: not an expression") from None
    except (ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise RequestError(f"mask={text!r}: {error}") from None
    if n is not None and mask.n_q != n:
        raise RequestError(f"mask={text!r} has {mask.n_q} queries, but n={n}")
    return mask
