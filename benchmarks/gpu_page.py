"""What gpu_suite.py found, as a page for people."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

WHO = ("gluon", "triton", "flash", "cudnn", "flex")


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def profiles(lines: list[str]) -> str:
    """ncu's rows of (launch, ..., kernel, ..., grid, ..., metric, unit, value), a line a launch."""
    launches: dict[str, dict[str, str]] = {}
    for number, *_, name, unit, value in csv.reader(lines):
        launches.setdefault(number, {})[f"{name} ({unit})"] = value
    kernels = {number: kernel for number, _, _, _, kernel, *_ in csv.reader(lines)}
    metrics = sorted({name for each in launches.values() for name in each})
    rows = [[name, *(each.get(name, "") for each in launches.values())] for name in metrics]
    return table(["metric", *kernels.values()], rows)


def markdown(found: dict) -> str:
    """The result for people."""
    top = found.get("peak_tflops", float("nan"))
    text = (
        f"# {found['device']}, {found['date']}\n\ntorch {found['torch']}, Triton "
        f"{found['triton']}, CUDA {found['cuda']}, commit {found['commit'] or 'unknown'}. Made by "
        "`benchmarks/gpu_suite.py`, which states the conventions. Matrix peak in this run: "
        f"{top:.0f} TFLOP/s.\n"
    )
    if found["rehearsal"]:
        text += "\nA rehearsal on a CPU: no number here means anything.\n"
    cases = found.get("correctness", [])
    wrong = [row for row in cases if not row["right"]]
    text += f"\n## Correctness\n\n{len(cases)} cases, {len(wrong)} wrong"
    text += "".join(f"; {row['kernel']}: {row['mask']} {row['head_dim']}" for row in wrong)
    for kernel, row in found.get("first", {}).items():
        text += (
            f". {kernel} at 16k: {'right' if row['right'] else 'WRONG'}, 20 times the same bits: "
        )
        text += "yes" if row["same"] else "NO"
    text += ". Largest error (RMS over RMS of float64):\n\n"
    kinds = sorted({(row["kernel"], row["dtype"]) for row in cases})
    names = ("out", "dq", "dk", "dv")
    rows = []
    for kind in kinds:
        own = [row["errors"] for row in cases if (row["kernel"], row["dtype"]) == kind]
        rows.append([*kind, *(f"{max(errors[x] for errors in own):.1e}" for x in names)])
    text += table(["kernel", "dtype", *names], rows)
    text += "\n## Speed\n\nTFLOP/s, median (smallest-largest).\n\n"
    rows = []
    for row in found.get("speed", []):
        cells = [
            f"{rate[0]:.0f} ({rate[1]:.0f}-{rate[2]:.0f})" if rate else ""
            for rate in (row["tflops"].get(name) for name in WHO)
        ]
        first = [row["pass"], row["mask"], str(row["tokens"]), row["heads"], row["head_dim"]]
        rows.append([*first, *cells])
    text += table(["pass", "mask", "tokens", "heads", "head_dim", *WHO], rows)
    text += "\n## Rings\n\nAll kernels of all ranks, over one call on the whole sequence.\n\n"
    text += table(
        ["kernel", "mask", "ranks", "tokens", "forward", "backward"],
        [
            [r["kernel"], r["mask"], *(str(r[x]) for x in ("ranks", "tokens"))]
            + [f"{r[x]:.3f}" for x in ("forward", "backward")]
            for r in found.get("rings", [])
        ],
    )
    text += "\n## Host\n\nMicroseconds until a call is enqueued.\n\n"
    text += table(["call", "us"], [[k, f"{v:.0f}"] for k, v in found.get("host", {}).items()])
    if "sanitizer" in found:
        text += "\n## compute-sanitizer\n\n" + "; ".join(found["sanitizer"]) + "\n"
    if "ncu" in found:
        text += "\n## Nsight Compute\n\n" + profiles(found["ncu"])
    text += "\n## Real ranks on this one GPU\n\n"
    text += table(
        ["ranks", "schedule", "backend", "verdict"],
        [
            [str(r["ranks"]), r["schedule"], r["backend"], "passed" if r["passed"] else "FAILED"]
            for r in found.get("ranks", [])
        ],
    )
    if found.get("states"):
        text += (
            "\n## Mixers with a state\n\nFloat32 over two ranks beside float64, the same bits a "
        )
        text += "second time; and forward and backward of a layer on one rank.\n\n"
        rows = [
            [row["mixer"], f"{row['error']:.0e}", "yes" if row["same"] else "NO",
             f"{row['tokens']:,}", f"{row['ms']:.1f}",
             *(format(row[x], how) if x in row else ""
               for x, how in (("fla error", ".0e"), ("fla same", ""), ("fla ms", ".1f")))]
            for row in found["states"]
        ]  # fmt: skip
        titles = ["mixer", "off by", "repeats", "tokens", "ms", "fla off by", "repeats", "ms"]
        text += table(titles, rows)
    if found["not_run"]:
        text += "\nNot run: " + "; ".join(dict.fromkeys(found["not_run"])) + ".\n"
    return text


if __name__ == "__main__":  # python benchmarks/gpu_page.py RESULT.json ...: the pages again
    for file in map(Path, sys.argv[1:]):
        file.with_suffix(".md").write_text(markdown(json.loads(file.read_text())))
