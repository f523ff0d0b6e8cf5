"""Trainers of transformers and TRL with split sequences, against themselves in one process."""

import importlib.util
import json
import math
import os
import socket
import sys
import types
from unittest.mock import patch

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st

from ringattn.hf.batches import Dealt, EvenEvaluation, pack
from ringattn.planning.balancing import deal, imbalance

from .processes import ROOT, launch

WORKER = ROOT / "tests/workers/trainers.py"
# What depends on the machine, or is a mean of ratios of micro-batches, of which there are others.
NOT_COMPARED = ("runtime", "per_second", "flos", "imbalance", "preparation_time")
# Saved after the second of four steps, and gone on with in another split of the same samples.
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
ACCUMULATED = {"gradient_accumulation_steps": 3}
UNPACKED = {"packing": False, "padding_free": True, "max_length": None,
            "per_device_train_batch_size": 2}  # fmt: skip

# By world: what is split, and how a plain trainer in one process differs from it.
CASES = {
    2: [
        {"name": "packed", "cp": 2, "generate": True},
        {"name": "fsdp2", "cp": 2, "engine": "fsdp2"},
        {"name": "zero3-lora", "cp": 2, "engine": "zero3", "lora": True},
        {"name": "assistant-unpacked", "cp": 2,
         "args": UNPACKED | ACCUMULATED | {"assistant_only_loss": True}},
        {"name": "moe-zero1", "cp": 2, "model": "moe", "engine": "zero1", "args": ACCUMULATED},
        {"name": "plain-softcap", "cp": 2, "trainer": "plain", "model": "gemma2", "predict": True,
         "samples": [24, 3], "args": {"per_device_train_batch_size": 2}},
        {"name": "dpo", "cp": 2, "trainer": "dpo", "lora": True, "split": {"unpad": True},
         "args": {"per_device_train_batch_size": 2}},
        {"name": "hybrid", "cp": 2, "model": "hybrid", "trainer": "plain"},
        {"name": "qlora", "cp": 2, "quantized": True, "lora": True},
        {"name": "bf16", "cp": 2, "args": {"bf16": True}},  # TRL's default
        {"name": "bf16-plain", "cp": 2, "trainer": "plain", "half": True, "args": {"bf16": True}},
        {"name": "saved", "cp": 2, "args": SAVED | {"gradient_accumulation_steps": 2}},
        {"name": "saved-fsdp2", "cp": 2, "engine": "fsdp2", "args": SAVED},
    ],
    3: [
        {"name": "gemma3-lora", "cp": 3, "model": "gemma3", "lora": True,
         "split": {"offload": True, "schedule": "direct", "layout": "zigzag"},
         "args": {"assistant_only_loss": True}},
        {"name": "moe-fsdp2", "cp": 3, "model": "moe", "engine": "fsdp2",
         "split": {"keep_attention": False}},
        {"name": "completion", "cp": 3, "data": "completions"},
        {"name": "zero2-own-loss", "cp": 3, "engine": "zero2", "trainer": "plain",
         "split": {"chunked_loss": False}},
        {"name": "resumed-fsdp2", "cp": 3, "engine": "fsdp2", "resume": "saved-fsdp2/checkpoint-2",
         "args": SAVED},
    ],
    4: [
        {"name": "data-ranks", "cp": 2, "samples": [40, 5], "args": ACCUMULATED},
        {"name": "gemma3-fsdp2", "cp": 2, "model": "gemma3", "engine": "fsdp2"},
        {"name": "dpo-data-ranks", "cp": 2, "trainer": "dpo", "lora": True,
         "split": {"unpad": True}, "samples": [24, 4]},
        {"name": "moe-zero2", "cp": 2, "model": "moe", "engine": "zero2",
         "samples": [40, 5], "args": ACCUMULATED},
        {"name": "plain-zero3", "cp": 2, "engine": "zero3", "trainer": "plain",
         "args": {"per_device_train_batch_size": 2}},
        {"name": "resumed", "cp": 2, "resume": "saved/checkpoint-2", "args": SAVED},
    ],
}  # fmt: skip
NAMES = [case["name"] for cases in CASES.values() for case in cases]


def in_one_process(case, world):
    """The same samples a step, by a plain trainer."""
    dp = world // case["cp"]
    args = dict(case.get("args", {}))
    args["gradient_accumulation_steps"] = args.get("gradient_accumulation_steps", 1) * dp
    args["per_device_eval_batch_size"] = dp
    without = ("cp", "split", "engine", "resume")
    return {k: x for k, x in case.items() if k not in without} | {"args": args}


def found(folder, name):
    read = json.loads((folder / name / "found.json").read_text())
    return read, torch.load(folder / name / "weights.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Everything is run once: {name: folder of a case}, and that of plain trainers."""
    folder = tmp_path_factory.mktemp("trainers")
    plain = [in_one_process(case, world) for world, cases in CASES.items() for case in cases]
    for world, cases in [(1, plain), *CASES.items()]:
        at = folder / ("plain" if world == 1 else "split")
        at.mkdir(exist_ok=True)
        status, output = launch(world, WORKER, at, json.dumps(cases))
        assert status == 0, output[-6000:]
    return folder


def same(a, b, name, tolerance=1e-5):
    assert math.isclose(a, b, rel_tol=tolerance, abs_tol=2e-6), (name, a, b)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_logged_and_trained_is_that_of_one_process(runs, name):
    (want, wanted), (got, weights) = (found(runs / kind, name) for kind in ("plain", "split"))
    assert len(want["logs"]) == len(got["logs"])
    data_ranks = name in [case["name"] for case in CASES[4]]
    for left, right in zip(want["logs"], got["logs"], strict=True):
        for key, value in left.items():
            if any(part in key for part in NOT_COMPARED):
                continue
            # A mean of ratios, and losses that are not sums, over other batches.
            # So is the share of an epoch, whose last batches data ranks fill up.
            # They begin anew with each call of train.
            if "resumed" in name and (key.endswith("num_tokens") or key == "train_loss"):
                continue
            mean_of_ratios = any(
                part in key for part in ("accuracy", "epoch", "logits/", "entropy")
            )
            if data_ranks and (mean_of_ratios or (key.startswith("eval") and "moe" in name)):
                continue
            # TRL keeps adapters beside quantised weights in bfloat16: a CPU with instructions for
            # it rounds products of other shapes otherwise, to the last of its 8 bits.
            bf16 = name in ("qlora", "bf16", "bf16-plain")
            rounding = 2**-7 if bf16 and key == "grad_norm" else 1e-4 if bf16 else 1e-5
            same(value, right[key], f"{name} {key}", rounding)
    assert wanted.keys() == weights.keys()
    for key, value in wanted.items():
        apart = (value - weights[key]).abs()
        if name.startswith("bf16"):  # three steps moved most weights by 9e-3; a few flip their sign
            assert apart.mean() <= 2e-4, (name, key)
            continue
        assert apart.max() <= (1e-3 if name == "qlora" else 1e-5), (name, key)
    for key in ("logits", "generated"):
        assert (key in want) == (key in got)
    if "generated" in want:
        assert want["generated"] == got["generated"]
    if "logits" in want:
        for left, right in zip(want["logits"], got["logits"], strict=True):
            assert torch.allclose(torch.tensor(left), torch.tensor(right), atol=1e-4)


@pytest.fixture(scope="module")
def workers():
    """The module of the runs, which sets the environment up for itself."""
    before = dict(os.environ)
    # One process, whatever other tests have left there; and a port of its own.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    with patch.object(sys, "path", [*sys.path]):
        spec = importlib.util.spec_from_file_location("trainers", WORKER)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    yield module
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def mistake(workers, tmp_path, **case):
    workers.forget()
    return workers.make_trainer({"cp": 1, **case}, tmp_path)


@pytest.mark.parametrize(
    ("case", "shown"),
    [
        ({"cp": 2}, "cp=2 must divide the 1 ranks; start the script with torchrun"),
        ({"args": {"max_length": 40}}, r"23 of 24 samples are longer than max_length=40 \(the lo"),
        ({"trainer": "dpo", "args": {"max_length": 20}}, "samples are longer than max_length=20"),
        ({"args": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor=0.1 does not go with"),
        ({"args": {"neftune_noise_alpha": 5}}, "neftune_noise_alpha=5.*noise is scaled by"),
        ({"args": {"accelerator_config": {"dispatch_batches": True}}}, "dispatch_batches=True"),
        ({"args": {"train_sampling_strategy": "batch_rebalance"}}, r"Split\(balance=True\)"),
        ({"trainer": "dpo", "args": {"precompute_ref_log_probs": True}}, "before sequences are s"),
        ({"args": {"activation_checkpointing_kwargs": {"offload": True}}}, r"Split\(offload=True"),
        ({"prompts": True}, "puts tokens of its own before a sequence"),
        ({"args": {"torch_compile": True}}, "torch_compile=True.*activation_checkpointing=False"),
        ({"attention": "sdpa"}, "made with attn_implementation='sdpa'; make it with"),
        ({"config": {"attention_dropout": 0.1}}, "attention_dropout=0.1: .*has no dropout"),
    ],
)
def test_a_mistake_is_one_line_before_data_is_read(workers, tmp_path, case, shown):
    with pytest.raises(ValueError, match=shown) as error:
        mistake(workers, tmp_path, **case)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "change", "shown"),
    [
        ({"args": {"packing": False, "max_length": None, "per_device_train_batch_size": 3}}, None,
         "tokens are padding; .*packing=True or padding_free=True"),
        ({"trainer": "plain"}, lambda batch: batch | {"labels": batch["labels"].roll(-1, 1)},
         "labels are those of the next token: they have been shifted"),
        ({"trainer": "plain"}, lambda batch: batch | {"labels": batch["labels"] * 0 - 1},
         "labels of -1: what is not supervised is -100"),
        ({"trainer": "plain"},
         lambda batch: batch | {"seq_idx": torch.ones_like(batch["position_ids"])},
         "seq_idx does not say the documents"),
        ({"trainer": "plain"}, lambda batch: batch | {"shift_labels": batch["labels"]},
         "shift_labels are given"),
        ({"trainer": "plain"}, lambda batch: batch | {"position_ids": batch["position_ids"] + 2},
         "do not count from 0 in each document"),
        ({"trainer": "plain"},
         lambda batch: batch | {"attention_mask": torch.full_like(batch["input_ids"], 2)},
         "packed documents are told by position_ids"),
    ],
)  # fmt: skip
def test_a_batch_that_is_not_as_it_should_be_is_one_line(workers, tmp_path, case, change, shown):
    trainer = mistake(workers, tmp_path, **case)
    if change is not None:
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: change(collate(rows))
    with pytest.raises(ValueError, match=shown) as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_another_number_of_samples_a_step_does_not_go_on(runs, workers, tmp_path):
    trainer = mistake(workers, tmp_path)
    trainer.args.gradient_accumulation_steps = 3
    with pytest.raises(ValueError, match="saved with 2 samples a step, and now there are 3"):
        trainer.train(str(runs / "split/saved/checkpoint-2"))


def flattened(rows):
    """A collator that does not look at seq_lengths."""
    return pack([{"input_ids": row["input_ids"]} for row in rows])


def test_samples_that_hold_documents_are_told_apart_or_refused(workers, tmp_path):
    # As TRL packs: the first row holds one document.
    rows = [{"input_ids": [*range(n)], "seq_lengths": x} for n, x in ((9, [9]), (9, [4, 5]))]
    data = workers.datasets.Dataset.from_list(rows)
    workers.forget()
    trainer = workers.make_trainer({"cp": 1, "trainer": "plain", "args": {"seed": 0}}, tmp_path)
    for kind in (data, data.to_iterable_dataset(num_shards=2)):
        trainer.train_dataset, trainer.data_collator = kind, flattened
        with pytest.raises(ValueError, match="documents would see each other"):
            list(trainer.get_train_dataloader())
        trainer.data_collator = pack
        found = [batch["position_ids"][0].tolist() for batch in trainer.get_train_dataloader()]
        assert sorted(found) == [[0, 1, 2, 3, 0, 1, 2, 3, 4], [*range(9)]]
    for row, shown in (
        ({"input_ids": [1, 2], "seq_lengths": [1]}, "2 input_ids and 1 position_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "these are padded"),
        ({"input_ids": [1, 2], "pixels": [1]}, "these have pixels"),
    ):
        with pytest.raises(ValueError, match=shown):
            pack([row])


def test_a_collator_that_is_chosen_stays(workers, tmp_path):
    workers.forget()
    args = workers.transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    kind = type("Long", (workers.ringattn.hf.SplitSequences, workers.transformers.Trainer), {})
    split, model = workers.ringattn.hf.Split(1), workers.make_model("llama", "ringattn")
    chosen = workers.transformers.DataCollatorWithPadding(workers.tokenizer())
    assert kind(model, args, chosen, split=split).data_collator is chosen
    assert kind(model, args, split=split).data_collator is pack


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_is_left_out_is_not_counted(workers, tmp_path, side):
    """Whatever a collator puts into labels there."""
    torch.manual_seed(0)
    rows = [torch.randint(3, 250, (n,)).tolist() for n in (6, 10, 20)]

    def collate(samples):
        batch = {"input_ids": [], "attention_mask": []}
        for sample in samples:
            empty = [0] * (20 - len(sample["input_ids"]))
            for name, x in (("input_ids", sample["input_ids"]), ("attention_mask", None)):
                x = [1] * len(sample["input_ids"]) if x is None else x
                batch[name].append([*empty, *x] if side == "left" else [*x, *empty])
        batch = {name: torch.tensor(x) for name, x in batch.items()}
        return batch | {"labels": batch["input_ids"]}

    case = {"cp": 1, "trainer": "plain", "split": {"unpad": True, "balance": False},
            "args": {"per_device_train_batch_size": 3, "max_steps": 1}}  # fmt: skip
    workers.forget()
    trainer = workers.make_trainer(case, tmp_path)
    trainer.train_dataset = workers.datasets.Dataset.from_list([{"input_ids": x} for x in rows])
    trainer.data_collator = collate
    trainer.train()
    model, losses = workers.make_model("llama", "eager"), []
    for row in rows:
        logits = model(torch.tensor([row])).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none")
        )
    same(float(torch.cat(losses).mean()), trainer.state.log_history[0]["loss"], side)


def test_evaluating_within_a_step_changes_nothing(workers, tmp_path):
    class Evaluates(workers.transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            trainer.evaluate()

    norms = []
    for callback in (None, Evaluates()):
        workers.forget()
        case = {"cp": 1, "trainer": "dpo", "lora": True, "samples": [8, 2],
                "split": {"unpad": True},
                "args": {"gradient_accumulation_steps": 2, "max_steps": 1}}  # fmt: skip
        trainer = workers.make_trainer(case, tmp_path)
        if callback:
            trainer.add_callback(callback)
        trainer.train()
        norms += [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    same(*norms, "grad_norm")


@pytest.mark.parametrize(("dp", "samples", "size"), [(2, 5, 1), (3, 7, 2), (2, 1, 4), (1, 5, 2)])
def test_an_evaluation_sees_every_sample_once(dp, samples, size):
    data = [{"input_ids": [i, i], "labels": [i, i]} for i in range(samples)]
    seen, steps = [], []
    for rank in range(dp):
        batches = torch.utils.data.BatchSampler(range(samples), size, False)
        shard = BatchSamplerShard(batches, dp, rank, even_batches=False)
        loader = torch.utils.data.DataLoader(data, batch_sampler=shard, collate_fn=pack)
        even = EvenEvaluation(loader, samples, size, dp, rank)
        each = [(even.real, batch) for batch in even]
        steps.append(len(each))
        for real, batch in each:
            supervised = batch["labels"][batch["labels"] != -100]
            assert len(supervised) == 2 * real
            seen += supervised[::2].tolist()
    assert sorted(seen) == list(range(samples)) and len(set(steps)) == 1


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 3),
    st.integers(1, 3),
)  # fmt: skip
def test_dealing_keeps_the_samples_and_never_makes_a_step_longer_than_by_chance(
    work, ranks, micro_steps, size
):
    count = ranks * micro_steps * size
    work = (work * count)[:count]
    dealt = deal(work, ranks, micro_steps, size)
    assert sorted(i for own in dealt for each in own for i in each) == list(range(count))
    assert all(len(each) == size for own in dealt for each in own)
    assert [len(own) for own in dealt] == [ranks] * micro_steps
    sums = np.array([[sum(work[i] for i in each) for each in own] for own in dealt])
    if size == 1:  # then no order has a shorter step
        longest = np.sort(np.array(work))[::-1][::ranks].sum()
        assert sums.max(1).sum() == pytest.approx(longest)
    assert imbalance(sums) >= 1 - 1e-9


def test_dealt_batches_take_turns_and_the_rest_stays():
    lengths = [9, 1, 1, 9, 5, 5, 2, 7, 3]
    batches = torch.utils.data.BatchSampler(range(9), 1, False)
    dealt = [index for (index,) in Dealt(batches, lengths.__getitem__, dp=2, micro_steps=2)]
    assert sorted(dealt[:4]) == [0, 1, 2, 3] and sorted(dealt[4:8]) == [4, 5, 6, 7]
    assert {dealt[0], dealt[1]} == {0, 3} and dealt[8] == 8


def test_the_plugin_for_axolotl_makes_its_trainer_split(workers, tmp_path, monkeypatch):
    """Beside a stand-in: axolotl wants other versions of everything than are tested here."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    trainers = types.ModuleType("axolotl.core.trainers.base")
    trainers.AxolotlTrainer = workers.transformers.Trainer
    for name in ("axolotl", "axolotl.integrations", "axolotl.core", "axolotl.core.trainers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, trainers.__name__, trainers)
    plugin = importlib.import_module("ringattn.hf.axolotl").RingattnPlugin()
    monkeypatch.delitem(sys.modules, "ringattn.hf.axolotl")
    cfg = types.SimpleNamespace(ringattn={"cp": 1, "unpad": True}, context_parallel_size=None)
    model = workers.make_model("llama", "sdpa")
    plugin.post_model_build(cfg, model)
    workers.forget()
    args = workers.transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    trainer = plugin.get_trainer_cls(cfg)(model, args)
    assert trainer.split.unpad and trainer.data_collator is pack
    assert plugin.get_trainer_cls(types.SimpleNamespace(ringattn=None)) is None
    cfg.context_parallel_size = 2
    with pytest.raises(ValueError, match=r"split by ringattn\.cp alone"):
        plugin.post_model_build(cfg, model)


def test_torch_compile_compiles_layers_and_changes_no_number(workers, tmp_path):
    losses = []
    for compiled in (False, True):
        workers.forget()
        args = {"torch_compile": compiled, "activation_checkpointing": False, "max_steps": 2}
        args |= {"torch_compile_backend": "eager"} if compiled else {}
        case = {"cp": 1, "trainer": "plain", "args": args}
        trainer = workers.make_trainer(case, tmp_path)
        trainer.train()
        layer = trainer.model.model.layers[0]
        assert hasattr(layer.__dict__.get("forward"), "_torchdynamo_orig_callable") == compiled
        assert not hasattr(trainer.model_wrapped, "_orig_mod")
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    for left, right in zip(*losses, strict=True):
        same(left, right, "loss")
