"""Ranks that leave training at other times: 1 first, then 0, which holds the store, then 2."""

import os
import time

import torch.distributed as dist

from ringattn.training.observing.heartbeat import Heartbeat

dist.init_process_group("gloo")
rank = dist.get_rank()
with Heartbeat(timeout_s=10):
    time.sleep((8, 0, 10)[rank])  # seconds: 0 and 2 go on for longer than silence is borne
os._exit(0)  # as the zygote ends its ranks: nobody waits for anybody
