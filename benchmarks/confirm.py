"""Writes into the launch table what a result of gpu_suite.py has confirmed.

    python benchmarks/confirm.py benchmarks/results/nvidia-h200_2026-11-27.json

A line gets the rate of the causal sequence of 16,384 tokens, or "right" where it was held against
float64 and not timed. The two Triton passes of a backward are timed together. Then run the tests:
one holds the table against its text.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from ringattn.kernels import launch

PASSES = {
    ("triton", "forward"): ("forward",),
    ("triton", "backward"): ("backward_keys", "backward_queries"),
    ("gluon", "forward"): ("forward",),
    ("gluon", "backward"): ("backward",),
}
# Cases that no descriptor can read, or that have lines of their own.
VARIANTS = {"dilated": " pointers", "misaligned base": " pointers", "softcap": " softcap"}


def confirmed(found: dict) -> dict[tuple[str, str], str]:
    """{(pass with its bits and variant, head_dim): what was found}."""
    said = {}
    for row in found["correctness"]:
        d, dv = row["head_dim"].split("/")
        bits = "32" if row["dtype"] == "float32" else "16"
        kernel, variant = row["kernel"], VARIANTS.get(row["mask"], "")
        if kernel == "gluon" and variant == " pointers":  # the Triton kernels serve it
            kernel = "triton"
        for which in ("forward", "backward") if row["right"] else ():
            for name in PASSES[kernel, which]:
                key = f"{name} {bits} bit" + (" gluon" if kernel == "gluon" else variant)
                said[key, d if d == dv else f"{d}/{dv}"] = "right"
    for row in found["speed"]:
        if (row["mask"], row["tokens"], row["heads"]) != ("causal", 16384, "16"):
            continue
        for kernel in ("triton", "gluon"):
            names = PASSES[kernel, row["pass"]]
            rate = f"{row['tflops'][kernel][0]:.0f} TFLOP/s" + " (both)" * (len(names) > 1)
            for name in names:
                key = f"{name} 16 bit" + " gluon" * (kernel == "gluon")
                said[key, row["head_dim"]] = rate
    return said


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    device = found["device"].removeprefix("NVIDIA ").split()[0]
    raw = {arch: {name: dict(x) for name, x in old.items()} for arch, old in launch.table().items()}
    for (name, dims), what in confirmed(found).items():
        lines = raw["sm_90"].get(name, {})
        if dims in lines:
            text = f"{device} {found['date']}, {what}"
            lines[dims] = replace(lines[dims], measured=text)
    launch.FILE.write_text(launch.render(raw))


if __name__ == "__main__":
    main()
