"""Every number that a document quotes, in one place.

    make figures                                   # every bench that this machine can run, hours
    python benchmarks/figures.py traffic memory    # these only
    python benchmarks/figures.py --write           # no run: pages from the results that are there

What a bench prints is kept word for word in ``results/NAME.md``, below a line that says what was
run, when, on what, with which versions. A page takes the Nth table of it between two comments,

    <!-- figures: NAME N -->
    <!-- figures end -->

and quotes other numbers of it in its text. ``tests/test_figures.py`` holds every page to that: a
table between markers is the one of the result; a table of numbers elsewhere, or a number with a
unit in the text, is in a result that the page names, or in ``results/stated.md`` with the reason
why it is no measurement.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES.remove(ROOT / "docs/licences.md")  # tools/licences.py makes it
_MARKED = re.compile(r"(<!-- figures: ([\w.-]+) (\d+) -->\n)(.*?)(<!-- figures end -->)", re.DOTALL)


@dataclass(frozen=True)
class Bench:
    """What is run for ``results/NAME.md``, about how many ``minutes`` on two cores. ``needs``: what
    not every machine has; ``ranks``: by torchrun, if it does not start processes itself."""

    command: str
    minutes: float
    needs: str = ""
    ranks: int = 0


# In the order of a run: short ones first.
BENCHES = {
    "published": Bench("published.py", 0.1),
    "moved": Bench("moved.py", 0.1),
    "start": Bench("start.py", 0.5),
    "host": Bench("host.py", 0.5),
    "traffic": Bench("traffic.py", 1),
    "families_estimate": Bench("families.py estimate", 1),
    "families_traffic": Bench("families.py traffic", 1),
    "families_planning": Bench("families.py planning", 1),
    "families_buckets": Bench("families.py buckets", 1),
    "loss": Bench("loss.py", 1),
    "memory": Bench("memory.py", 1),
    "planning": Bench("planning.py", 2),
    "loading": Bench("loading.py", 2, ranks=4),
    "restarts": Bench("restarts.py", 3),
    "balance": Bench("balance.py", 3),
    "paper_scaling": Bench("paper_scaling.py", 6),
    "mixers": Bench("mixers.py", 4),
    "training_memory": Bench("training_memory.py", 8),
    "kernel_report": Bench("kernel_report.py", 6),
    "model_families": Bench("model_families.py", 10),
    "million_tokens": Bench("million_tokens.py", 12),
    "passkey": Bench("passkey.py", 15),
    "sweeps": Bench("sweeps.py", 15),
    "peers": Bench("peers.py", 15, "peers"),
    "soak": Bench("soak.py --kills 20", 8, "root"),
    "recall": Bench("recall.py", 21),
    "slow_links": Bench("slow_links.py", 35, "root"),
    "prediction": Bench("prediction.py", 40),
    "families_passkey": Bench("families.py passkey", 120),
}


def missing(needs: str) -> str:
    """Why this machine cannot run it, or nothing."""
    if needs == "root" and (os.geteuid() or not shutil.which("ip")):
        return "network namespaces: root and iproute2"
    if needs == "peers" and not (ROOT / ".venv-bench/ready").exists():
        return "the environment of the peers: make bench sets it up"
    return ""


def machine() -> str:
    """Processor and cores, as a result names them."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def run(name: str) -> None:
    """Runs a bench and keeps what it prints; the result of before stays if it fails."""
    bench = BENCHES[name]
    python = ROOT / ".venv-bench/bin/python" if bench.needs == "peers" else Path(sys.executable)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={bench.ranks}"]
    launcher = launcher if bench.ranks else []
    begin = time.monotonic()
    done = subprocess.run(
        [python, *launcher, *f"{ROOT}/benchmarks/{bench.command}".split(" ")],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: exit status {done.returncode}; its result is the old one")
    versions = ", ".join(
        f"{each} {version(each)}" for each in ("ringattn", "torch", "triton", "numpy")
    )
    (RESULTS / f"{name}.md").write_text(
        f"# {name}\n\n`python benchmarks/{bench.command}`, {date.today()}, {machine()}, "
        f"{versions}; took {time.monotonic() - begin:.0f} s\n\n{done.stdout.strip()}\n"
    )


def tables(text: str) -> list[str]:
    """The Markdown tables of a text, each with its lines."""
    return [found[0] for found in re.finditer(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


def result(name: str) -> str:
    """The text of a result; raises FileNotFoundError."""
    return (RESULTS / f"{name}.md").read_text()


def written(page: str) -> str:
    """A page with the tables between its markers as the results have them."""

    def table(found: re.Match[str]) -> str:
        begin, name, number, _, end = found.groups()
        return begin + tables(result(name))[int(number) - 1].rstrip() + "\n" + end

    return _MARKED.sub(table, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all of them by default"
    )
    parser.add_argument("--write", action="store_true", help="run nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHES):
        parser.error(f"no bench called {', '.join(sorted(unknown))}")
    for name in [] if options.write else options.names or BENCHES:
        if why := missing(BENCHES[name].needs):
            print(f"{name}: left out, it needs {why}", flush=True)
            continue
        print(f"{name}: about {BENCHES[name].minutes:g} minutes", flush=True)
        run(name)
    for page in PAGES:
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    main()
