"""What was trained of a transformers model, as transformers or peft write it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from ringattn.hf.describe import PREFIX, config_of, empty_model
from ringattn.hf.weights import HubWeights
from ringattn.models.lora_config import Lora

Read = Callable[[str, torch.Size], torch.Tensor]


def export(
    original: Path,
    out: Path,
    read: Read,
    dtype: torch.dtype,
    shard_bytes: int,
    lora: Lora | None = None,
) -> int:
    """Writes the model of the folder ``original`` with other weights to ``out``; ``read(name,
    shape)``: a parameter by its name in training, float32. With ``lora`` those are adapters, and
    they are merged into the weights of the folder. The whole model is in host memory then, merged
    in float32. Returns the bytes of its tensors."""
    config = config_of(original)
    model, source = empty_model(config, weights=True), HubWeights(original, empty_model(config))
    with torch.no_grad():
        if lora is None:
            for name, p in model.named_parameters():
                p.data = read(PREFIX + name, p.shape).to(dtype)
        else:
            _merge(model, source, read, lora)
            for p in model.parameters():
                p.data = p.data.to(dtype)
        for name, value in source.buffers():
            model.get_buffer(name).copy_(value)
    model.tie_weights()
    config._attn_implementation = model.config._attn_implementation = None
    model.config.dtype = dtype
    model.save_pretrained(out, max_shard_size=shard_bytes)
    return sum(p.nbytes for p in model.parameters())


def _merge(model: PreTrainedModel, source: HubWeights, read: Read, lora: Lora) -> None:
    from ringattn.hf.lora import adapt, base_name, is_adapter  # here: peft is an extra

    handle = adapt(model, lora)
    for name, p in model.named_parameters():
        if is_adapter(name):
            p.data = read(PREFIX + name, p.shape)
        else:
            shape = tuple(p.shape)
            p.data = source.read("weight", base_name(name), shape, 0, p.numel()).view(shape)
    handle.merge_and_unload()


def export_adapters(original: Path, out: Path, read: Read, dtype: torch.dtype, lora: Lora) -> int:
    """Writes the adapters alone, as peft loads them beside ``original``. Returns their bytes."""
    from ringattn.hf.lora import adapt, is_adapter

    handle = adapt(empty_model(config_of(original)), lora)
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": read(PREFIX + name, p.shape).to(dtype)
        for name, p in handle.model.named_parameters()
        if is_adapter(name)
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = handle.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = str(original), True
    config.init_lora_weights = True  # of what would be added to them
    config.save_pretrained(out)
    return sum(tensor.nbytes for tensor in tensors.values())
