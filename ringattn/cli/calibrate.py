"""``ringattn calibrate``: measures this machine, or under torchrun several and the links between
them, and writes a hardware description."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from ringattn.cli.request import Key, RequestError, choice, count, parse
from ringattn.cost.hardware import Hardware
from ringattn.cost.presets import here, write

KEYS = {
    "out": Key(str, None, "file to write; by default the one that hardware=this reads"),
    "ranks": Key(count, None, "ranks that measure together; by default GPUs, or CPU cores"),
    "device": Key(choice("auto", "cpu", "cuda"), "auto", "auto, cpu, cuda"),
    "heads": Key(count, 8, "of the attention that is timed"),
    "kv_heads": Key(count, 4, "of the attention that is timed"),
    "head_dim": Key(count, 64, "of the attention that is timed"),
}


def _flags(parser: ArgumentParser) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """The command."""
    values, _ = parse("calibrate", KEYS, arguments, _flags)
    if values["heads"] % values["kv_heads"]:
        raise RequestError(f"kv_heads={values['kv_heads']} does not divide heads={values['heads']}")
    out = Path(values["out"]).expanduser() if values["out"] else here()
    first = os.environ.get("RANK", "0") == "0"
    if first:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a"):
                pass
        except OSError as error:
            raise RequestError(f"out={out}: {error.strerror}") from None

    import torch

    gpus = torch.cuda.device_count()
    device = values["device"]
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus < (values["ranks"] or 1):
        raise RequestError(f"device=cuda: this machine has {gpus} usable GPUs")
    from ringattn.measure import machine
    from ringattn.measure_links import launched, nodes
    from ringattn.training.engines import DeepSpeed

    cores = len(os.sched_getaffinity(0))
    ranks = values["ranks"] or (gpus if device == "cuda" else min(cores, 8))
    if launched():  # a node's ranks are those of the launch; of cores no more than there are
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        ranks = local if device == "cuda" else min(local, cores)
    shape = (values["heads"], values["kv_heads"], values["head_dim"])
    precisions = ["bf16", "fp32"] if device == "cuda" else ["fp32", "bf16"]
    say = print if first else lambda text: None
    begin = time.perf_counter()

    def one(links: dict[str, Any] | None = None) -> dict[str, Any]:
        return machine(ranks, device, shape, precisions, DeepSpeed(), say, links)

    machines = 1
    try:
        if launched():
            description = nodes(device, one, say)
            machines = int(os.environ["GROUP_WORLD_SIZE"])
        else:
            description = one()
    except ValueError as error:
        raise RequestError(str(error)) from None
    if description is None:  # the first rank has it
        return 0
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    of = f"{ranks} ranks"
    if machines > 1:
        of = f"{machines} machines of {description['node_size']} ranks"
    description |= {
        "name": f"{platform.node()}, {name}",
        "source": (
            f"ringattn calibrate, {date.today()}, {of} on {device}, "
            f"torch {importlib.metadata.version('torch')}, attention {shape}"
        ),
    }
    write(description, out)
    hardware = Hardware.read(description)
    rate = hardware.flops(precisions[0])
    print(
        f"{out}: {rate / 1e9:,.0f} GFLOP/s {precisions[0]} a rank, attention "
        f"{float(hardware.forward.efficiency(2048)):.0%} forward and "
        f"{float(hardware.backward.efficiency(2048)):.0%} backward of it at 2,048 tokens, exchange "
        f"{float(hardware.intra_node.bandwidth(2**23)) / 1e9:.2f} GB/s and "
        f"{hardware.intra_node.latency * 1e6:.0f} us, of which a kernel hides "
        f"{hardware.overlap_efficiency:.0%} "
        f"({time.perf_counter() - begin:.0f} s)"
    )
    if hardware.inter_node is not None:
        rate, shared = float(hardware.inter_node.bandwidth(2**23)), hardware.inter_node.node
        print(
            f"between machines {rate / 1e9:.3f} GB/s and "
            f"{hardware.inter_node.latency * 1e6:.0f} us for one rank"
            + (f", {shared / 1e9:.3f} GB/s for all of a machine" if shared < float("inf") else "")
        )
    return 0
