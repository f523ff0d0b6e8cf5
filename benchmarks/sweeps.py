"""The sweep of docs/scaling.md and its pictures: ten points of which one cannot fit, interrupted by
Ctrl-C and resumed, then the other four experiments; predicted against measured over all of them.

    ringattn calibrate && python benchmarks/sweeps.py [--folder runs/sweeps] [--docs docs/sweep]

Points that have finished in the folder are not run again, so the first time counts.
"""

import argparse
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from ringattn.report import page
from ringattn.report.read import find

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = "1024,1536,2048,3072,4096,6144,8192,10240,12288,1048576"
EXPERIMENTS = ("scaling_ranks", "scaling_weak", "schedules", "masks")


def command(experiment, folder, *keys):
    return [sys.executable, str(ROOT / "train.py"), "--multirun", f"experiment={experiment}",
            f"hydra.sweep.dir={folder}", *keys]  # fmt: skip


def ten(folder):
    """Ten lengths, interrupted once; prints what happened."""
    keys = command("scaling_length", folder, f"seq_len={LENGTHS}")
    begin = time.perf_counter()
    job = subprocess.Popen(keys, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           preexec_fn=lambda: signal.signal(  # a shell's & leaves it ignored
                               signal.SIGINT, signal.default_int_handler))  # fmt: skip
    lines = []
    for line in job.stdout:
        lines.append(line)
        if "3/10" in line:
            job.send_signal(signal.SIGINT)
    print("".join(lines), f"-- exit status {job.wait()}, {time.perf_counter() - begin:.0f} s\n")
    done = subprocess.run(keys, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    print(f"-- exit status {done.returncode}, {time.perf_counter() - begin:.0f} s in all\n")
    ended = re.findall(r"done before", done.stdout)
    print(f"{len(ended)} points were not run again")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "sweeps")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "sweep")
    options = parser.parse_args()
    ten(options.folder / "ten")
    for name in EXPERIMENTS:
        done = subprocess.run(command(name, options.folder / name), capture_output=True, text=True)
        print(done.stdout + done.stderr, flush=True)
    options.docs.mkdir(parents=True, exist_ok=True)
    for file in page.write(find([options.folder / "ten"]), options.folder / "pages")[1:]:
        shutil.copy(file, options.docs / file.name)
    runs = find([options.folder / name for name in ("ten", *EXPERIMENTS)])
    for file in page.write(runs, options.folder / "all")[1:]:
        if file.stem == "predicted":
            shutil.copy(file, options.docs / "predicted.png")
    columns = ("point", "status", "ranks", "tokens", "step s", "spread", "predicted s", "error",
               "exposed", "GiB", "predicted GiB", "error GiB")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in page.rows(runs):
        print(f"| {' | '.join(row[name] for name in columns)} |")
    errors = [abs(e) for run in runs if (e := run.error()) is not None]
    within = sum(e <= 0.2 for e in errors)
    print(
        f"\n{page.summary(runs)}; {within} of {len(errors)} steps within 20 %; spread of steps: "
        f"median {statistics.median(run.spread('step_s') for run in runs if run.metrics):.0%}"
    )


if __name__ == "__main__":
    main()
