"""The written model of a rank's memory: what must be kept, and what a block needs while it is
computed. benchmarks/training_memory.py compares it with what is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from ringattn.models.decoder import ModelConfig


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank: on its device, and what offloading keeps in host memory instead."""

    states: int  # weights, gradients, AdamW's state
    kept: int  # from forward to backward
    working: int  # of one block and of the loss, while they are computed
    host: int

    @property
    def device(self) -> int:
        return self.states + self.kept + self.working


def predict(
    model: ModelConfig, config: DictConfig, tokens: int, world: int, cp: int, ulysses: int = 1
) -> Footprint:
    """For ``tokens`` of this rank in a micro-step, heads split over ``ulysses`` ranks. Without the
    framework's own share, the buffers of communication, and the copy that a checkpoint is written
    from (12 bytes a parameter of this rank, in host memory)."""
    wide = 2 if config.precision == "bf16" else 4
    on_device, on_host = _states(model, config, wide, world, cp)
    memory, engine = config.memory, config.engine
    tiled = memory.ffn_tile is not None and memory.ffn_tile < tokens
    kept = block_kept(model, wide, memory.checkpoint, 0.0 if tiled else 1.0) * model.layers
    if ulysses > 1 and memory.checkpoint:  # q, k, v and out too, as exchanged: once is enough
        kept += model.layers * 2 * (model.heads + model.kv_heads) * model.head_dim * wide
    # A block computed again holds what it else keeps, and gradients of the model's width.
    again = block_kept(model, wide, False, 0.0 if tiled else 1.0)
    working = (again - block_kept(model, wide, True) + 3 * model.dim * wide) * tokens
    if not memory.checkpoint:
        working = 3 * model.dim * wide * tokens
    if tiled:
        working += 4 * model.ffn_dim * wide * memory.ffn_tile
    if engine.name == "fsdp" or engine.zero_stage == 3:  # gathered: this block and the next
        largest = max(model.dim * model.vocab_size, _block_parameters(model))
        working += 2 * wide * largest
    kept, offloaded = (0, kept) if memory.offload else (kept, 0)
    # The last hidden states, before and after their norm, and the gradient of the loss in them.
    tail = 3 * model.dim * wide + 4 * model.head_dim + 3 * 8
    chunk = memory.loss_chunk or max(64, tokens * model.dim // model.vocab_size)
    logits = min(chunk, tokens) * model.vocab_size * (4 + 2 * wide)
    return Footprint(
        int(on_device),
        int((kept + tail) * tokens),
        int(max(working, logits)),
        int(on_host + offloaded * tokens),
    )


def block_kept(model: ModelConfig, wide: int, checkpoint: bool, ffn: float = 1.0) -> int:
    """Bytes per token that a block keeps for its backward: with checkpointing its input and
    attention's result and log-sum-exp; else also both norms' inputs and outputs, q, k, v, and four
    of the feed-forward's width (gate, up, gate's silu, their product)."""
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    result = q * wide + 4 * model.heads
    if checkpoint:
        return model.dim * wide + result
    return int((4 * model.dim + q + 2 * kv + 4 * ffn * model.ffn_dim) * wide + result)


def _block_parameters(model: ModelConfig) -> int:
    attention = 2 * model.dim * model.head_dim * (model.heads + model.kv_heads)
    return attention + 3 * model.dim * model.ffn_dim


def _states(
    model: ModelConfig, config: DictConfig, wide: int, world: int, cp: int
) -> tuple[float, float]:
    """(on the device, in host memory) of weights, gradients and AdamW's state."""
    engine, n = config.engine, model.parameters
    if engine.name == "fsdp":  # float32 shards
        shards = cp if engine.shard == "context" else world
        total = n * 16 / shards
        gathered = wide * n if engine.zero_stage == 2 else 0
        return (gathered, total) if engine.offload_params else (gathered + total, 0)
    stage = engine.zero_stage
    weights = n * wide / (world if stage >= 3 else 1)
    gradients = n * wide / (world if stage >= 2 else 1)
    # AdamW's two moments in float32, and float32 weights beside bf16 ones.
    optimizer = n * (8 + (4 if wide == 2 else 0)) / (world if stage >= 1 else 1)
    host = 0.0
    if engine.offload_optimizer or engine.offload_params:
        host, optimizer = host + optimizer, 0.0
        if stage >= 2:
            host, gradients = host + gradients, 0.0
    if engine.offload_params:
        host, weights = host + weights, 0.0
    return weights + gradients + optimizer, host
