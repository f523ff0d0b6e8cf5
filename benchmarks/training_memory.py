"""Peak memory of a real training step against length and vocabulary, beside the written model.

    python benchmarks/training_memory.py [--lengths 4096 8192 ...] [--quick] [--out FILE]

One process, FSDP engine, fp32; forward, backward and optimizer step of train.py's own engine. The
peak is the largest running sum of torch's allocations (torch's profiler), so neither Python nor the
allocator's fragmentation is in it; every case is a process of its own. Attention has a window of
1,024: its memory does not depend on the mask, its time does. The slope is a least-squares line
through the lengths, R^2 says how straight it is; "written" is the slope of
ringattn.cost.model.footprint over the same lengths, "error" predicted / peak - 1. The second table
has the vocabulary's own share: weight, gradient, two moments and the gradient in the making, 4
bytes each. The third counts calls of attention, and so passes of its exchange, per step.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"dim": 256, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn_dim": 704}
SETTINGS = {
    "plain": [],
    "checkpoint": ["memory.checkpoint=true"],
    "checkpoint, tiles": ["memory=long", "memory.ffn_tile=1024"],
}


def measure(keys):
    """In a process of its own: {peak, states, calls, predicted}, bytes."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile
    from torch.utils._python_dispatch import TorchDispatchMode

    from ringattn.context import Context
    from ringattn.training import config, engines
    from ringattn.training.batch import load_batch
    from ringattn.training.checkpoints import states
    from ringattn.training.forecast import Forecast
    from ringattn.training.job import prepare
    from ringattn.training.loop import build_engine

    torch.set_num_threads(2)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=0, world_size=1)
        run = config.resolved(config.load([
            *keys, "engine=fsdp", "logger=none", "attention=causal", "attention.window=1024",
            "model.tied=false",
        ]), 1)  # fmt: skip
        job = prepare(run, Path(folder) / "run", 1)
        context = Context.create(1, torch.device("cpu"))
        engine = build_engine(job, context)
        states.fill(engine, job.source, job.source, 0)
        engine.set_lr(1e-3)
        batch = load_batch(
            run.attention,
            job.model.layers,
            job.data.train,
            context,
            run.parallel.strategy(job.model),
            [0],
        )
        calls = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if "ringattn" in str(func):
                    calls.append(str(func))
                return func(*args, **(kwargs or {}))

        resident = sum(
            x.numel() * x.element_size()
            for f in engine.fragments()
            for x in (f.read(kind) for kind in engines.KINDS)
        )

        def step():
            attend = context.attend(batch.plans)
            loss, *_ = engine.forward(batch.tokens, batch.positions, attend, batch.labels)
            engine.backward(context.scaled_loss(loss, batch.supervised, 1))
            del loss
            engine.step()

        with Count(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            step()
        events = record.profiler.kineto_results.events()
        moves = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        running = np.cumsum([size for _, size in moves])
        predicted = Forecast(run, 1, batch.plans, None, "cpu").memory
        dist.destroy_process_group()
    forward = sum("backward" not in name for name in calls)
    return {
        "peak": int(running.max()) + resident,
        "forwards": forward,
        "backwards": len(calls) - forward,
        "predicted": predicted.device,
    }


def run(keys):
    done = subprocess.run(
        [sys.executable, __file__, "--one", *keys], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def show(report, options):
    """The tables for people."""
    lengths = [f"{n // 1024}k" for n in options.lengths]
    print(f"| setting | {' | '.join(lengths)} | bytes per token | written | ratio |")
    print("|---" * (len(lengths) + 4) + "|")
    for name, of in report["length"].items():
        peaks = " | ".join(f"{p / 2**20:,.0f}" for p in of["peaks"])
        print(f"| {name} | {peaks} | {of['bytes_per_token']:,} | "
              f"{of['written_bytes_per_token']:,} | {of['ratio']:.2f} |")  # fmt: skip
    print("\nThe written peak over the measured one:\n")
    for name, of in report["length"].items():
        shown = ", ".join(f"{100 * x:+.0f} %" for x in of["error"])
        print(f"{name}: {shown} (R2 of the line {of['r2']}; attention {of['attention_forwards']} "
              f"times forward, {of['attention_backwards']} backward)")  # fmt: skip
    sizes = [f"{x['vocab']:,}" for x in report["vocabulary"]]
    print(f"\n| vocabulary | {' | '.join(sizes)} |\n" + "|---" * (len(sizes) + 1) + "|")
    for title, key, form in (
        ("peak, MiB", "peak", ",.0f"),
        ("beyond its weights, MiB", "beyond", ".1f"),
    ):
        print(
            f"| {title} | "
            + " | ".join(f"{x[key] / 2**20:{form}}" for x in report["vocabulary"])
            + " |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[512, 8192, 32768, 131072])
    parser.add_argument("--vocabulary-length", type=int, default=8192)
    parser.add_argument("--quick", action="store_true", help="small")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    model = dict(MODEL)
    if options.quick:
        model |= {"dim": 64, "layers": 4, "head_dim": 16, "ffn_dim": 176}
        options.lengths, options.vocabularies = [1024, 2048, 4096], [512, 16384]
        options.vocabulary_length = 2048
    keys = [f"model.{key}={value}" for key, value in model.items()]
    report = {"model": model, "length": {}, "vocabulary": []}
    base = [*keys, "model.vocab_size=512"]
    for name, more in SETTINGS.items():
        found = [run([*base, *more, f"seq_len={n}"]) for n in options.lengths]
        peaks = np.array([f["peak"] for f in found], float)
        slope, start = np.polyfit(options.lengths, peaks, 1)
        residual = peaks - (slope * np.array(options.lengths) + start)
        predicted = np.polyfit(options.lengths, [f["predicted"] for f in found], 1)[0]
        report["length"][name] = {
            "peaks": [int(p) for p in peaks],
            "error": [round(f["predicted"] / f["peak"] - 1, 3) for f in found],
            "bytes_per_token": round(slope),
            "written_bytes_per_token": round(predicted),
            "ratio": round(slope / predicted, 3),
            "r2": round(1 - residual.var() / peaks.var(), 6),
            "attention_forwards": found[0]["forwards"],
            "attention_backwards": found[0]["backwards"],
        }
    for size in options.vocabularies:
        more = [*keys, f"model.vocab_size={size}", "memory=long"]
        found = run([*more, f"seq_len={options.vocabulary_length}"])
        head = size * model["dim"] * 4
        # Head and embedding: weight, gradient, two moments; the head's gradient in the making,
        # and the gathered copy of each.
        report["vocabulary"].append(
            {"vocab": size, "peak": found["peak"], "head": head,
             "beyond": found["peak"] - 8 * head}
        )  # fmt: skip
    show(report, options)
    if options.out:
        options.out.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
