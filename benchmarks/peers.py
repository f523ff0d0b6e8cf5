"""ringattn beside its peers: forward + backward of exact causal attention on two CPU cores.

    make bench          (sets up .venv-bench with the extra `bench` and runs this)

float32, one sequence, 8 heads of 64. Every contender keeps its own processes: 2 ranks x 1 thread
over gloo, or what its name says. Each result (out, dq, dk, dv) is compared with float64 first, and
marked if it is wrong; then every round times each contender once while the others sleep. Medians
(smallest-largest); the ratio is the median over rounds of its time over ringattn's. In the rows
"16 documents" a packed batch of equal documents is computed, and the ratio is time / (ringattn's
causal time x ratio of the areas).
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEADS, DIM = 8, 64
OUT = ("out", "dq", "dk", "dv")


# --- what a contender's process does: returns (call, positions of its tokens) for a length ---


def whole_inputs(n):
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, HEADS, DIM, generator=generator) for _ in range(4)]


def differentiated(attend, n, positions):
    """A call that gives (out, dq, dk, dv) of the tokens at ``positions``."""
    import torch

    *own, dout = (x[:, positions].contiguous() for x in whole_inputs(n))
    own = [x.requires_grad_() for x in own]

    def call():
        out = attend(*own)
        return [out.detach(), *torch.autograd.grad(out, own, dout)]

    return call, positions


def sdpa(n, rank):
    import torch

    torch.set_num_threads(2)
    return differentiated(heads_first_sdpa, n, torch.arange(n))


def sdpa_documents(n, rank):
    """Documents as a batch: what SDPA can do only because they are equal."""
    import torch

    def attend(*qkv):
        parts = (x.reshape(16, n // 16, HEADS, DIM) for x in qkv)
        return heads_first_sdpa(*parts).reshape(1, n, HEADS, DIM)

    torch.set_num_threads(2)
    return differentiated(attend, n, torch.arange(n))


def heads_first_sdpa(q, k, v, *_, **__):
    import torch

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True).transpose(1, 2)


def ringattn(n, rank, documents=1, schedule="ring"):
    import torch

    import ringattn as ra

    mask = ra.masks.documents([n // documents] * documents)
    layout = ra.layouts.balanced(mask, 2) if documents > 1 else ra.layouts.zigzag(n, 2)
    plan = ra.make_plan(mask, layout, schedule)
    positions = torch.from_numpy(layout.positions(rank))
    return differentiated(lambda q, k, v: ra.ring_attention(q, k, v, plan), n, positions)


def contiguous(n, rank):
    import torch

    return torch.arange(rank * n // 2, (rank + 1) * n // 2)


def deepspeed_ulysses(n, rank):
    import torch.distributed as dist
    from deepspeed.sequence.layer import DistributedAttention

    layer = DistributedAttention(heads_first_sdpa, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return differentiated(lambda q, k, v: layer(q, k, v, 0), n, contiguous(n, rank))


def ring_attention_pytorch(n, rank, bucket=1024):
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    def attend(q, k, v):
        return ring_flash_attn(
            q, k, v, causal=True, bucket_size=bucket, ring_reduce_col=True, ring_size=2
        )

    return differentiated(attend, n, contiguous(n, rank))


def ringmaster(n, rank):
    import torch.distributed as dist
    from ringmaster.ring.p2p_attn import ring_p2p_attention

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ring_p2p_attention(q, k, v, group=dist.group.WORLD, causal=True, scaling=None)

    return differentiated(attend, n, contiguous(n, rank))


def jax_ringattention(n, rank, chunk=1024):
    import jax
    import jax.extend
    import numpy as np
    from jax.sharding import PartitionSpec

    # Version 0.1.2 asks for a name that newer JAX has moved.
    if not hasattr(jax.lib, "xla_bridge"):
        jax.lib.xla_bridge = jax.extend.backend
    from ringattention import ringattention_jax

    chunks = {
        "causal_block_size": 1, "deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0,
        "query_chunk_size": chunk, "key_chunk_size": chunk, "dtype": jax.numpy.float32,
        "policy": jax.checkpoint_policies.nothing_saveable, "precision": None,
        "prevent_cse": True,
    }  # fmt: skip
    mesh = jax.make_mesh((2,), ("sp",))
    part = PartitionSpec(None, "sp")

    def local(q, k, v):
        return ringattention_jax(q, k, v, None, None, None, "sp", True, chunks)

    attend = jax.shard_map(
        local, mesh=mesh, in_specs=(part, part, part), out_specs=part, check_vma=False
    )

    @jax.jit
    def both(q, k, v, dout):
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(dout)

    sharding = jax.sharding.NamedSharding(mesh, part)
    inputs = [jax.device_put(x.numpy(), sharding) for x in whole_inputs(n)]

    def call():
        return [np.asarray(x) for x in jax.block_until_ready(both(*inputs))]

    return call, np.arange(n)


CONTENDERS = {  # name: (what it runs, processes, distribution that states its version)
    "ringattn": (ringattn, 2, "ringattn"),
    "ringattn, direct": (lambda n, r: ringattn(n, r, schedule="direct"), 2, "ringattn"),
    "ringattn, 16 documents": (lambda n, r: ringattn(n, r, documents=16), 2, "ringattn"),
    "torch SDPA, 1 process x 2 threads": (sdpa, 1, "torch"),
    "torch SDPA, 16 documents, 1 process x 2 threads": (sdpa_documents, 1, "torch"),
    "DeepSpeed-Ulysses over SDPA": (deepspeed_ulysses, 2, "deepspeed"),
    "ringattention (JAX, 2 devices), chunks 1024": (jax_ringattention, 1, "ringattention"),
    "ringattention (JAX, 2 devices), chunks 512": (
        lambda n, rank: jax_ringattention(n, rank, 512),
        1,
        "ringattention",
    ),
    "ring-attention-pytorch, buckets 1024": (ring_attention_pytorch, 2, "ring-attention-pytorch"),
    "ring-attention-pytorch, buckets 512": (
        lambda n, rank: ring_attention_pytorch(n, rank, 512),
        2,
        "ring-attention-pytorch",
    ),
    "axolotl-ringmaster, point to point": (ringmaster, 2, "axolotl-ringmaster"),
}


def serve(name, rank, rendezvous):
    """A contender's process: lengths come in by stdin, seconds go out by stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    build, world, _ = CONTENDERS[name]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
        )
        if "DeepSpeed" in name:
            import deepspeed

            deepspeed.init_distributed("gloo", verbose=False)
    call, at = None, None
    for line in sys.stdin:
        order, n, file = json.loads(line)
        if order == "prepare":
            call, positions = build(n, rank)
            at = time.perf_counter()
            torch.save([positions, *call()], file)
        else:
            if world > 1:
                dist.barrier()
            at = time.perf_counter()
            call()
        answers.write(json.dumps(time.perf_counter() - at) + "\n")
        answers.flush()


class Contender:
    def __init__(self, name, folder):
        self.name, self.folder = name, folder
        world = CONTENDERS[name][1]
        environment = os.environ | {
            "OMP_NUM_THREADS": "2" if world == 1 else "1",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
            " --xla_cpu_multi_thread_eigen=false",
            "DS_ACCELERATOR": "cpu",
        }
        log = open(folder / f"{abs(hash(name))}.log", "w+")  # noqa: SIM115
        self.log = log
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve", name, str(rank),
                 str(folder / f"rendezvous-{abs(hash(name))}")],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment,
            )
            for rank in range(world)
        ]  # fmt: skip

    def ask(self, order, n):
        for rank, process in enumerate(self.ranks):
            process.stdin.write(json.dumps([order, n, str(self.folder / f"{rank}.pt")]) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.ranks]
        if not all(answers):
            self.log.seek(0)
            raise RuntimeError(f"{self.name} stopped: {self.log.read()[-2000:]}")
        return max(map(json.loads, answers))

    def check(self, n, want):
        """Largest difference from float64 over the largest value of it."""
        import torch

        worst = 0.0
        for rank in range(len(self.ranks)):
            positions, *got = torch.load(self.folder / f"{rank}.pt", weights_only=False)
            positions = torch.as_tensor(positions)
            for a, b in zip(got, want, strict=True):
                gap = (torch.as_tensor(a).double() - b[:, positions]).abs().max()
                worst = max(worst, float(gap / b.abs().max()))
        return worst

    def close(self):
        for process in self.ranks:
            process.kill()
            process.wait()


def oracle(n, documents=1):
    """[out, dq, dk, dv] in float64 by torch's own attention; documents one by one."""
    import torch

    *own, dout = (x.double() for x in whole_inputs(n))
    own = [x.requires_grad_() for x in own]
    parts = zip(*(x.chunk(documents, 1) for x in own), strict=True)
    out = torch.cat([heads_first_sdpa(*part) for part in parts], 1)
    return [out.detach(), *torch.autograd.grad(out, own, dout)]


def version(name):
    distribution = CONTENDERS[name][2]
    text = importlib.metadata.version(distribution)
    if "JAX" in name:
        text += f", jax {importlib.metadata.version('jax')}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), metavar="NAME")
    arguments = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs, {arguments.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        contenders = []
        try:
            for number, name in enumerate(arguments.only):
                place = Path(folder) / str(number)
                place.mkdir()
                contenders.append(Contender(name, place))
            for n in arguments.lengths:
                measure(n, contenders, arguments.rounds)
        finally:
            for contender in contenders:
                contender.close()


def measure(n, contenders, rounds):
    wants = {1: oracle(n), 16: oracle(n, 16)}
    times, errors, left_out = {}, {}, []
    for contender in contenders:
        try:
            contender.ask("prepare", n)
            want = wants[16 if "documents" in contender.name else 1]
            errors[contender.name] = contender.check(n, want)
            times[contender.name] = []
        except RuntimeError as error:
            left_out.append(str(error))
    running = [contender for contender in contenders if contender.name in times]
    for turn in range(rounds + 1):
        for contender in running:
            seconds = contender.ask("time", n)
            if turn:
                times[contender.name].append(seconds)
    base = times["ringattn"]
    print(f"\nL = {n}\n| contender | version | error | median s (min-max) | / ringattn |")
    print("|---|---|---|---|---|")
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, base, strict=True)]
        scale = 1.0
        if "documents" in name:
            scale = (n + 1) / (n // 16 + 1)  # the ratio of the areas
        ratios = [ratio * scale for ratio in ratios]
        error = f"{errors[name]:.0e}" + ("" if errors[name] < 1e-3 else ", WRONG")
        print(
            f"| {name} | {version(name)} | {error} | {statistics.median(seconds):.3f} "
            f"({min(seconds):.3f}-{max(seconds):.3f}) | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) |",
            flush=True,
        )
    for line in left_out:
        print(f"left out: {line}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
