"""Seconds to plan the steps of one rank, for masks, layouts and numbers of ranks.

    python benchmarks/planning.py --worlds 64 1024 --tokens 1048576

One process, no torch: plans are pure Python and NumPy. Medians of three fresh plans.
"""

import argparse
import statistics
import time

import ringattn as ra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--document", type=int, default=15_000, help="tokens of a document")
    arguments = parser.parse_args()
    n = arguments.tokens
    count, rest = divmod(n, arguments.document)
    masks = {
        "causal": ra.masks.causal(n),
        f"{count + bool(rest)} documents": ra.masks.documents(
            [arguments.document] * count + [rest]
        ),
    }
    for world in arguments.worlds:
        for mask_name, mask in masks.items():
            for layout_name, make in ra.layouts.BUILDERS.items():
                times = []
                for _ in range(3):
                    begin = time.perf_counter()
                    plan = ra.make_plan(mask, make(n, world))
                    steps = plan.steps(world // 2)
                    times.append(time.perf_counter() - begin)
                print(
                    f"{n} tokens  {world:5d} ranks  {mask_name:14s} {layout_name:11s} "
                    f"{statistics.median(times):7.3f} s ({min(times):.3f}-{max(times):.3f})  "
                    f"{len(steps)} steps",
                    flush=True,
                )


if __name__ == "__main__":
    main()
