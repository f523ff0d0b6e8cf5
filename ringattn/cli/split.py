"""``ringattn plan model=... seq_len=... gpus=...``: the best split of a training run, on paper.
Needs no torch.
"""

from __future__ import annotations

import difflib
import json
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from ringattn import layouts, schedules
from ringattn.cli.request import Key, RequestError, choice, count, drawable, mask_of, parse
from ringattn.cost.model import Setup
from ringattn.cost.presets import load
from ringattn.cost.search import Answer, Question, search
from ringattn.cost.step import Prediction
from ringattn.models import hf_config
from ringattn.models.rope_config import RopeConfig
from ringattn.models.sizes import ModelConfig


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


_FIXED = {
    "cp": Key(count, None, "ranks that share a sequence"),
    "ulysses": Key(count, None, "ranks that split the heads among them"),
    "schedule": Key(choice(*schedules.BUILDERS), None, f"one of {', '.join(schedules.BUILDERS)}"),
    "layout": Key(choice(*layouts.NAMES), None, f"one of {', '.join(layouts.NAMES)}"),
    "engine": Key(choice("deepspeed", "fsdp"), None, "deepspeed or fsdp"),
    "zero_stage": Key(lambda text: int(choice("1", "2", "3")(text)), None, "1, 2 or 3"),
    "checkpoint": Key(_flag, None, "true or false"),
    "offload": Key(_flag, None, "activations to host memory: true or false"),
    "offload_params": Key(_flag, None, "weights and optimizer there: true or false"),
}
KEYS = {
    "model": Key(str, None, "a name in configs/model, or a folder with config.json"),
    "seq_len": Key(count, None, "tokens of a sequence, such as 128k or 1M"),
    "gpus": Key(count, 8, "ranks"),
    "hardware": Key(str, "h100", "h100, h200, b200, mi300x, this (ringattn calibrate), a file"),
    "mask": Key(str, "causal", "such as causal or 'sliding_window(n, 4096) | sinks(n, 4)'"),
    "precision": Key(choice("bf16", "fp32"), "bf16", "bf16 or fp32"),
    "vocab_size": Key(count, None, "tokens of the vocabulary; by default the model's"),
    "sequences": Key(count, None, "of an optimizer step; by default one per cp ranks"),
    **_FIXED,
}
_ROWS, _WIDTH = 10, 110


def _flags(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--trace", metavar="FILE", help="the best split's step, for Perfetto")
    parser.add_argument("--plot", metavar="FILE", help="draw the ranking (PNG, SVG)")


def run(arguments: Sequence[str]) -> int:
    """The command; 1 if nothing fits."""
    values, options = parse("plan", KEYS, arguments, _flags)
    for name in ("model", "seq_len"):
        if values[name] is None:
            raise RequestError(f"{name} must be given: {KEYS[name].text}")
    if options.plot:
        drawable(options.plot)
    if options.trace and not Path(options.trace).resolve().parent.is_dir():
        raise RequestError(f"--trace {options.trace}: no such folder")
    model = model_of(values["model"], values["vocab_size"])
    mask_of(values["mask"], values["seq_len"], 0)  # says what is wrong with it
    try:
        hardware = load(values["hardware"])
        question = Question(
            model=model,
            seq_len=values["seq_len"],
            ranks=values["gpus"],
            hardware=hardware,
            mask=lambda n: mask_of(values["mask"], n, n),
            precision=values["precision"],
            sequences=values["sequences"],
            fixed={name: values[name] for name in _FIXED if values[name] is not None},
        )
        hardware.flops(question.precision)
        answer = search(question)
    except ValueError as error:  # HardwareError too
        raise RequestError(str(error)) from None
    if answer.ranked and options.trace:
        from ringattn.cli.trace import write

        write(answer.ranked[0], question, Path(options.trace))
    if answer.ranked and options.plot:
        from ringattn.cli.splits_picture import draw  # matplotlib only where it is asked for

        draw(answer, question, options.plot)
    if options.json:
        print(json.dumps(_facts(answer, question)))
    else:
        _print(answer, question, values["model"])
    return 0 if answer.ranked else 1


def model_of(name: str, vocab_size: int | None = None) -> ModelConfig:
    """A model by its name in ringattn.configs, or by its Hugging Face folder. Raises
    RequestError."""
    folder = files("ringattn.configs") / "model"
    names = sorted(x.name.removesuffix(".yaml") for x in folder.iterdir() if x.name[0] != "_")
    names = [x for x in names if x not in ("hf", "__pycache__")]
    if name in names:
        sizes = yaml.safe_load((folder / "_base.yaml").read_text())
        own = yaml.safe_load((folder / f"{name}.yaml").read_text())
        rope = sizes["rope"] | own.pop("rope", {})
        sizes |= own | {"rope": rope}
        for key in ("path", "defaults"):
            sizes.pop(key, None)
    elif (Path(name).expanduser() / "config.json").exists():
        try:
            sizes, _ = hf_config.read(Path(name).expanduser())
        except (hf_config.UnknownModel, OSError) as error:
            raise RequestError(f"model={name}: {error}") from None
    else:
        near = difflib.get_close_matches(name, names, 3, 0.5) or names
        raise RequestError(
            f"model={name} is unknown; one of: {', '.join(near)}, or a folder with config.json"
        )
    if vocab_size:
        sizes["vocab_size"] = vocab_size
    return ModelConfig(**sizes | {"rope": RopeConfig(**sizes["rope"])})


def command(prediction: Prediction, model: str, seq_len: int) -> str:
    """The command that trains so."""
    s, node = prediction.setup, prediction.hardware.node_size
    nodes = f"--nnodes {s.world // node} " if s.world > node and s.world % node == 0 else ""
    name = model if not Path(model).is_dir() else f"hf model.path={model}"
    keys = [
        f"model={name}", f"seq_len={seq_len}", f"precision={s.precision}", f"parallel.cp={s.cp}",
        f"parallel.ulysses={s.ulysses}", f"parallel.schedule={s.schedule}",
        f"parallel.layout={s.layout}", f"engine={s.engine}", f"engine.zero_stage={s.zero_stage}",
        f"train.grad_accum={s.grad_accum}",
    ]  # fmt: skip
    keys += [f"engine.{k}=true" for k in ("offload_params", "offload_optimizer") if getattr(s, k)]
    keys += [f"engine.shard={s.shard}"] if s.shard != "world" else []
    keys += [f"memory.{k}=true" for k in ("checkpoint", "offload") if getattr(s, k)]
    keys += [f"memory.ffn_tile={s.ffn_tile}"] if s.ffn_tile else []
    keys += [f"memory.loss_chunk={s.loss_chunk}"] if s.loss_chunk else []
    return f"torchrun {nodes}--nproc-per-node {min(s.world, node)} train.py {' '.join(keys)}"


def memory_words(setup: Setup) -> str:
    """Engine and memory settings in a few words."""
    words = ["FSDP" if setup.engine == "fsdp" else f"ZeRO {setup.zero_stage}"]
    words += ["per sequence"] if setup.shard == "context" else []
    words += ["checkpoint"] if setup.checkpoint else []
    words += ["offload"] if setup.offload else []
    if setup.offload_optimizer or setup.offload_params:
        words.append("states on host")
    return " + ".join(words)


def _row(p: Prediction) -> dict[str, Any]:
    s = p.setup
    return {
        "cp": s.cp,
        "dp": s.world // s.cp,
        "ulysses": s.ulysses,
        "schedule": s.schedule,
        "layout": s.layout,
        "engine": s.engine,
        "zero_stage": s.zero_stage,
        "shard": s.shard,
        "checkpoint": s.checkpoint,
        "offload": s.offload,
        "offload_optimizer": s.offload_optimizer,
        "offload_params": s.offload_params,
        "ffn_tile": s.ffn_tile,
        "loss_chunk": s.loss_chunk,
        "grad_accum": s.grad_accum,
        **p.as_dict(),
    }


def _facts(answer: Answer, question: Question) -> dict[str, Any]:
    return {
        "seq_len": question.seq_len,
        "gpus": question.ranks,
        "hardware": question.hardware.name,
        "source": question.hardware.source,
        "parameters": question.model.parameters,
        "ranked": [_row(p) for p in answer.ranked],
        "stopped": {str(cp): why for cp, why in answer.stopped.items()},
        "longest_seq_len": answer.longest,
        "why": why(answer) if answer.ranked else None,
    }


def why(answer: Answer) -> str:
    """What the best split spends its time on, and what others lose."""
    best = answer.ranked[0]
    shares = sorted(best.parts.items(), key=lambda item: -item[1])
    words = [f"{name} {took / best.seconds:.1%}" for name, took in shares
             if took > 0.0005 * best.seconds]  # fmt: skip
    text = f"of the first one's step, {', '.join(words)}"
    last = answer.ranked[-1]
    behind = 1 - last.tokens_per_s / best.tokens_per_s
    if behind < 0.01:
        return f"{text}; all that fit are within {behind:.1%}, so take what suits your memory"
    seen = {_split(best)}
    for other in answer.ranked[1:]:
        behind = 1 - other.tokens_per_s / best.tokens_per_s
        if _split(other) in seen or behind < 0.01 or len(seen) > 3:
            continue
        seen.add(_split(other))
        lost = {name: took / other.tokens - best.parts[name] / best.tokens
                for name, took in other.parts.items()}  # fmt: skip
        worst = max(lost, key=lost.__getitem__)
        text += f"; {_split(other)} is {behind:.1%} slower, mostly by {worst}"
    return text


def _split(p: Prediction) -> str:
    return f"cp={p.setup.cp} {p.setup.schedule} {p.setup.layout}"


def _print(answer: Answer, question: Question, model: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    hardware = question.hardware
    console.print(
        f"{question.model.parameters / 1e9:.2f} B parameters, {question.seq_len:,} tokens a "
        f"sequence, {question.ranks} x {hardware.name} ({hardware.source})",
        soft_wrap=True,
    )
    if answer.ranked:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for title in ("cp x dp", "split", "step s", "tokens/s", "MFU", "exposed", "GiB", "memory"):
            side = "left" if title in ("split", "memory") else "right"
            table.add_column(title, justify=side, no_wrap=True)
        for p in answer.ranked[:_ROWS]:
            s = p.setup
            table.add_row(
                f"{s.cp} x {s.world // s.cp}", f"{s.schedule} {s.layout} u{s.ulysses}",
                f"{p.seconds:,.1f}", f"{p.tokens_per_s:,.0f}", f"{p.mfu:.1%}",
                f"{p.exposed / p.seconds:.1%}", f"{p.peak_memory / 2**30:.1f}", memory_words(s),
            )  # fmt: skip
        console.print(table)
        more = len(answer.ranked) - _ROWS
        if more > 0:
            console.print(f"and {more} more that fit (--json has all)")
        console.print(f"why: {why(answer)}", soft_wrap=True)
    for cp, reason in answer.stopped.items():
        console.print(f"cp={cp}: {reason}", soft_wrap=True)
    if answer.longest_setup:
        s = answer.longest_setup
        console.print(
            f"longest sequence that fits these ranks: {answer.longest:,} tokens (cp {s.cp}, "
            f"{memory_words(s)})"
        )
    if not answer.ranked:
        console.print("nothing fits: give more GPUs, or a shorter seq_len")
        return
    console.print(command(answer.ranked[0], model, question.seq_len), soft_wrap=True)
    console.print(
        "A step has one sequence per group of cp ranks and micro-step. MFU: 6 FLOPs per matmul "
        f"parameter and token plus 12 x pairs x heads x head_dim per layer, over "
        f"{hardware.flops(question.precision) / 1e12:,.4g} TFLOP/s a rank. Exposed: waiting for "
        "attention's exchanges.",
        soft_wrap=True,
    )
