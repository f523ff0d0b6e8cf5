"""``ringattn kernels``: the launch table compiled without a GPU, and read; or tuned on one."""

from __future__ import annotations

import json
import multiprocessing
import os
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ringattn.cli.request import Key, RequestError, choice, count, parse
from ringattn.cli.tables import wide_console

if TYPE_CHECKING:  # machines ask for --json, and may have no rich
    from rich.table import Table

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
PASSES = ("forward", "backward", "backward_keys", "backward_queries")


def _split(text: str) -> list[str]:
    return text.split(",")


def several(*legal: str) -> Callable[[str], list[str]]:
    """One or more of the legal words, with commas between."""

    def read(text: str) -> list[str]:
        if not set(_split(text)) <= set(legal):
            raise ValueError(f"one or more of {', '.join(legal)}, with commas between")
        return _split(text)

    return read


KEYS = {
    "arch": Key(several(*ARCHS), None, f"{', '.join(ARCHS)}; all of NVIDIA's unless given"),
    "pass": Key(several(*PASSES), None, f"{', '.join(PASSES)}; all unless given"),
    "head_dim": Key(_split, None, "of the table, or head_dim/v_dim; all unless given"),
    "bits": Key(choice("16", "32"), None, "of the inputs: 16, 32; both unless given"),
    "adds": Key(choice("yes", "no"), None, "on top of a running sum, or not; both unless given"),
    "softcap": Key(choice("yes", "no"), None, "with it, or without; both unless given"),
    "pointers": Key(choice("yes", "no"), None, "where no descriptor reads; both unless given"),
    "engine": Key(choice("triton", "gluon"), None, "triton, gluon; both unless given"),
    "processes": Key(count, None, "that compile; one per core unless given"),
}  # fmt: skip
# The bars: at these head_dims nothing may spill, and half-precision products must all be the
# architecture's fastest matrix instruction.
SPILL_FREE = 128
# Instructions of a warp in one turn of the Gluon loops at head_dim 128, without and with a mask; of
# FlashAttention-4's count for the same tile, and some more.
MOST = {"forward": (490, 720), "backward": (430, 640)}


def _flags(parser: ArgumentParser) -> None:
    parser.add_argument("--mix", action="store_true", help="instructions of the inner loops")
    parser.add_argument("--tune", action="store_true", help="search on this GPU; writes the table")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: Sequence[str]) -> int:
    """The command; 1 if a kernel misses a bar."""
    values, options = parse("kernels", KEYS, arguments, _flags)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RequestError("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    try:
        from ringattn.kernels import report
    except ModuleNotFoundError as error:
        raise RequestError(f"needs the package {error.name}, which is not installed") from None
    cases = [case for case in report.cases() if _chosen(case, values)]
    if not cases:
        sizes = sorted({_dims(case) for case in report.cases()}, key=lambda d: int(d.split("/")[0]))
        raise RequestError(f"no line of the launch table is so; head_dims: {', '.join(sizes)}")
    if options.tune:
        return _tune(cases)
    with ProcessPoolExecutor(
        values["processes"] or os.cpu_count(), multiprocessing.get_context("spawn")
    ) as pool:
        reports = list(pool.map(report.report, cases))
    facts = [_facts(each) for each in reports]
    if options.json:
        print(json.dumps(facts))
    else:
        (_print_mix if options.mix else _print)(facts)
    return int(any(fact["misses"] for fact in facts))


def _dims(case: Any) -> str:
    return f"{case.head_dim}/{case.v_dim}" if case.v_dim != case.head_dim else f"{case.head_dim}"


def _chosen(case: Any, values: dict[str, Any]) -> bool:
    truth = {"yes": True, "no": False, None: None}
    lists = (
        (values["arch"] or [arch for arch in ARCHS if arch.startswith("sm_")], case.arch),
        (values["pass"], case.name),
        (values["head_dim"], _dims(case)),
        (values["engine"] and [values["engine"]], case.engine),
    )
    exact = (
        (values["bits"], str(8 * case.dtype.itemsize)),
        (truth[values["adds"]], case.adds),
        (truth[values["pointers"]], case.pointers),
        (truth[values["softcap"]], case.softcap > 0),
    )
    return all(some is None or have in some for some, have in lists) and all(
        want is None or want == have for want, have in exact
    )


def _facts(report: Any) -> dict[str, Any]:
    facts = asdict(report)
    case = facts.pop("case")
    case["dtype"] = str(case["dtype"]).removeprefix("torch.")
    misses = []
    if report.spill and max(report.case.head_dim, report.case.v_dim) <= SPILL_FREE:
        misses.append(f"spills {report.spill} bytes")
    if report.shared > report.shared_limit:
        misses.append(f"{report.shared} bytes of shared memory, {report.shared_limit} is the limit")
    if case["dtype"] != "float32" and set(report.matrix) != {report.wanted}:
        misses.append(f"products are {', '.join(report.matrix) or 'none'}, not {report.wanted}")
    if report.serialized:
        misses.append("ptxas serializes the products")
    if (
        case["engine"] == "gluon"
        and case["head_dim"] == case["v_dim"] == 128
        and not case["softcap"]
    ):
        for what, count, most in zip(
            ("", "masked "),
            (sum(report.mix.values()), report.edge),
            MOST[case["name"]],
            strict=True,
        ):
            if not 0 < count <= most:
                misses.append(f"{count} instructions a {what}turn, {most} is the limit")
    return case | facts | {"misses": misses}


def _title(fact: dict[str, Any]) -> tuple[str, ...]:
    d, dv = fact["head_dim"], fact["v_dim"]
    dims = f"{d}" if d == dv else f"{d}/{dv}"
    words = [word for word in ("adds", "pointers", "softcap") if fact[word]]
    how = " ".join([fact["engine"]] * (fact["engine"] == "gluon") + words)
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[fact["dtype"]]
    return fact["arch"], fact["name"], short, dims, how


def _table(titles: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for title in ("arch", "pass", "dtype", "head_dim", "variant"):
        table.add_column(title, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def _print(facts: list[dict[str, Any]]) -> None:
    console = wide_console()
    table = _table(("tile", "regs", "spill", "shared", "matrix", "warps", "FLOP/B", ""))
    for fact in facts:
        matrix = ", ".join(f"{n} {kind}" for kind, n in fact["matrix"].items()) or "none"
        table.add_row(
            *_title(fact),
            f"{fact['m']}x{fact['n']}",
            str(fact["registers"]),
            str(fact["spill"]),
            f"{fact['shared'] / 1024:.0f}/{fact['shared_limit'] / 1024:.0f}",
            matrix,
            f"{fact['occupancy']:.0%}",
            f"{fact['intensity']:.0f}",
            "[red]" + "; ".join(fact["misses"]) + "[/red]"
            if fact["misses"]
            else fact["measured"] or "ok",
        )
    console.print(table)
    console.print(
        "spill: bytes of stack. shared: KiB, of the most a program may have. matrix: instructions "
        "in the whole kernel. warps: those of the programs that fit on a multiprocessor, over its "
        "most. FLOP/B: operations of the inner loop per byte it loads. Last: ok, or what a GPU has "
        "confirmed."
    )


def _print_mix(facts: list[dict[str, Any]]) -> None:
    console = wide_console()
    kinds = ("matrix", "exp2", "float", "convert", "memory", "spill", "other")
    table = _table((*kinds, "all", "needed"))
    for fact in facts:
        mix, needed = fact["mix"], fact["needed"]
        cells = [
            f"{mix.get(kind, 0)}" + (f" of {needed[kind]:.0f}" if kind in needed else "")
            for kind in kinds
        ]
        least = sum(needed.values()) + mix.get("matrix", 0)
        table.add_row(*_title(fact), *cells, str(sum(mix.values())), f"{least:.0f}")
    console.print(table)
    console.print(
        "Instructions of a warp in one turn of the loop over unmasked tiles. 'of N': what the "
        "algorithm takes at least (sm_100 has floats by twos); needed: all of that, and the matrix "
        "instructions."
    )


def _tune(cases: list[Any]) -> int:
    import torch

    from ringattn.kernels import launch, tune
    from ringattn.kernels.triton import architecture

    if not torch.cuda.is_available():
        raise RequestError("--tune needs a GPU, and torch sees none here")
    arch = architecture(torch.device("cuda"))
    table = {a: {p: dict(lines) for p, lines in ps.items()} for a, ps in launch.table().items()}
    for case in cases:
        if case.arch == arch and not case.adds and not case.softcap:
            key = f"{case.name} {8 * case.dtype.itemsize} bit" + " pointers" * case.pointers
            key += " gluon" * (case.engine == "gluon")
            now = table[arch][key][_dims(case)]
            table[arch][key][_dims(case)] = tune.tune(case, now, tune.measured, print)
            launch.FILE.write_text(launch.render(table))  # what follows may fail
    print(f"written: {launch.FILE}; compile it all with `ringattn kernels`, then commit it")
    return 0
