"""Figures that others have published, beside what the cost model says of the same runs.

    python benchmarks/published.py

On paper only: nothing is measured here. Hardware is configs/machines/h100.yaml with what each
source says it ran on; kernels are those that the source used, by published figures of them alone:
FlashAttention-2 and cuDNN on H100, forward and backward, in TFLOP/s by tokens (FlashAttention-3
paper, arXiv 2407.08608, full and causal; for the causal backward cuDNN on H200, from
NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training). No constant was fitted to the tables.

Sources: ring-flash-attention README (8 GPUs, causal, 8,192 tokens a GPU, 32 heads on 8 K/V heads of
128, bf16); NVIDIA/NeMo docs/source/performance/performance_long_sequence.md (Llama 2 7B, FP8, H100,
NeMo 24.03); TRL docs/source/long_context_training.md, trl#6846 and transformers#48324 (Qwen3 8B,
1,048,576 tokens, 8 x H100, FSDP2, bf16, activations' inputs offloaded, all recomputed).
"""

from dataclasses import replace

import ringattn as ra
from ringattn import cost
from ringattn.cost.hardware import Curve, KernelSpeed, Link
from ringattn.cost.model import Setup, step_flops
from ringattn.cost.presets import load
from ringattn.cost.step import predict, timeline_of
from ringattn.models.memory import Memory
from ringattn.models.sizes import ModelConfig
from ringattn.training.engines import FSDP, DeepSpeed

PEAK = 989.0
# TFLOP/s by tokens: full, causal.
FA2 = {
    "forward": ({512: 309, 1024: 350, 2048: 362, 4096: 368, 8192: 370, 16384: 370},
                {512: 191, 1024: 260, 2048: 298, 4096: 319, 8192: 333, 16384: 335}),
    "backward": ({512: 214, 1024: 260, 2048: 291, 4096: 310, 8192: 318, 16384: 322}, {}),
}  # fmt: skip
CUDNN = {
    "forward": ({512: 497, 1024: 574, 2048: 617, 4096: 609, 8192: 600, 16384: 595},
                {512: 315, 1024: 410, 2048: 484, 4096: 518, 8192: 529, 16384: 539}),
    "backward": ({512: 305, 1024: 408, 2048: 465, 4096: 499, 8192: 518, 16384: 516}, {}),
}  # fmt: skip
H200_BACKWARD = ({2048: 504, 4096: 560, 8192: 594, 16384: 612},
                 {2048: 370, 4096: 474, 8192: 541, 16384: 579})  # fmt: skip


def kernel(full, causal):
    """What a diagonal costs more, in pairs per row, from the gap between the two figures."""
    if not causal:
        edge = kernel(*H200_BACKWARD).edge
    else:
        edge = Curve.of({n: n / 2 * (full[n] / causal[n] - 1) for n in causal})
    return KernelSpeed(Curve.of({n: rate / PEAK for n, rate in full.items()}), edge)


def h100(figures, **changed):
    kernels = {name: kernel(*both) for name, both in figures.items()}
    return replace(load("h100"), **kernels, **changed)


def rfa():
    print("### ring-flash-attention, 8 x H800, iterations/s of one attention layer\n")
    print("| pass | schedule | published | predicted | published share | predicted share |")
    print("|---|---|---|---|---|---|")
    n, world = 8192, 8
    # NVLink of the H800 has 200 GB/s each way, of which as much as on the H100 is taken to be
    # reached.
    hardware = h100(FA2, intra_node=Link(Curve.of(375e9 * 200 / 450), 15e-6, 1e-6))
    shape = cost.AttentionShape(32, 8, 128, itemsize=2)
    alone = ra.make_plan(ra.masks.causal(n), ra.layouts.contiguous(n, 1), "ring")
    ideal = cost.simulate(alone, shape, hardware)
    published = {
        "forward": (591.5 / 8, {"ring": 38.5, "zigzag": 63.0, "striped": 55.0}),
        "both": (154.7 / 8, {"ring": 10.4, "zigzag": 17.4, "striped": 16.0}),
    }
    for what, (theoretic, table) in published.items():
        best = ideal.forward if what == "forward" else ideal.seconds
        print(f"| {what} | one GPU / 8 | {theoretic:.1f} | {1 / best / 8:.1f} | | |")
        for name, rate in table.items():
            layout = {"ring": "contiguous"}.get(name, name)  # "ring" is theirs
            mask = ra.masks.causal(n * world)
            plan = ra.make_plan(mask, ra.layouts.build(layout, mask, world), "ring")
            line = cost.simulate(plan, shape, hardware)
            took = line.forward if what == "forward" else line.seconds
            print(f"| {what} | {name} | {rate} | {1 / took:.1f} | {rate / theoretic:.0%} | "
                  f"{8 * best / took:.0%} |")  # fmt: skip


def nemo():
    print("\n### NeMo, Llama 2 7B, FP8, H100, TFLOP/s per GPU, causal attention counted whole\n")
    print(
        "| tokens | GPUs | TP x CP | published | predicted, cuDNN | predicted, FlashAttention-2 |"
    )
    print("|---|---|---|---|---|---|")
    model = ModelConfig(dim=4096, layers=32, heads=32, kv_heads=32, head_dim=128, ffn_dim=11008,
                        vocab_size=32000, tied=False)  # fmt: skip
    # FP8 matrix products: twice the bf16 peak; the share that is reached is taken to be that of
    # bf16. Attention stays in bf16.
    kinds = [h100(figures) for figures in (CUDNN, FA2)]
    kinds = [replace(h, matmul=Curve.of(2 * float(h.matmul(4096)))) for h in kinds]
    rows = [(4, 4, 1, 1, 768), (8, 8, 1, 1, 730), (16, 16, 2, 1, 660), (32, 32, 2, 2, 610),
            (64, 64, 4, 2, 574), (128, 128, 4, 4, 555), (256, 256, 4, 8, 549),
            (512, 512, 8, 16, 549), (1024, 1024, 8, 32, 536)]  # fmt: skip
    for thousand, gpus, tp, cp, published in rows:
        n, ranks = thousand * 1024, tp * cp
        mask = ra.masks.causal(n)
        plan = ra.make_plan(mask, ra.layouts.zigzag(n, ranks), "ring", tp, node_size=min(8, ranks))
        batch = 4 * 2**20 // n  # sequences of a step
        memory = Memory(checkpoint=thousand >= 32, loss_chunk=2048)
        setup = Setup(DeepSpeed(), memory, world=gpus, cp=ranks, ulysses=tp,
                      grad_accum=batch * ranks // gpus)  # fmt: skip
        cells = []
        for hardware in kinds:
            found = predict(model, setup, plan, hardware)
            counted = step_flops(model, found.tokens, n * n * batch)  # as NeMo's flops_formulas.py
            rate = counted / found.seconds / gpus / 1e12
            share = found.parts["attention kernel"] / found.seconds
            cells.append(f"{rate:.0f} ({rate / published:.2f}; attention {share:.0%})")
        print(f"| {n:,} | {gpus} | {tp} x {cp} | {published} | {' | '.join(cells)} |")


def trl():
    print("\n### TRL, 8 x H100, bf16, FSDP2, everything recomputed\n")
    print("| model | tokens | GPUs | published s | predicted s, cuDNN | FlashAttention-2 | "
          "published GB | predicted GB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    qwen = {"heads": 32, "kv_heads": 8, "head_dim": 128, "layers": 36, "vocab_size": 151936,
            "qk_norm": True}  # fmt: skip
    eight = ModelConfig(dim=4096, ffn_dim=12288, tied=False, **qwen)
    four = ModelConfig(dim=2560, ffn_dim=9728, tied=True, **qwen)
    kinds = [h100(figures) for figures in (CUDNN, FA2)]
    rows = [("Qwen3 8B (cuDNN)", eight, 2**20, 8, 380, 56.2),
            ("Qwen3 8B (flash)", eight, 2**20, 8, 606, None),
            ("Qwen3 4B", four, 2**17, 8, 9.5, None),
            ("Qwen3 4B", four, 2**17, 4, 17.8, None),
            ("Qwen3 4B", four, 2**17, 2, 34.6, None)]  # fmt: skip
    for name, model, n, gpus, seconds, gigabytes in rows:
        mask = ra.masks.causal(n)
        plan = ra.make_plan(mask, ra.layouts.zigzag(n, gpus), "all_gather")
        memory = Memory(checkpoint=True, offload=True, loss_chunk=2048)
        setup = Setup(FSDP(), memory, world=gpus, cp=gpus)
        cells = []
        for hardware in kinds:
            found = predict(model, setup, plan, hardware)
            timeline = timeline_of(model, setup, plan, hardware, list(range(gpus)))
            # Their checkpointing computes attention's forward again; ours keeps its result.
            took = found.seconds + model.layers * timeline.forward
            cells.append(f"{took:.3g} ({took / seconds:.2f}; {found.seconds:.3g} our way)")
        memory = "" if gigabytes is None else f"{gigabytes}"
        print(f"| {name} | {n:,} | {gpus} | {seconds} | {' | '.join(cells)} | {memory} | "
              f"{found.peak_memory / 1e9:.1f} |")  # fmt: skip


if __name__ == "__main__":
    rfa()
    nemo()
    trl()
