"""Mixers with flash-linear-attention's kernels, in Triton's interpreter, beside the recurrence in
float64: every kind of decay and rule, states that go through a segment, documents, first states."""

import builtins
import gc
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(sys.prefix, "fla")))  # where make setup puts it
import torch
import torch.distributed as dist
from triton.runtime.autotuner import Autotuner

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ringattn as ra
from ringattn.execution.carriers import end_distributed
from ringattn.mixers import delta, linear, naive
from ringattn.mixers import fla as ours
from ringattn.planning.segments import Segments

HEADS, DK, DV, BATCH = 2, 16, 32, 2


class Number(int):
    """A loop's variable, which is no tensor in the interpreter, and which kernels convert."""

    def to(self, dtype):
        return self


def numbers(*bounds):
    return map(Number, builtins.range(*(int(x) for x in bounds)))


def prepare():
    """Nothing to tune, and loops as above."""
    for x in gc.get_objects():
        if issubclass(type(x), Autotuner):
            x.configs = x.configs[:1]
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = numbers


def main():
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank, world = dist.get_rank(), dist.get_world_size()
    for rule in (False, True):
        for vectors in (False, True):
            ours._function(rule, vectors)
    prepare()
    ours.runs = lambda v, dk: True  # in float32, since the interpreter has no products of bfloat16
    ours.prove = lambda *_: None  # in bfloat16
    calls, function = [], ours._function
    ours._function = lambda *kind: calls.append(kind) or function(*kind)
    lengths = [9, 60, 3]  # a state goes through whole segments
    layout = ra.layouts.zigzag(sum(lengths), world)
    segments = Segments(layout, lengths)
    for mixer in (linear, delta):
        for decay in ("none", "scalar", "vector"):
            case(mixer, decay, layout, lengths, segments, rank)
    assert set(calls) == {(a, b) for a in (False, True) for b in (False, True)}, calls
    end_distributed()


def case(mixer, decay, layout, lengths, segments, rank):
    n, draw = layout.n, torch.Generator().manual_seed(layout.n)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    inputs = {"q": normal(BATCH, n, HEADS, DK), "v": normal(BATCH, n, HEADS, DV)}
    inputs["k"] = torch.nn.functional.normalize(normal(BATCH, n, HEADS, DK), dim=-1)
    inputs["initial"] = normal(HEADS, DK, DV)
    shape = (BATCH, n, HEADS) + (DK,) * (decay == "vector")
    if decay != "none":
        inputs["decay"] = -0.1 * torch.rand(*shape, generator=draw, dtype=torch.float64)
    if mixer is delta:
        inputs["beta"] = torch.rand(BATCH, n, HEADS, generator=draw, dtype=torch.float64)
    whole = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    want = naive.recurrence(
        0.7 * whole["q"], whole["k"], whole["v"], whole.get("decay"), whole.get("beta"),
        whole["initial"], lengths,
    )  # fmt: skip
    d_out = normal(*want.shape)
    want.backward(d_out)
    own = {
        name: (x if name == "initial" else layout.shard(x, rank))
        .float().clone().requires_grad_()
        for name, x in inputs.items()
    }  # fmt: skip
    out = mixer(**own, segments=segments, scale=0.7)
    out.backward(layout.shard(d_out, rank).float())
    dist.all_reduce(own["initial"].grad)
    pairs = {"out": (out.detach(), layout.shard(want.detach(), rank))}
    for name, x in whole.items():
        wanted = x.grad if name == "initial" else layout.shard(x.grad, rank)
        pairs[name] = (own[name].grad, wanted)
    errors = {
        name: float((got.double() - wanted).norm() / wanted.norm())
        for name, (got, wanted) in pairs.items()
    }
    print(mixer.__name__, decay, lengths, {name: f"{e:.1e}" for name, e in errors.items()})
    assert max(errors.values()) < 1e-5, (mixer, decay, lengths, errors)


if __name__ == "__main__":
    main()
