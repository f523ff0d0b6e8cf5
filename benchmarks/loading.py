"""Host memory while a transformers model is loaded over ranks: what each holds at most.

    torchrun --nproc-per-node 4 benchmarks/loading.py [MiB of the model, default 200]

Each rank builds the module with FSDP2 (parameters alone, no optimizer) and reads its own part from
safetensors. Printed: the largest growth of a rank's resident memory, over one copy / ranks + the
largest tensor, all in float32. Linux.
"""

import gc
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from ringattn.comm import end_distributed
from ringattn.context import Context
from ringattn.hf.describe import PREFIX, config_of, empty_model
from ringattn.hf.trained import SplitModel
from ringattn.hf.weights import HubWeights
from ringattn.models.memory import Memory
from ringattn.training.engines import Parts, fsdp_engine
from ringattn.training.engines.fsdp import FSDP
from ringattn.training.optimizer import Optimizer


def resident(which: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024


def save(folder: Path, mib: int) -> None:
    """A random mixture of experts of so many MiB in float32: experts are most of it."""
    width, experts, layers = 256, 8, 8
    size = max(8, mib * 2**20 // 4 // (3 * width * experts * layers) // 8 * 8)
    config = transformers.Qwen3MoeConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=size, moe_intermediate_size=size, num_experts=experts,
        num_experts_per_tok=2, vocab_size=1000,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size=mib * 2**20 // 4)


def main(mib: int) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    folder = Path(folder[0])
    if rank == 0:  # elsewhere, so that this rank's own memory never held the model
        subprocess.run([sys.executable, __file__, str(mib), str(folder)], check=True)
    dist.barrier()
    config = config_of(folder)
    names = ["all"] * config.num_hidden_layers
    fsdp_engine.allocate = lambda *_: None  # no optimizer: of weights alone
    context = Context.create(world, torch.device("cpu"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
    before = resident("VmRSS")
    parts = Parts(
        make_model=lambda: SplitModel(config, Memory(), names), trained=1,
        optimizer=Optimizer(), context=context, precision="fp32", batch_size=1, grad_accum=1,
    )  # fmt: skip
    engine = FSDP().build(parts)
    source = HubWeights(folder, empty_model(config), PREFIX)
    with torch.no_grad():
        for f in engine.fragments():
            f.write("weight", source.read("weight", f.name, f.shape, f.start, f.count))
    grown = [0] * world
    dist.all_gather_object(grown, resident("VmHWM") - before)
    sizes = [4 * p.numel() for p in source.model.parameters()]
    share = sum(sizes) / world + max(sizes)
    if rank == 0:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        print(
            f"{world} ranks load {sum(sizes) / 2**20:.0f} MiB, its largest tensor "
            f"{max(sizes) / 2**20:.0f} MiB; none grows by more than {max(grown) / 2**20:.0f} MiB, "
            f"{max(grown) / share:.2f} x its part and the largest tensor"
        )
    end_distributed()


if __name__ == "__main__":
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    save(Path(sys.argv[2]), size) if len(sys.argv) > 2 else main(size)
