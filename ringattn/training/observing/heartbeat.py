"""Who has stopped, and where: every rank tells the store that it lives, and watches the next one.

A collective that waits for a stopped process says at best that it timed out. Here the neighbour of
such a rank names it, with the step and the phase that it was in. Where the link to the store is cut
nobody hears and nothing returns; a second thread, which asks nobody, then says where this rank is.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
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
        self._guard = threading.Thread(target=self._mind_the_store, name="guard", daemon=True)
        self._answers, self._lost = 0, False

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
            self._guard.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in (self._thread, self._guard):
            if thread.is_alive():
                thread.join(0.5 * self.timeout_s)  # which may wait for a store that is gone

    def _key(self, rank: int) -> str:
        return f"{self._prefix}/{rank}"

    def _run(self) -> None:
        """Beats and watches until the end; a store that has gone (with torchrun, or with the rank
        that held it and was ready first) is nobody's failure, if the end is near."""
        try:
            self._beat_and_watch()
            self._store.set(self._key(self.rank), DONE)
        except RuntimeError:
            self._answers, self._lost = -1, True

    def _mind_the_store(self) -> None:
        """A call of the store that does not return, or a store that is lost and this rank is not at
        its end, is an end of this process: no other would ever be heard of again."""
        answers, silent = 0, 0.0  # in this thread's own time: a suspended process hears nothing
        while not self._stop.wait(PERIOD_S):
            silent = silent + PERIOD_S if self._answers == answers else 0.0
            answers = self._answers
            if silent > (1.0 if self._lost else 0.5) * self.timeout_s:
                self._end(f"the store of all ranks, on {os.environ['MASTER_ADDR']}, has not been "
                          f"heard of for {silent:.0f} s; this rank is at {self.where}")  # fmt: skip

    def _end(self, what: str) -> None:
        print(
            f"train.py: rank {self.rank}: {what} (parallel.timeout_s={self.timeout_s:g})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _beat_and_watch(self) -> None:
        peer = (self.rank + 1) % self.world
        count, heard, since = 0, "", time.monotonic()
        while count == 0 or not self._stop.wait(PERIOD_S):
            count += 1
            self._store.set(self._key(self.rank), f"{count}|{self.where}")
            self._answers += 1
            if heard == DONE:
                continue  # one is still watched by the rank before
            present = self._store.check([self._key(peer)])
            beat = self._store.get(self._key(peer)).decode() if present else ""
            now, self._answers = time.monotonic(), self._answers + 1
            if beat != heard:
                heard, since = beat, now
            elif now - since > 0.5 * self.timeout_s:
                there = beat.split("|", 1)[-1] or "the start"
                self._end(
                    f"rank {peer} has not been heard of for {now - since:.0f} s; it was at "
                    f"{there}, this rank is at {self.where}"
                )
