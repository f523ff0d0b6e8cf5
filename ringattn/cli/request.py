"""KEY=VALUE arguments: parsed, checked and made into masks, layouts and plans."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn.make import make_plan
from ringattn.planning import layouts, mask_text
from ringattn.planning.layouts import Layout
from ringattn.planning.masks import Mask
from ringattn.planning.plan import Plan
from ringattn.refusal import advice


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


def flag(text: str) -> bool:
    """true or false."""
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false")
    return text.lower() == "true"


def drawable(file: str) -> None:
    """Before anything is computed: a picture can be drawn and written. Raises RequestError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(f"--plot {advice('matplotlib')}")
    if Path(file).suffix.lower() not in _PICTURES:
        raise RequestError(f"--plot {file}: a file ending in {', '.join(_PICTURES)} is needed")
    if not Path(file).resolve().parent.is_dir():
        raise RequestError(f"--plot {file}: there is no folder {Path(file).resolve().parent}")
    writable("--plot", file)


def writable(key: str, path: str) -> None:
    """Before anything is computed: something can be written at the path. Raises RequestError."""
    try:
        parent = Path(path).expanduser().absolute().parent
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        # Only a real attempt tells: access bits say nothing of read-only or special file systems.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{key}={path} cannot be written: {reason}") from None


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
    pairs, options = flags_of(command, arguments, flags, "keys:\n" + "\n".join(lines))
    values = {name: key.default for name, key in keys.items()}
    seen: set[str] = set()
    for item in pairs:
        name, _, text = item.partition("=")
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


def flags_of(
    command: str,
    arguments: Sequence[str],
    flags: Callable[[argparse.ArgumentParser], None],
    epilog: str,
) -> tuple[list[str], argparse.Namespace]:
    """(the KEY=VALUE arguments, flags). Raises RequestError."""
    parser = argparse.ArgumentParser(
        prog=f"ringattn {command}",
        usage=f"ringattn {command} KEY=VALUE... [flags]",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("pairs", nargs="*", metavar="KEY=VALUE")
    flags(parser)
    try:
        options, unknown = parser.parse_known_intermixed_args(list(arguments))
    except argparse.ArgumentError as error:
        raise RequestError(str(error)) from None
    if unknown:
        raise RequestError(f"unknown flag {unknown[0]}; --help lists them")
    for item in options.pairs:
        if "=" not in item:
            raise RequestError(f"{item!r} is not KEY=VALUE")
    return options.pairs, options


def planned(values: dict[str, Any], world: int, tokens: int) -> Plan:
    """The plan that the keys of :data:`PLAN_KEYS` ask for; ``tokens`` where nothing says how many.

    Raises RequestError.
    """
    mask = mask_of(values["mask"], values["n"], tokens)
    try:
        layout = layout_of(values["layout"], mask, world, values["chunk"])
        keys = None if mask.n_q == mask.n_k else keys_of(values["layout"], mask, world)
    except (ValueError, OverflowError, MemoryError) as error:
        raise RequestError(str(error)) from None
    return plan_of(values, mask, layout, keys)


def plan_of(values: dict[str, Any], mask: Mask, layout: Layout, keys: Layout | None) -> Plan:
    """The plan of one mask as the keys ask for it. Raises RequestError."""
    try:
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


def layout_of(name: str, mask: Mask | list[Mask], world: int, chunk: int | None = None) -> Layout:
    """The layout of the queries, for one mask or those of all layers; ``chunk`` is for balanced
    only."""
    if name == "balanced":
        return layouts.balanced(mask, world, chunk)
    if chunk is not None:
        raise RequestError(f"chunk={chunk} means nothing for layout={name}; only for balanced")
    return layouts.build(name, mask, world)


def keys_of(name: str, mask: Mask, world: int) -> Layout:
    """The layout of the keys where they are not the queries' tokens."""
    build = layouts.BUILDERS.get(name, layouts.contiguous)
    return build(mask.n_k, world)


def mask_of(text: str, n: int | None, default: int) -> Mask:
    """The mask that ``text`` describes, of ``n`` tokens, or of ``default`` where it is None. Raises
    RequestError."""
    try:
        mask = mask_text.parse(text, default if n is None else n)
    except (ValueError, MemoryError) as error:
        raise RequestError(f"mask={text!r}: {error}") from None
    if n is not None and mask.n_q != n:
        raise RequestError(f"mask={text!r} has {mask.n_q} queries, but n={n}")
    return mask
