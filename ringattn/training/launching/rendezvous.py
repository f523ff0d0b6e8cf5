"""A store that belongs to this start of the world alone.

After a restart torchrun hands out the same store, with the addresses of the processes that died in
it, and new ones then wait for those (pytorch issues 135712 and 167288; the count of restarts does
not tell starts apart, since every machine's torchrun has its own). So the processes that live now
agree on a prefix first.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

PERIOD_S = 0.05


def fresh_store(timeout_s: float) -> dist.Store | None:
    """torchrun's store under a new prefix, or None if there is no torchrun: rank 0 then makes one.

    Every rank says hello with a number of its own. Rank 0 proposes a prefix for the numbers that it
    reads, and a new one whenever one of them changes; the others agree to every proposal that has
    their number, and go once rank 0 has found all of them agreed. Raises RuntimeError, naming the
    ranks that are missing, after ``timeout_s``.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
    )
    own, until = secrets.token_hex(8), time.monotonic() + timeout_s
    store.set(f"ringattn/hello/{rank}", own)
    seen: list[str] = []
    prefix = ""
    while time.monotonic() < until:
        if rank == 0:
            hellos = [_get(store, f"ringattn/hello/{r}") for r in range(world)]
            missing = [r for r in range(world) if not hellos[r]]
            if not missing:
                if hellos != seen:
                    seen, prefix = hellos, f"ringattn/{secrets.token_hex(8)}"
                    store.set("ringattn/proposal", json.dumps([prefix, seen]))
                missing = [r for r in range(1, world) if not store.check([f"{prefix}/yes/{r}"])]
            if not missing:
                store.set(f"{prefix}/go", "1")
                return dist.PrefixStore(prefix, store)
        else:
            proposal = json.loads(_get(store, "ringattn/proposal") or "null")
            if proposal and proposal[1][rank] == own:
                prefix = proposal[0]
                store.set(f"{prefix}/yes/{rank}", "1")
                if store.check([f"{prefix}/go"]):
                    return dist.PrefixStore(prefix, store)
            missing = [0]
        time.sleep(PERIOD_S)
    raise RuntimeError(
        f"rank {rank}: no word from rank{'s' * (len(missing) > 1)} "
        f"{', '.join(map(str, missing[:8]))} in {timeout_s:g} s (parallel.timeout_s)"
    )


def _get(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
