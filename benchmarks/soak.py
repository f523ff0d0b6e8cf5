"""Two nodes, killed again and again: ranks, launchers, tokenizing processes, whole nodes.

    python benchmarks/soak.py [--kills 20] [--seed 0] [--limit 600] [--out FILE] [KEY=VALUE ...]

Two network namespaces with a rank each (root needed), torchrun with c10d and --max-restarts on
both, started again whenever it ends before the run does, as systemd or Kubernetes would. Every so
often, at a random moment, SIGKILL meets a rank, a torchrun, a process that tokenizes (the cache of
tokens is emptied before some starts, so that there are some), or everything on a node at once,
whose link is then down for two seconds. The verdict: step, loss, gradient norm and tokens of every
line of metrics.jsonl are those of an undisturbed run on one machine, bit for bit, each step once;
and nothing is left: no process, no draft, no lock. Prints one JSON line; status 1 if not.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEYS = [
    "model.dim=64", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=16",
    "model.ffn_dim=128", "model.vocab_size=512", "seq_len=512", "logger=none", "data=files",
    "train.sample_tokens=0",
    "checkpoint.every=1", "checkpoint.keep=2", "optim.warmup_tokens=1000", "peak_flops=1e9",
    "parallel.cp=2", "parallel.timeout_s=10",
]  # fmt: skip
KINDS = ("rank", "launcher", "tokenizer", "node")


def corpus(folder):
    """Text and a tokenizer whose work takes some seconds."""
    (folder / "text").mkdir()
    source = b"".join(sorted(p.read_bytes() for p in (ROOT / "ringattn").rglob("*.py")))
    for i in range(48):
        (folder / "text" / f"{i}.txt").write_bytes(source)
    command = [sys.executable, "-m", "ringattn", "bpe", f"root={ROOT / 'docs'}", "glob=*.md",
               "vocab_size=512", f"out={folder / 'tokenizer.json'}"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return [f"data.root={folder / 'text'}", f"data.tokenizer={folder / 'tokenizer.json'}",
            f"data.cache={folder / 'cache'}", "data.workers=2"]  # fmt: skip


class Keeper(threading.Thread):
    """Keeps a torchrun alive on a node until it ends well."""

    def __init__(self, nodes, node, keys, log):
        super().__init__(daemon=True)
        self.nodes, self.node, self.keys, self.log = nodes, node, keys, log
        self.job, self.starts, self.stop = None, 0, threading.Event()

    def run(self):
        from tests.nodes import ANEW

        while not self.stop.is_set():
            self.starts += 1
            self.job = self.nodes.torchrun(
                ROOT / "train.py", *self.keys, c10d=True, restarts=100, only=self.node,
                more=("--monitor-interval=0.2",), environment=ANEW,
            )[0]  # fmt: skip
            for line in self.job.stdout:
                self.log.write(line)
            if self.job.wait() == 0:
                return
            time.sleep(0.5)


class Soak:
    def __init__(self, nodes, keepers, run_dir, cache, last, seed):
        self.nodes, self.keepers, self.run_dir, self.cache = nodes, keepers, run_dir, cache
        self.last = last  # step after which nothing is killed: a node alone could not come back
        self.draw, self.done = random.Random(seed), []

    def steps(self):
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def kill(self, kind):
        """Whether there was one to be killed."""
        node = self.draw.choice((0, 1))
        if kind == "node":
            for pid in pids(self.nodes.names[node]):
                end(pid)
            self.nodes.cut()
            time.sleep(2)
            self.nodes.cut(False)
            return True
        if kind == "launcher":
            job = self.keepers[node].job
            return job is not None and job.poll() is None and end(job.pid)
        if kind == "rank":
            ranks = self.nodes.ranks()
            return bool(ranks) and end(self.draw.choice(ranks))
        found = [p for p in pids(*self.nodes.names) if b"spawn_main" in command(p)]
        return bool(found) and end(self.draw.choice(found))

    def run(self, kills, seconds):
        until = time.monotonic() + seconds
        while len(self.done) < kills and time.monotonic() < until and self.steps() < self.last:
            kind, before = self.draw.choice(KINDS), self.steps()
            if kind == "tokenizer" and not self.tokenizing(until):
                continue
            if kind != "tokenizer" and self.draw.random() < 0.7:  # else: amid a start
                wait(lambda before=before: self.steps() > before, until)
            time.sleep(self.draw.uniform(0, 0.5 if kind == "tokenizer" else 2))
            if self.kill(kind):
                self.done.append((kind, self.steps()))
                print(f"{len(self.done)}: {kind} after step {self.done[-1][1]}", file=sys.stderr,
                      flush=True)  # fmt: skip

    def tokenizing(self, until):
        """Has the next start tokenize, by a rank that is killed and a cache that is gone."""
        wait(self.nodes.ranks, until)
        shutil.rmtree(self.cache, ignore_errors=True)
        if not self.kill("rank"):
            return False
        self.done.append(("rank", self.steps()))
        found = wait(lambda: [p for p in pids(*self.nodes.names) if b"spawn_main" in command(p)],
                     min(until, time.monotonic() + 30))  # fmt: skip
        return found


def wait(condition, until):
    while not (found := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def pids(*names):
    """Of all processes in the namespaces."""
    found = []
    for name in names:
        listing = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        found += map(int, listing.stdout.split())
    return found


def command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def end(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def lines(run_dir):
    """What must be equal: all but times and memory."""
    names = ("step", "loss", "grad_norm", "tokens_seen")
    content = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[name] for name in names] for line in content]


def left(nodes, run_dir, cache):
    """What should not be there any more."""
    deadline = time.monotonic() + 20
    wait(lambda: not pids(*nodes.names), deadline)
    files = [p for folder in (run_dir, cache) for p in folder.rglob("*") if p.suffix == ".partial"]
    files += [p for p in run_dir.iterdir() if "lock" in p.name]
    files += sorted((run_dir / "checkpoints").iterdir())[:-2]  # checkpoint.keep=2
    return [command(p).decode(errors="replace") for p in pids(*nodes.names)] + list(map(str, files))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600, help="seconds of kills, at most")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="where logs shall stay")
    parser.add_argument("keys", nargs="*")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.nodes import Nodes
    from tests.processes import train

    folder = Path(tempfile.mkdtemp())
    try:
        keys = [*KEYS, *corpus(folder), f"train.steps={options.steps}", *options.keys]
        begin = time.monotonic()
        status, said = train(2, *keys, f"run_dir={folder / 'whole'}")
        assert status == 0, said[-3000:]
        undisturbed_s = time.monotonic() - begin
        run_dir, cache = folder / "run", folder / "cache"
        begin = time.monotonic()
        with Nodes() as nodes, open((options.keep or folder) / "log", "w", 1) as log:
            keepers = [Keeper(nodes, i, [*keys, f"run_dir={run_dir}"], log) for i in (0, 1)]
            for keeper in keepers:
                keeper.start()
            soak = Soak(nodes, keepers, run_dir, cache, options.steps - 200, options.seed)
            soak.run(options.kills, options.limit)
            kills_s = time.monotonic() - begin
            until = time.monotonic() + 300
            wait(lambda: soak.steps() >= options.steps, until)
            for keeper in keepers:
                keeper.join(60)
                keeper.stop.set()
            hanging = sum(keeper.is_alive() for keeper in keepers)
            whole_s = time.monotonic() - begin
            rest = left(nodes, run_dir, cache)
        want, got = lines(folder / "whole"), lines(run_dir)
        report = {
            "kills": len(soak.done), "of": dict(Counter(kind for kind, _ in soak.done)),
            "after_step": soak.done, "steps": len(want), "equal": got == want,
            "left": rest, "launchers_left": hanging, "seed": options.seed,
            "torchruns_started": sum(keeper.starts for keeper in keepers),
            "undisturbed_s": round(undisturbed_s), "kills_s": round(kills_s),
            "whole_s": round(whole_s),
        }  # fmt: skip
        print(json.dumps(report))
        killed = ", ".join(f"{count} {kind}" for kind, count in sorted(report["of"].items()))
        print(
            f"\n{report['kills']} kills in {report['kills_s']} s ({killed}; seed {options.seed}): "
            f"{report['steps']:,} steps {'equal' if report['equal'] else 'UNEQUAL'}, left over: "
            f"{rest or 'nothing'}"
        )
        if options.out:
            options.out.write_text(json.dumps(report) + "\n")
        enough = len(soak.done) >= options.kills
        return 0 if report["equal"] and enough and not rest and not hanging else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
