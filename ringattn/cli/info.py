"""``ringattn info``: versions, devices, links and the kernels that would be chosen, to read or to
put into a report of a fault."""

from __future__ import annotations

import json
import os
import platform
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ringattn.cli.request import parse
from ringattn.cost.hardware import HardwareError
from ringattn.cost.presets import here, load

# What a fault may depend on. Their versions are read without importing them.
PACKAGES = (
    "ringattn", "torch", "triton", "numpy", "einops", "deepspeed", "hydra-core", "wandb",
    "transformers", "accelerate", "trl", "peft", "datasets", "tokenizers", "liger-kernel",
    "fla-core",
)  # fmt: skip
# Of the environment: what changes how ranks find each other, compile or compute. Nothing else of it
# is shown, since reports are public.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME", "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "OMP_NUM_THREADS",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TRITON_INTERPRET",
)  # fmt: skip
HEAD_DIMS = (64, 128, 256)


def _flags(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")


def run(arguments: Sequence[str]) -> int:
    """The command."""
    _, options = parse("info", {}, arguments, _flags)
    facts = gather()
    if options.json:
        print(json.dumps(facts))
        return 0
    for title, part in facts.items():
        print(f"{title}:")
        for key, value in part.items():
            print(f"  {key}: {value}")
    return 0


def gather() -> dict[str, dict[str, Any]]:
    """Everything that is shown, in its order."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    system = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
    }
    return {
        "versions": system,
        "devices": _devices(torch),
        "links": _links(torch),
        "kernels for kernel=auto": _kernels(torch, device),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices(torch: Any) -> dict[str, str]:
    found = {"cpu": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {_memory()}"}
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        kind = f"sm_{of.major}{of.minor}" if torch.version.cuda else of.gcnArchName
        found[f"gpu {i}"] = f"{of.name}, {kind}, {of.total_memory / 2**30:.0f} GiB"
    cuda, rocm = torch.version.cuda, torch.version.hip
    found["torch built for"] = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPU"
    return found


def _links(torch: Any) -> dict[str, str]:
    dist = torch.distributed
    backends = ["gloo"] if dist.is_gloo_available() else []
    if dist.is_nccl_available():
        backends.append("nccl " + ".".join(map(str, torch.cuda.nccl.version())))
    found = {"backends": ", ".join(backends) or "none"}
    count = torch.cuda.device_count()
    if count > 1:
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        direct = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
        found["peer access"] = f"{direct} of {len(pairs)} pairs of GPUs"
    if not here().exists():
        found["calibrated"] = "no (ringattn calibrate measures it)"
        return found
    try:
        machine = load("this")
    except HardwareError as error:
        found["calibrated"] = f"unreadable: {error}"
        return found
    found["calibrated"] = machine.source
    for name in ("intra_node", "inter_node"):
        if link := getattr(machine, name):
            speed, wait = float(link.bandwidth(2**26)) / 1e9, link.latency * 1e6
            found[name] = f"{speed:.3g} GB/s in exchanges of 64 MiB, {wait:.3g} us"
    return found


def _kernels(torch: Any, device: Any) -> dict[str, str]:
    from ringattn.kernels import select

    found = {}
    for name in ("bfloat16", "float16", "float32"):
        each = []
        for head_dim in HEAD_DIMS:
            module = select("auto", getattr(torch, name), device, head_dim).__name__
            each.append(f"{module.rpartition('.')[2]} (head_dim {head_dim})")
        found[name] = ", ".join(each)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
