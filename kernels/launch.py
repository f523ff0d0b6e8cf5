"""The pinned launch table: which engine serves what, and how its kernels are cut and compiled.

Keys are an architecture, a pass with the width of inputs, and a head_dim. Passes of the Gluon
kernels end in "gluon": where there is such a line, kernel="auto" takes it, and the Triton line
beside it is what it falls back to.

Nothing is tuned while ranks run: two ranks that choose differently give different bits, and a
launch that nobody has compiled before may spill. ``ringattn kernels`` compiles every line of
launch.json and shows what became of it; docs/kernels.md says how to find better lines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("launch.json")


@dataclass(frozen=True)
class Launch:
    """``m`` rows and ``n`` columns a tile, warps and pipeline stages of a program.

    ``tma``: columns come through tensor descriptors; ``overlap``: the scores of the next tile are
    computed during the softmax of this one; ``specialize``: loads and products get warps of their
    own. ``precision`` of float32 products: three TF32 products come within rounding of IEEE.
    ``writers``: warps that add to dq (Gluon's backward). ``softcap``: whether the line serves that
    too. ``measured``: the GPU that has confirmed the line, when, and what it reached.
    """

    m: int
    n: int
    warps: int
    stages: int
    tma: bool = False
    overlap: bool = False
    specialize: bool = False
    precision: str = "tf32x3"
    writers: int = 1
    softcap: bool = True
    measured: str = ""


@cache
def table() -> dict[str, dict[str, dict[str, Launch]]]:
    """``table()[architecture][pass and bits][head_dim]``, as in launch.json."""
    raw = json.loads(FILE.read_text())
    return {
        arch: {
            name: {dims: Launch(**line) for dims, line in lines.items()}
            for name, lines in passes.items()
        }
        for arch, passes in raw.items()
    }


def launch(
    arch: str,
    name: str,
    itemsize: int,
    head_dim: int,
    v_dim: int,
    dense: bool,
    softcap: bool = False,
) -> Launch:
    """The line for a pass: of this "head_dim/v_dim" if there is one, else of the next listed size.

    ``dense``: whether descriptors can read the tensors; if not, a line that needs none, where the
    architecture has one. ``softcap`` takes registers: a line of its own, where there is one.
    """
    key = f"{name} {8 * itemsize} bit"
    passes = table()[arch]
    if not dense and f"{key} pointers" in passes:
        key = f"{key} pointers"
    lines = passes[key]
    dims = f"{head_dim}/{v_dim}"
    if dims not in lines:
        large = (d for d in lines if d.isdigit() and int(d) >= max(head_dim, v_dim))
        dims = min(large, key=int)
    special = passes.get(f"{key} softcap", {}) if softcap else {}
    return special.get(dims, lines[dims])


@cache
def gluon_line(
    arch: str, name: str, head_dim: int, v_dim: int, softcap: bool = False
) -> Launch | None:
    """The Gluon line for a pass ("forward" or "backward"), chosen like Triton's; None: there is
    none, and Triton serves it."""
    lines = table().get(arch, {}).get(f"{name} 16 bit gluon", {})
    line = lines.get(f"{head_dim}/{v_dim}")
    if line is None:
        large = [d for d in lines if d.isdigit() and int(d) >= max(head_dim, v_dim)]
        line = lines[min(large, key=int)] if large else None
    return None if line is None or (softcap and not line.softcap) else line


def render(raw: dict[str, dict[str, dict[str, Launch]]]) -> str:
    """A table as the text of launch.json: one line per head_dim, defaults left out."""
    plain = {field.name: field.default for field in fields(Launch)}
    blocks = []
    for arch, passes in raw.items():
        parts = []
        for name, lines in passes.items():
            rows = []
            for dims in sorted(lines, key=lambda d: [int(x) for x in d.split("/")]):
                line = {k: v for k, v in asdict(lines[dims]).items() if v != plain[k]}
                rows.append(f'      "{dims}": {json.dumps(line)}')
            parts.append(f'    "{name}": {{\n' + ",\n".join(rows) + "\n    }")
        blocks.append(f'  "{arch}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
