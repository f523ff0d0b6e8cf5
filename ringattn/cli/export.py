"""``ringattn export``: a training checkpoint as a Hugging Face folder."""

from __future__ import annotations

import glob
import importlib.util
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ringattn import living
from ringattn.cli.request import Key, RequestError, choice, parse
from ringattn.data.records import has_file
from ringattn.data.shards import MANIFEST
from ringattn.data.tokenizer import BYTES, other_tokens, tokenizer_file
from ringattn.models import hf_config, hf_weights
from ringattn.models.decoder import ModelConfig, shapes
from ringattn.models.lora_config import Lora
from ringattn.training.attention import Attention
from ringattn.training.checkpoints import saver, states


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError("a number above 0")
    return size


KEYS = {
    "checkpoint": Key(str, None, "a checkpoints/step_N folder, or a run directory (its newest)"),
    "out": Key(str, None, "the folder to write; it may not exist yet"),
    "dtype": Key(choice("bfloat16", "float16", "float32"), "bfloat16", "of the weights"),
    "shard_gb": Key(_size, 5.0, "the largest file, in GB"),
    "tokenizer": Key(str, None, "a folder or a tokenizer.json, copied along"),
    "lora": Key(
        choice("merged", "adapters"),
        "merged",
        "of a run with model.lora: the model with its adapters merged, or they alone, for peft",
    ),
}


def run(arguments: Sequence[str]) -> int:
    """The command. Nothing is at ``out`` unless it is whole."""
    values, _ = parse("export", KEYS, arguments, lambda parser: None)
    for key in ("checkpoint", "out"):
        if values[key] is None:
            raise RequestError(f"{key} must be given: {KEYS[key].text}")
    try:
        path, size, step = _export(values)
    except (ValueError, OSError) as error:
        raise RequestError(str(error)) from None
    print(json.dumps({"out": values["out"], "from": str(path), "step": step, "bytes": size}))
    return 0


def _export(values: dict[str, Any]) -> tuple[Path, int, int]:
    out = Path(values["out"])
    if out.exists():
        raise ValueError(f"out={out} is already there")
    tokenizer = _tokenizer_files(values["tokenizer"])
    sound, _ = saver.find(values["checkpoint"], Path(values["checkpoint"]), "checkpoint")
    path, manifest = sound[0]
    if tokenizer:
        _check_tokenizer(values["tokenizer"], path)
    unchanged = manifest.model.get("unchanged", False)
    lora = Lora(**manifest.model["lora"]) if "lora" in manifest.model else None
    if values["lora"] == "adapters" and lora is None:
        raise ValueError(f"lora=adapters: {path} has none")
    if not unchanged:
        attention = Attention(**manifest.attention)
        if others := attention.mixers | attention.sets:
            kind, mixer = next(iter(others.items()))
            raise ValueError(
                f"attention.kinds.{kind}: a {mixer.mixer} of this decoder has no place in a "
                "Hugging Face config"
            )
        kinds = attention.layers(manifest.model["layers"])
        masks = [attention.texts[kind] for kind in kinds]
        hf_config.family_of(manifest.model, masks)  # raises before anything is written
    for name, (_, digest) in manifest.files.items():
        if states.digest(path / name) != digest:
            raise ValueError(f"{path / name} has changed since it was written")
    dtype = getattr(torch, values["dtype"])
    draft = living.draft(out)
    for left in living.abandoned(out.parent, f"{glob.escape(out.name)}.*"):
        shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)
    shard = int(values["shard_gb"] * 1e9)
    with states.Saved([path / name for name in sorted(manifest.files)]) as saved:
        if unchanged:
            from ringattn.hf.export import export, export_adapters  # here: transformers is an extra

            def read(name: str, shape: torch.Size) -> torch.Tensor:
                return saved.read("weight", name, tuple(shape), 0, shape.numel()).view(shape)

            original = _original(path, manifest)
            if values["lora"] == "adapters":
                size = export_adapters(original, draft, read, dtype, lora)
            else:
                size = export(original, draft, read, dtype, shard, lora)
        else:
            model = ModelConfig(**manifest.model)

            def weights() -> Iterator[tuple[str, torch.Tensor]]:
                for name, shape in shapes(model).items():
                    count = torch.Size(shape).numel()
                    yield name, saved.read("weight", name, shape, 0, count).view(shape).to(dtype)

            size = hf_weights.save(draft, weights(), shard)
            hf_config.write(draft, manifest.model, masks, kinds, manifest.seq_len, values["dtype"])
    if values["tokenizer"]:
        _special_tokens(Path(values["tokenizer"]), draft / "config.json")
    for file in tokenizer:
        shutil.copy(file, draft)
    draft.rename(out)
    return path, size, manifest.step


def _original(checkpoint: Path, manifest: saver.Manifest) -> Path:
    """The folder that a run with model=transformers began with, as its config.yaml says. Raises
    ValueError if it is not there, or frozen weights are not what they were."""
    path = checkpoint.parent.parent / "config.yaml"
    keys = yaml.safe_load(path.read_text())
    folder = Path(keys["model"]["path"]).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}, which the run began with ({path}), is not there any more")
    if "frozen" in manifest.model:
        from ringattn.hf.lora import fingerprint  # here: peft is an extra

        if manifest.model["frozen"] != fingerprint(folder):
            raise ValueError(f"{folder} has other weights now than the run began with ({path})")
    return folder


def _tokenizer_files(tokenizer: str | None) -> list[Path]:
    if tokenizer is None:
        return []
    where = Path(tokenizer)
    if where.is_file():
        return [where]
    names = (
        "tokenizer*.json", "special_tokens_map.json", "tokenizer.model", "chat_template*",
        "generation_config.json",
    )  # fmt: skip
    files = [path for name in names for path in where.glob(name)]
    if not files:
        raise ValueError(f"tokenizer={where}: no tokenizer*.json there")
    return files


def _check_tokenizer(given: str, checkpoint: Path) -> None:
    """Raises ValueError if the run learned other tokens than those of a tokenizer, as far as its
    config.yaml leads to a tokenizer.json (data.tokenizer, or beside token shards) or says bytes."""
    config, own = checkpoint.parent.parent / "config.yaml", tokenizer_file(Path(given))
    if own is None or not config.is_file() or importlib.util.find_spec("tokenizers") is None:
        return
    data = yaml.safe_load(config.read_text())["data"]
    roots = [each.get("root") for each in data.get("mix") or [data]]
    shards = [root for root in roots if root and has_file(root, MANIFEST)]
    if data.get("format") != "tokens" and data.get("tokenizer") in (None, BYTES) and not shards:
        raise ValueError(f"tokenizer={given}: the run's tokens are bytes ({config})")
    told = [tokenizer_file(Path(x)) for x in (data.get("tokenizer"), *shards) if x]
    learned = next((file for file in told if file is not None), None)
    if learned and (different := other_tokens(learned, own)):
        raise ValueError(f"tokenizer={given} is not that of the run, {learned}: {different}")


def _special_tokens(source: Path, config: Path) -> None:
    """The ids of the model that the tokenizer is of, if its config.json is there."""
    path = source / "config.json"
    tokenizer_config = json.loads(path.read_text()) if path.is_file() else {}
    ids = {key: tokenizer_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
           if key in tokenizer_config}  # fmt: skip
    config.write_text(json.dumps(json.loads(config.read_text()) | ids, indent=2) + "\n")
