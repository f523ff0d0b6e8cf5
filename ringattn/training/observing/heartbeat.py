"""Who has stopped, and where: every rank tells the store that it lives, and watches the next one.

A collective that waits for a stopped process says at best that it timed out. Here the neighbour of
such a rank names it, with the step and the phase that it was in.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

PERIOD_S = 1.0
DONE = "done"


class Heartbeat:
    """Use as a context manager around training; set :attr:`where` as it goes on.

    A rank that has not been heard of for half of ``timeout_s``, so before any exchange gives up,
    ends this process with status 1 and a line; torchrun then ends the others. Nothing happens in
    a world of one.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.timeout_s, self.where = timeout_s, "start"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if self.world > 1:
            # A connection of its own: torch's waits in it while a collective is set up.
            self._store = dist.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                timeout=timedelta(seconds=self.timeout_s),
            )
            # torchrun's store outlives a restart.
            shared = [f"ringattn/beat/{secrets.token_hex(8)}"]
            dist.broadcast_object_list(shared)
            self._prefix = shared[0]
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _run(self) -> None:
        """Beats and watches until the end; a store that has gone (with torchrun, or with the rank
        that held it and was ready first) is nobody's failure."""
        with suppress(RuntimeError):
            self._beat_and_watch()
            self._store.set(self._key(self.rank), DONE)

    def _beat_and_watch(self) -> None:
        peer = (self.rank + 1) % self.world
        count, heard, since = 0, "", time.monotonic()
        while count == 0 or not self._stop.wait(PERIOD_S):
            count += 1
            self._store.set(self._key(self.rank), f"{count}|{self.where}")
            if heard == DONE:
                continue  # one is still watched by the rank before
            present = self._store.check([self._key(peer)])
            beat = self._store.get(self._key(peer)).decode() if present else ""
            now = time.monotonic()
            if beat != heard:
                heard, since = beat, now
            elif now - since > 0.5 * self.timeout_s:
                there = beat.split("|", 1)[-1] or "the start"
                print(
                    f"train.py: rank {self.rank}: rank {peer} has not been heard of for "
                    f"{now - since:.0f} s; it was at {there}, this rank is at "
                    f"{self.where} (parallel.timeout_s={self.timeout_s:g})",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)
