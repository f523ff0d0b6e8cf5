"""What the compiler makes of the launch table: every kernel compiled without a GPU, and read.

A report is of one :class:`~ringattn.kernels.call.Call`, built by the code that launches, on tensors
without memory. Registers, stack and shared memory are ptxas's; the instructions come
from the disassembly of the cubin, with the tools that Triton's wheel carries.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from ringattn.kernels import Scores
from ringattn.kernels.call import Call
from ringattn.kernels.gluon.calls import backward as gluon_backward
from ringattn.kernels.gluon.calls import forward as gluon_forward
from ringattn.kernels.launch import Launch, gluon_line, launch, table
from ringattn.kernels.triton import calls
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ringattn.planning.runs import Run
from ringattn.planning.slices import Band, Bands

# Per architecture: target, shared memory of a program at most and of a multiprocessor, bytes; the
# matrix instruction that its products must be. CUDA programming guide 13, "compute capabilities".
# The lines of sm_80 also serve 8.6, 8.9 and 12.x, which give a program 99 KiB.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * 1024, 164 * 1024, "HMMA"),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024, 228 * 1024, "HGMMA"),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024, 228 * 1024, "UTCHMMA"),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024, 64 * 1024, "v_mfma"),
}
_REGISTERS, _WARPS = 65536, 64  # of an NVIDIA multiprocessor
_WAVES = 32  # of an AMD compute unit
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
}
_OUTSIDE = {"EXIT", "STG", "USETMAXREG"}  # not in an inner loop
# Warpgroups of a Gluon kernel that compute, over those that its line's warps make.
WARPGROUPS = {"forward": 2, "backward": 1}
# Kinds of instructions by the first letters of their names; the first that fits counts.
_KINDS = {
    "matrix": ("HGMMA", "HMMA", "UTCHMMA", "v_mfma"),
    "exp2": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSETP", "FCHK", "HFMA2", "HMUL2", "HADD2"),
    "convert": ("F2F",),
    "memory": ("LD", "ST", "UTMA", "UBLKCP", "RED", "ATOM", "UTCCP", "LDT", "STT"),
    "spill": ("LDL", "STL"),
}


@dataclass(frozen=True)
class Case:
    """One kernel to compile. ``adds``: on top of what its outputs hold; ``pointers``: without
    tensor descriptors though the architecture has them; ``engine``: triton or gluon, whose backward
    is one pass."""

    arch: str
    name: str
    dtype: torch.dtype
    head_dim: int
    v_dim: int
    adds: bool = False
    pointers: bool = False
    softcap: float = 0.0
    engine: str = "triton"

    @property
    def line(self) -> Launch | None:
        """The table's line; None where it has none for Gluon."""
        dims, capped = (self.head_dim, self.v_dim), self.softcap > 0
        if self.engine == "gluon":
            return gluon_line(self.arch, self.name, *dims, capped)
        size = torch.empty(0, dtype=self.dtype).element_size()
        return launch(self.arch, self.name, size, *dims, not self.pointers, capped)


def cases() -> Iterator[Case]:
    """Every line of the launch table that a GPU would compile, fresh and adding; and with softcap,
    where neither pointers nor float32 have taken the last registers already."""
    for arch in TARGETS:
        for key, lines in table().get(arch, {}).items():
            name, bits, _, *variant = key.split()
            if variant == ["softcap"]:
                continue
            dtype = torch.float32 if bits == "32" else torch.bfloat16
            engine = "gluon" if variant == ["gluon"] else "triton"
            pointers = variant == ["pointers"]
            for dims, line in lines.items():
                d, _, dv = dims.partition("/")
                for adds in (False, True):
                    size = (int(d), int(dv or d))
                    case = Case(arch, name, dtype, *size, adds, pointers, engine=engine)
                    yield case
                    if dtype != torch.float32 and not pointers and line.softcap:
                        yield replace(case, softcap=30.0)


def example(
    case: Case,
    line: Launch | None = None,
    device: str = "meta",
    tokens: int = 8192,
    heads: int = 8,
    kv_heads: int = 2,
) -> tuple[Call, list[torch.Tensor]]:
    """The launch of a case on one causal sequence, and what it writes; by default on tensors
    without memory, which is all that a compiler needs."""
    shapes = (
        (tokens, heads, case.head_dim),
        (tokens, kv_heads, case.head_dim),
        (tokens, kv_heads, case.v_dim),
        (tokens, heads, case.v_dim),
    )
    q, k, v, g = (torch.randn(1, *s, device=device).to(case.dtype) for s in shapes)
    run = Run(0, tokens - 1, 2) if case.pointers else Run(0, tokens)
    bands = Bands([Band.make(run, run, -tokens, 0)])
    scores = Scores(case.head_dim**-0.5, case.softcap)
    state = torch.float32 if case.adds else case.dtype
    lse = torch.full((1, heads, tokens), -torch.inf, device=device)
    if case.name == "forward":
        out = torch.zeros_like(g, dtype=state)
        partial = out if case.adds else None
        inputs = (q, k, v, bands, partial, out, lse, scores)
        if case.engine == "gluon":
            return gluon_forward(line or case.line, *inputs), [out, lse]
        return calls.forward(case.arch, *inputs, line), [out, lse]
    # lse of about the right size: the weights of a row add up to one.
    lse2 = torch.log2(torch.arange(tokens, device=device) + 1.0).expand(1, heads, -1).contiguous()
    delta = torch.zeros_like(lse2)
    if case.engine == "gluon":
        dq, *grads = (
            torch.zeros_like(q, dtype=torch.float32),
            *(torch.zeros_like(x, dtype=state) for x in (k, v)),
        )
        inputs = (g, q, k, v, lse2, delta, bands, dq, *grads, scores, True, case.adds)
        return gluon_backward(line or case.line, *inputs), [dq, *grads]
    inputs = (case.arch, g, q, k, v, lse2, delta, bands)
    if case.name == "backward_keys":
        grads = [torch.zeros_like(x, dtype=state) for x in (k, v)]
        call = calls.backward_keys(*inputs, *grads, scores, case.adds, line)
    else:
        grads = [torch.zeros_like(q, dtype=torch.float32)]
        call = calls.backward_queries(*inputs, *grads, scores, case.adds, line)
    return call, grads


def compiled(call: Call, target: GPUTarget) -> Any:
    """Triton's compiled kernel, with the types and hints that a launch would give it."""
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(call.kernel.params):
        name, value = parameter.name, call.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif parameter.do_not_specialize:
            signature[name] = _type(value)
        elif isinstance(value, tuple):
            signature[name] = tuple("constexpr" if _is_one(x) else _type(x) for x in value)
            for j, x in enumerate(value):
                if _is_one(x):
                    constants[(i, j)] = x
                elif _is_even(x):
                    hints[(i, j)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _type(value)
            if _is_even(value):
                hints[(i,)] = [["tt.divisibility", 16]]
    kind = GluonASTSource if call.kernel.is_gluon() else ASTSource
    source = kind(call.kernel, signature, constants, hints)
    return triton.compile(source, target, dict(call.options))


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _is_even(value: Any) -> bool:
    """What Triton calls divisible: integers by 16, and pointers to tensors as torch makes them."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if hasattr(value, "__mangle__"):  # Gluon's, with the layout in it
        return value.__mangle__()
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@dataclass(frozen=True)
class Report:
    """Of one kernel. ``matrix``: instructions by kind in the whole kernel; ``mix``: instructions
    by kind of the loop over unmasked tiles, per warp and turn, and ``needed`` what the algorithm
    takes at least; ``edge``: instructions of the loop over masked tiles, where the kernel has two;
    ``intensity``: operations per byte that this loop loads; ``serialized``: whether ptxas says that
    it waits after every product (C75xx)."""

    case: Case
    m: int
    n: int
    registers: int
    spill: int  # bytes of stack
    shared: int  # bytes
    shared_limit: int
    programs: int  # side by side on a multiprocessor
    occupancy: float  # warps of these over the most possible
    matrix: dict[str, int]
    wanted: str
    mix: dict[str, int]
    needed: dict[str, float]
    edge: int
    intensity: float
    serialized: bool = False
    measured: str = ""  # what a GPU has made of the line


def report(case: Case, line: Launch | None = None) -> Report:
    """Compiles one case, with the table's line or another, and reads the result. Raises what
    Triton raises."""
    target, limit, total, wanted = TARGETS[case.arch]
    call, _ = example(case, line)
    kernel = compiled(call, target)
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    registers, spill, code = _read(kernel) if target.backend == "cuda" else _read_amd(kernel)
    most = _WARPS if target.backend == "cuda" else _WAVES
    programs = _programs(registers, shared, warps, total, most)
    everything = Counter(_name(text) for _, text in code)
    kinds = {name: n for name, n in everything.items() if _kind(name) == "matrix"}
    full, edge = _inner(code)
    line = line or case.line
    lanes = 32 * (line.warps * WARPGROUPS[case.name] if case.engine == "gluon" else warps)
    dims, pairs = case.head_dim + case.v_dim, line.m * line.n
    # (operations of a tile, floats and conversions per pair)
    operations, floats, converts = {
        "forward": (2 * pairs * dims, 3.0, 0.5),
        "backward": (2 * pairs * (dims + case.v_dim + 2 * case.head_dim), 3.0, 1.0),
        "backward_keys": (4 * pairs * dims, 3.0, 1.0),
        "backward_queries": (2 * pairs * (dims + case.head_dim), 3.0, 0.5),
    }[case.name]
    scores = pairs / lanes
    needed = {"exp2": scores, "float": floats * scores, "convert": converts * scores}
    if case.name == "forward":  # the accumulator is scaled anew each turn
        needed["float"] += line.m * case.v_dim / lanes
    streamed = line.m if case.name == "backward" else line.n
    size = torch.empty(0, dtype=case.dtype).element_size()
    return Report(
        case=case,
        m=line.m,
        n=line.n,
        registers=registers,
        spill=spill,
        shared=shared,
        shared_limit=limit,
        programs=programs,
        occupancy=programs * warps / most,
        matrix=kinds,
        wanted=wanted,
        mix=dict(Counter(_kind(_name(text)) for text in full)),
        needed=needed,
        edge=edge,
        intensity=operations / (streamed * dims * size),
        serialized=case.engine == "gluon" and _serialized(kernel, case.arch),
        measured=line.measured,
    )


def _programs(registers: int, shared: int, warps: int, total: int, most: int) -> int:
    """How many programs fit on a multiprocessor side by side. A program takes 1 KiB of shared
    memory of its own; AMD's compute unit has four register files of 512 per lane."""
    rounded = max(8, -(-registers // 8) * 8)
    fit = _REGISTERS // (rounded * 32) if most == _WARPS else 4 * (512 // rounded)
    return min(fit // warps, total // (shared + 1024), most // warps, 32)


Code = list[tuple[int, str]]


def _read(kernel: Any) -> tuple[int, int, Code]:
    """(registers, bytes of stack, instructions with their addresses) of a cubin."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run(
                [tools / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    return registers, stack, [(int(address, 16), line) for address, line in lines]


def _read_amd(kernel: Any) -> tuple[int, int, Code]:
    """The same of an AMD kernel, as far as its assembly says it."""
    text = kernel.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    spill = 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    lines = re.findall(r"^\s+([sv]_\w+.*)$", text, re.MULTILINE)
    return registers, spill, list(enumerate(lines))


def _name(line: str) -> str:
    """The instruction's name without predicate and modifiers; AMD's have their shapes in it."""
    name = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]
    return "v_mfma" if name.startswith("v_mfma") else name


def _kind(name: str) -> str:
    if name in _KINDS["spill"]:
        return "spill"
    for kind, starts in _KINDS.items():
        if name.startswith(starts):
            return kind
    return "other"


def _inner(code: Code) -> tuple[list[str], int]:
    """(the loop over unmasked tiles, instructions of the one over masked tiles).

    Loops are the innermost ones with matrix instructions; a loop is what lies between a branch
    backwards and its target. A kernel has as many of one kind as of the other, the masked ones the
    longer, and of each the longest counts.
    """
    loops = []
    for address, line in code:
        back = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", line)
        if back and (start := int(back[1], 16)) < address:
            body = [text for at, text in code if start <= at <= address]
            names = {_name(text) for text in body}
            # A wait that spins out of line jumps back over everything: no loop.
            if any(_kind(name) == "matrix" for name in names) and not names & _OUTSIDE:
                loops.append((start, address, body))
    inner = [
        body
        for start, end, body in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e, _ in loops)
    ]
    inner.sort(key=len)
    half = max(1, len(inner) // 2)
    return (inner[:half] or [[]])[-1], len(inner[-1]) if len(inner) > 1 else 0


def _serialized(kernel: Any, arch: str) -> bool:
    """Whether ptxas, asked with Triton's options, says that it waits after every product."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    options = ["-v", "--regAllocOptLevel=2", f"--gpu-name={arch}a", "-o", "/dev/null"]
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [tools / "ptxas-blackwell", *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return bool(re.search(r"C75\d\d", done.stdout + done.stderr))
