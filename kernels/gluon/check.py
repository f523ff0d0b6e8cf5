"""Whether the Gluon kernels may be trusted here: with this Triton, on this GPU.

They use parts of Gluon that come and go between versions of Triton, and instructions that no
test without a GPU has run. So before the first use on a device they are compared with the Triton
kernels, on a small input.
"""

from __future__ import annotations

from functools import cache

import torch
from ringattn.kernels import Scores, triton
from ringattn.kernels.gluon import calls
from ringattn.kernels.launch import gluon_line
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ringattn.planning.runs import Run
from ringattn.planning.slices import Band, Bands

# Of Gluon and of its copy engine: what the kernels use and older versions lack.
_USED = {
    gl: ("atomic_poll", "atomic_xchg", "inline_asm_elementwise", "warp_specialize"),
    tma: ("async_load", "async_atomic_add", "store_wait"),
}
TOKENS = 601
LIMIT = 1e-2  # RMS of the difference over that of the value; bf16 rounds to 2e-3


def missing() -> list[str]:
    """What the kernels need of Gluon and this version of Triton lacks."""
    return [name for module, names in _USED.items() for name in names if not hasattr(module, name)]


@cache
def disagreement(device: torch.device, dtype: torch.dtype, head_dim: int, v_dim: int) -> str | None:
    """Where the kernels differ from Triton's, or how they failed; None: they agree. Two documents,
    of which the second has a window, so that there are tiles with and without a mask; two heads a
    group; a backward where there is a line for one."""
    tokens, heads, kv_heads = TOKENS, 4, 2
    random = torch.Generator(device).manual_seed(0)

    def draw(heads: int, size: int) -> torch.Tensor:
        x = torch.randn(1, tokens, heads, size, generator=random, device=device)
        return x.to(dtype)

    q, k, v, dout = (
        draw(heads, head_dim),
        draw(kv_heads, head_dim),
        draw(kv_heads, v_dim),
        draw(heads, v_dim),
    )
    half = tokens // 2
    first, second = Run(0, half), Run(half, tokens)
    bands = Bands([Band.make(first, first, -half, 0), Band.make(second, second, -half // 2, 0)])
    scores = Scores(head_dim**-0.5)
    arch = triton.architecture(device)
    forward, backward = (
        gluon_line(arch, name, head_dim, v_dim) for name in ("forward", "backward")
    )
    try:
        outs = []
        for line in (None, forward):
            out = torch.full_like(dout, torch.nan)
            lse = torch.full((1, heads, tokens), -torch.inf, device=device)
            inputs = (q, k, v, bands, None, out, lse, scores)
            triton.forward(*inputs) if line is None else calls.forward(line, *inputs).run()
            outs.append((out, lse))
        pairs = dict(zip(("out", "lse"), zip(*outs, strict=True), strict=True))
        if backward:
            prepared, grads = triton.prepare(dout, *outs[0]), []
            for line in (None, backward):
                dq = torch.zeros_like(q, dtype=torch.float32)
                dk, dv = (torch.full_like(x, torch.nan) for x in (k, v))
                outputs = (bands, dq, dk, dv, scores, True, False)
                if line is None:
                    triton.backward(dout, q, k, v, prepared, *outputs)
                else:
                    calls.backward(line, dout, q, k, v, *prepared, *outputs).run()
                grads.append((dq, dk, dv))
            pairs |= zip(("dq", "dk", "dv"), zip(*grads, strict=True), strict=True)
    except Exception as error:  # whatever a compiler or a driver raises: there is another kernel
        return f"failed with {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    for name, (want, got) in pairs.items():
        off = ((got.float() - want.float()).norm() / want.float().norm()).item()
        if not off <= LIMIT:
            return f"differ from the Triton kernels in {name} by {off:.1e}"
    return None
