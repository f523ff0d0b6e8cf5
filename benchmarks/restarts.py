"""Kills a random rank at a random moment, again and again, under torchrun --max-restarts.

    python benchmarks/restarts.py [--kills 20] [--world 2] [--out FILE] [KEY=VALUE ...]

Trains the same small run twice: undisturbed, and with SIGKILLs. A kill comes a random time after
training has begun anew, or at any time after the kill before, so that it also hits restarts,
checkpoints on their way and their publishing. The verdict: step, loss, gradient norm and tokens of
every line of metrics.jsonl are equal, bit for bit. Prints one JSON line; status 1 if they differ.
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
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEYS = [
    "model.dim=64", "model.layers=2", "model.heads=4", "model.kv_heads=2", "model.head_dim=16",
    "model.ffn_dim=128", "seq_len=512", "logger=none", "train.sample_tokens=0",
    "checkpoint.every=1", "checkpoint.keep=2", "optim.warmup_tokens=1000", "peak_flops=1e9",
]  # fmt: skip


def start(world, restarts, run_dir, keys, log):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(world), "--max-restarts", str(restarts), "--monitor-interval", "0.2",
        str(ROOT / "train.py"), *KEYS, *keys, f"run_dir={run_dir}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


def workers(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    try:
        return [int(pid) for pid in children.read_text().split()]
    except OSError:
        return []


def lines(run_dir):
    """What must be equal: all but times and memory."""
    path = run_dir / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:  # cut short by a kill; the next start removes it
            continue
        found.append([values[key] for key in ("step", "loss", "grad_norm", "tokens_seen")])
    return found


def kill_again_and_again(process, run_dir, kills, draw, limit):
    """SIGKILLs; the step of each. Most wait until training has begun again, some do not."""
    steps, victims, last, until = [], set(), 0.0, time.monotonic() + limit
    patient = True
    while len(steps) < kills and process.poll() is None and time.monotonic() < until:
        alive = [pid for pid in workers(process) if pid not in victims]
        written = run_dir / "metrics.jsonl"
        begun = written.exists() and written.stat().st_mtime > last
        if not alive or (patient and not begun):
            time.sleep(0.02)
            continue
        time.sleep(draw.uniform(0, 1.0 if patient else 4.0))
        alive = [pid for pid in workers(process) if pid not in victims]
        if process.poll() is None and alive:
            last = time.time()
            steps.append(len(lines(run_dir)))
            victims |= set(alive)
            os.kill(draw.choice(alive), signal.SIGKILL)
            patient = draw.random() < 0.7
    return steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1200, help="seconds in all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("keys", nargs="*")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    keys = [f"train.steps={40 + 20 * options.kills}", *options.keys]
    processes = []
    try:
        with open(folder / "log", "w") as log:
            begin = time.monotonic()
            processes.append(start(options.world, 0, folder / "undisturbed", keys, log))
            assert processes[-1].wait(options.limit) == 0, (folder / "log").read_text()[-3000:]
            undisturbed_s = time.monotonic() - begin
            begin = time.monotonic()
            run = start(options.world, options.kills + 2, folder / "killed", keys, log)
            processes.append(run)
            draw = random.Random(options.seed)
            steps = kill_again_and_again(run, folder / "killed", options.kills, draw, options.limit)
            status = run.wait(options.limit)
            killed_s = time.monotonic() - begin
        want, got = lines(folder / "undisturbed"), lines(folder / "killed")
        passed_over = (folder / "log").read_text().count("passed over")
        report = {
            "kills": len(steps), "asked": options.kills, "world": options.world,
            "keys": options.keys, "killed_after_step": steps, "status": status,
            "steps": len(want), "equal": status == 0 and got == want and len(want) > 0,
            "undisturbed_s": round(undisturbed_s, 1), "killed_s": round(killed_s, 1),
            "seconds_per_restart": round((killed_s - undisturbed_s) / max(1, len(steps)), 2),
            "damaged_checkpoints_met": passed_over,
        }  # fmt: skip
        print(json.dumps(report))
        print(
            f"\n{len(steps)} SIGKILLs of random ranks, {len(want)} steps, metrics bit for bit "
            f"{'equal' if report['equal'] else 'UNEQUAL'}; {report['seconds_per_restart']} s per "
            "restart"
        )
        if options.out:
            options.out.write_text(json.dumps(report) + "\n")
        if status:
            print((folder / "log").read_text()[-3000:], file=sys.stderr)
        return 0 if report["equal"] and len(steps) == options.kills else 1
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
