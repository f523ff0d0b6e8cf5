"""Unchanged models of transformers on split sequences: right beside one process, or refused."""

import copy
import importlib.util
import re
import sys

import pytest
import torch
import transformers

import ringattn as ra
from ringattn.execution.carriers import VirtualRank, VirtualWorld
from ringattn.hf import NotCovered, attention, check, local_batch, make_plans, proof, split_sequence
from ringattn.hf import router as router_loss

from .processes import ROOT

spec = importlib.util.spec_from_file_location("families", ROOT / "benchmarks/model_families.py")
families = importlib.util.module_from_spec(spec)
sys.modules["families"] = families
spec.loader.exec_module(families)
COVERED, REFUSED, LENGTHS = families.COVERED, families.REFUSED, families.LENGTHS


def is_right(name, cp, **as_make_plan):
    family = COVERED[name]
    want = families.in_one_process(family, LENGTHS)
    loss, grad, whose = families.errors(families.split(family, cp, LENGTHS, **as_make_plan), want)
    return loss <= 1e-5 and grad <= 2e-4, (name, cp, loss, grad, whose)


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("name", COVERED)
def test_loss_and_gradients_are_those_of_one_process(name, cp):
    right, told = is_right(name, cp)
    assert right, told


@pytest.mark.parametrize("schedule", ["ring", "double_ring", "all_gather", "direct", "auto"])
@pytest.mark.parametrize("name", ["gemma3", "llama4"])
def test_with_heads_split_and_every_schedule(name, schedule):
    right, told = is_right(
        name, 4, layout="balanced", schedule=schedule, ulysses=2, node_size=2, heads=4, kv_heads=2
    )
    assert right, told


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_with_its_reason(name):
    said = families.refusal(REFUSED[name])
    assert re.search(REFUSED[name].refused, said), said


def test_the_page_has_the_tables():
    page = (ROOT / "docs/models.md").read_text()
    for family in (*COVERED.values(), *REFUSED.values()):
        assert f"| {family.title} |" in page


def step(name, plans_of, cp=2, change=lambda batch, rank: None, lengths=(45,)):
    """What a training step raises, of virtual ranks."""
    family = COVERED[name]
    model = families.make(family, "ringattn")
    tokens, _, mask = families.whole(family, list(lengths))
    plans = plans_of(model, mask)

    def work(rank):
        own, batch = copy.deepcopy(model), dict(local_batch(plans, rank.rank, tokens))
        with split_sequence(own, plans, rank):
            keys = change(batch, rank.rank)
            with torch.set_grad_enabled(keys != "no gradient"):
                own(**batch, num_items_in_batch=44)

    VirtualWorld(cp, 60).run(work)


def usual(model, mask):
    return make_plans(model, mask, "zigzag", world=2)


def windows(by):
    """Plans of which the window is off."""

    def plans_of(model, mask):
        layout = ra.layouts.zigzag(mask.n_q, 2)
        window = ra.masks.sliding_window(mask.n_q, 9 + by)
        return ra.make_plans({"full_attention": mask, "sliding_attention": window}, layout)

    return plans_of


@pytest.mark.parametrize(
    ("plans_of", "shown"),
    [
        (windows(1), "sliding_window=9.*wider"),
        (windows(-1), "sliding_window=9.*narrower"),
        (
            lambda *x: dict(zip(usual(*x), reversed(usual(*x).values()), strict=True)),
            "wider",
        ),
        (lambda model, mask: usual(model, mask)["full_attention"], "wider"),
        (lambda model, mask: usual(model, mask)["sliding_attention"], "narrower"),
        (lambda model, mask: {"local": usual(model, mask)["full_attention"]}, "wider"),
    ],
    ids=["wider", "narrower", "swapped", "global for all", "local for all", "one kind only"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gemma2", "olmo3"])
def test_a_plan_that_is_not_the_layers_own_is_refused(name, plans_of, shown):
    with pytest.raises(ValueError, match=shown):
        step(name, plans_of)


def test_kinds_may_have_other_names():
    def plans_of(model, mask):
        plans = usual(model, mask)
        return {"a": plans["full_attention"], "b": plans["sliding_attention"]}

    step("gemma2", plans_of)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"attention_mask": lambda b: torch.ones_like(b["input_ids"]).tril(-1)}, "pack documents"),
        ({"position_ids": lambda b: b["position_ids"] + 1}, "are not those of the plan"),
        ({"position_ids": lambda b: torch.arange(b["input_ids"].shape[1])[None]}, "not those"),
        ({"position_ids": lambda b: None}, "position_ids are missing"),
        ({"cu_seq_lens_q": lambda b: torch.tensor([0, 20, 45])}, "cu_seq_lens_q"),
        ({"token_type_ids": lambda b: b["input_ids"]}, "token_type_ids"),
        ({"shift_labels": lambda b: None}, "labels without shift_labels"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_inputs_that_are_not_this_ranks_part_are_refused(change, shown):
    def apply(batch, rank):
        ((name, value),) = change.items()
        batch[name] = value(batch)

    with pytest.raises(ValueError, match=shown):
        step("llama", usual, change=apply)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda batch, rank: "no gradient" if rank else "", r"ranks \[1\] want none"),
        (lambda batch, rank: batch.update(past_key_values=cache()) if rank else "", "cached decod"),
        (lambda batch, rank: batch.pop("position_ids") if rank else "", "position_ids are missing"),
    ],
    ids=["no gradient", "cache", "positions"],
)
def test_what_is_wrong_on_one_rank_ends_all(change, shown):
    """Nobody waits for a rank that has refused: the limit of the world is never reached."""
    with pytest.raises((ValueError, ConnectionError), match=shown):
        step("llama", usual, change=change)


def cache():
    filled = transformers.DynamicCache()
    filled.update(*[torch.zeros(1, 2, 3, 8)] * 2, 0)
    return filled


def test_documents_have_one_source():
    n, lengths = 45, [20, 5, 20]
    layout = ra.layouts.zigzag(n, 2)
    tokens = torch.arange(n)[None]
    plan = ra.make_plan(ra.masks.documents(lengths), layout)
    batches = [local_batch(plan, rank, tokens) for rank in (0, 1)]
    positions = layout.unshard([batch["position_ids"] for batch in batches])
    assert positions[0].tolist() == [*range(20), *range(5), *range(20)]
    labels = layout.unshard([batch["shift_labels"] for batch in batches])
    assert (labels == -100).nonzero()[:, 1].tolist() == [19, 24, 44]
    local_batch(plan, 0, tokens, lengths=[20, 0, 5, 20])
    whole = ra.make_plan(ra.masks.causal(n), layout)
    for each, told in ((whole, lengths), (plan, [n]), (plan, [20, 25])):
        with pytest.raises(ValueError, match="lengths are of"):
            local_batch(each, 0, tokens, lengths=told)


def test_an_encoder_wants_a_mask_of_both_ways_and_a_decoder_does_not():
    encoder, decoder = (families.make(COVERED[x], "ringattn") for x in ("modernbert", "llama"))
    with pytest.raises(ValueError, match="attends both ways"):
        make_plans(encoder, ra.masks.causal(20), "zigzag", world=2)
    with pytest.raises(ValueError, match="is causal"):
        make_plans(decoder, ra.masks.prefix_lm(20, 5), "zigzag", world=2)


def test_a_mask_of_ones_own_is_what_all_layers_share():
    """Several answers to one question: narrower than causal, told to make_plans."""
    mask = ra.masks.shared_question(20, [10, 15])
    step("gemma2", lambda model, _: make_plans(model, mask, "zigzag", world=2))
    with pytest.raises(ValueError, match="narrower"):
        step("llama", lambda model, _: ra.make_plan(mask, ra.layouts.zigzag(45, 2)))


def test_images_are_refused():
    text = families.WINDOW | {"num_hidden_layers": 2}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=60
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation="ringattn"
    )
    plans = make_plans(model, ra.masks.causal(12), "zigzag", world=1)
    tokens = torch.arange(12)[None]
    pictures = {"pixel_values": torch.zeros(1, 3, 28, 28), "token_type_ids": (tokens == 3).long()}
    for name, value in pictures.items():
        with split_sequence(model, plans), pytest.raises(ValueError, match=f"{name}.*not covered"):
            model(**local_batch(plans, 0, tokens), **{name: value})


def run_check(name):
    model = families.make(COVERED[name], "ringattn")
    plans = make_plans(model, ra.masks.documents(LENGTHS), "zigzag", world=2)
    VirtualWorld(2, 60).run(lambda rank: check(copy.deepcopy(model), plans, rank))


def test_the_proof_sees_attention_that_is_not_the_models(monkeypatch):
    """Every fault here passes the comparison of masks, with a plausible loss."""
    run_check("gemma2")
    true = attention.ring_attention
    faults = {
        "no softcap": lambda *a, **k: true(*a, **k | {"softcap": None}),
        "another scale": lambda q, k, v, plan, group, kernel, scale, **o: true(
            q, k, v, plan, group, kernel, 2 * scale, **o
        ),
        # Half precision would not see this one.
        "a scale a little off": lambda q, k, v, plan, group, kernel, scale, **o: true(
            q, k, v, plan, group, kernel, 1.03 * scale, **o
        ),
        "own shard only": lambda q, k, v, plan, group, kernel, scale, **o: true(
            q, k, v, ra.make_plan(ra.masks.causal(q.shape[1]), ra.layouts.zigzag(q.shape[1], 1)),
            VirtualRank(VirtualWorld(1), 0), kernel, scale, **o
        ),
    }  # fmt: skip
    for fault in faults.values():
        monkeypatch.setattr(attention, "ring_attention", fault)
        with pytest.raises(ValueError, match="the split model is not the model"):
            run_check("gemma2")


def test_the_proof_sees_a_layer_with_the_wrong_plan(monkeypatch):
    """The comparison of masks switched off: the outputs still tell."""
    for name in ("differences", "_first_difference"):
        monkeypatch.setattr(f"ringattn.hf.kinds.{name}", lambda *_: None)
    model = families.make(COVERED["gemma2"], "ringattn")
    plans = make_plans(model, ra.masks.causal(45), "zigzag", world=2)
    swapped = dict(zip(plans, reversed(plans.values()), strict=True))
    with pytest.raises(ValueError, match="the split model is not the model"):
        VirtualWorld(2, 60).run(lambda rank: check(copy.deepcopy(model), swapped, rank))


def test_a_router_loss_per_rank_would_show(monkeypatch):
    monkeypatch.setattr(router_loss, "over_all_tokens", lambda *_: None)
    right, _ = is_right("qwen3-moe", 2)
    assert not right


def test_the_proof_runs_once_before_the_first_step(monkeypatch):
    calls = []
    monkeypatch.setattr("ringattn.hf.split.compare", lambda *_: calls.append(1) or True)
    model = families.make(COVERED["llama"], "ringattn")
    tokens, _, mask = families.whole(COVERED["llama"], [45])
    plans = usual(model, mask)

    def work(rank):
        own = copy.deepcopy(model)
        for _ in range(3):
            with split_sequence(own, plans, rank):
                batch = local_batch(plans, rank.rank, tokens)
                own(**batch, num_items_in_batch=44).loss.backward()

    VirtualWorld(2, 60).run(work)
    assert len(calls) == 2  # once on each rank


def test_a_router_that_drops_tokens_is_refused():
    class Dropping(torch.nn.Module):
        """Only the first four tokens that choose an expert get it."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            chosen = (x.sum(-1) > 0).long()
            place = torch.where(chosen == 1, chosen.cumsum(1), (1 - chosen).cumsum(1))
            return self.inner(x) * (place <= 4)[..., None]

    model = families.make(COVERED["llama"], "ringattn")
    model.model.layers[1].mlp = Dropping(model.model.layers[1].mlp)
    plans = make_plans(model, ra.masks.causal(20), "zigzag", world=1)
    batch = local_batch(plans, 0, torch.arange(20)[None])
    with (
        split_sequence(model, plans),
        pytest.raises(NotCovered, match=r"layers\.1\.mlp \(Dropping\)"),
    ):
        model(**batch)


def on_two_ranks(model, plans, work):
    """``work(own copy, rank)`` on two virtual ranks."""
    return VirtualWorld(2, 60).run(lambda rank: work(copy.deepcopy(model), rank))


def test_a_hole_in_a_plan_is_seen_wherever_it_is():
    """Of 500 queries five do not attend one key: no row that is sampled."""
    model = families.make(COVERED["llama"], "ringattn")
    n = 500
    hole = ra.masks.causal(n) - ra.masks.from_slices([((301, 306), (40, 41), None, None)], n, n)
    plan = ra.make_plan(hole, ra.layouts.zigzag(n, 2))
    tokens = torch.arange(n)[None] % 61

    def work(own, rank):
        with split_sequence(own, plan, rank):
            own(**local_batch(plan, rank.rank, tokens), num_items_in_batch=n - 1)

    with pytest.raises(ValueError, match=r"narrower.* token 30\d attends token 40 in the layer"):
        on_two_ranks(model, plan, work)


class Careless(transformers.LlamaForCausalLM):
    """Its loss is a mean over the tokens that it sees, whatever it is told."""

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_loss_that_ignores_the_count_is_seen_whatever_came_before():
    config = COVERED["llama"].config()
    model = Careless._from_config(config, attn_implementation="ringattn")
    tokens, _, mask = families.whole(COVERED["llama"], [45])
    plans = usual(model, mask)

    def work(own, rank):
        batch = local_batch(plans, rank.rank, tokens)
        plain = {k: x for k, x in batch.items() if "labels" not in k}
        with split_sequence(own, plans, rank):
            with torch.no_grad():
                own(**plain)
            own(**batch, num_items_in_batch=44)

    with pytest.raises(ValueError, match="it ignores one of them"):
        on_two_ranks(model, plans, work)


@pytest.mark.parametrize("what", ["num_items_in_batch", "sequences in the batch"])
def test_ranks_that_are_told_different_things_are_refused(what):
    model = families.make(COVERED["llama"], "ringattn")
    tokens, _, mask = families.whole(COVERED["llama"], [45])
    plans = usual(model, mask)

    def work(own, rank):
        twice = what.startswith("seq") and rank.rank
        batch = local_batch(plans, rank.rank, tokens.repeat(1 + bool(twice), 1))
        count = 44 if what.startswith("seq") else 22 + rank.rank  # its own tokens
        with split_sequence(own, plans, rank):
            own(**batch, num_items_in_batch=count)

    with pytest.raises(ValueError, match=f"must have the same {what}"):
        on_two_ranks(model, plans, work)


def test_a_recomputation_with_a_later_plan_is_refused():
    model = families.make(COVERED["llama"], "ringattn")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, _, mask = families.whole(COVERED["llama"], [45])
    both = [usual(model, mask), usual(model, ra.masks.documents([20, 25]))]

    def work(own, rank):
        losses = []
        for plans in both:
            with split_sequence(own, plans, rank):
                batch = local_batch(plans, rank.rank, tokens)
                losses.append(own(**batch, num_items_in_batch=43).loss)
                if plans is both[1]:
                    sum(losses).backward()

    with pytest.raises(RuntimeError, match="with the plan of a later forward"):
        on_two_ranks(model, both, work)


def test_a_loss_of_ones_own_has_the_router_loss_once():
    family = COVERED["mixtral"]
    whole = families.make(family, "eager")
    tokens, _, mask = families.whole(family, [45])
    out = whole(input_ids=tokens)
    out.aux_loss.backward()
    model = families.make(family, "ringattn")
    plans = usual(model, mask)

    def work(own, rank):
        batch = local_batch(plans, rank.rank, tokens)
        with split_sequence(own, plans, rank):
            aux = own(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).aux_loss
            aux.backward()
        return aux.detach(), own.model.layers[1].mlp.gate.weight.grad

    values, grads = zip(*on_two_ranks(model, plans, work), strict=True)
    assert sum(values) == pytest.approx(float(out.aux_loss.detach()), rel=1e-5)
    want = whole.model.layers[1].mlp.gate.weight.grad
    assert (sum(grads) - want).norm() <= 2e-4 * want.norm()


def test_labels_of_an_encoder_are_not_shifted():
    family = COVERED["modernbert"]
    tokens, labels, mask = families.whole(family, LENGTHS)
    count = int((labels != -100).sum())
    model = families.make(family, "ringattn")
    plans = usual(model, mask)

    def work(own, rank):
        batch = local_batch(plans, rank.rank, tokens, labels)
        assert "shift_labels" not in batch
        with split_sequence(own, plans, rank):
            with pytest.raises(ValueError, match="num_items_in_batch is missing"):
                own(**batch)
            return own(**batch, num_items_in_batch=count).loss.detach()

    want, _ = families.in_one_process(family, LENGTHS)
    assert sum(on_two_ranks(model, plans, work)) == pytest.approx(want, rel=1e-5)


def test_under_autocast_and_in_half_precision():
    """RoPE leaves q and k in float32 there; and experts flip by rounding."""
    for name in ("gemma3", "mixtral"):
        model = families.make(COVERED[name], "ringattn")
        tokens, _, mask = families.whole(COVERED[name], LENGTHS)
        plans = usual(model, mask)

        def work(own, rank, plans=plans, tokens=tokens, half=name == "mixtral"):
            own = own.bfloat16() if half else own
            with (
                split_sequence(own, plans, rank),
                torch.autocast("cpu", torch.bfloat16, enabled=not half),
            ):
                out = own(**local_batch(plans, rank.rank, tokens), num_items_in_batch=54)
                out.loss.backward()
            return out.loss.detach()

        want, _ = families.in_one_process(COVERED[name], LENGTHS)
        assert sum(on_two_ranks(model, plans, work)) == pytest.approx(want, rel=0.05)


class Wrapped(torch.nn.Module):
    """As trainers do: the model is called by something else, with a batch of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch["input_ids"], None, batch["position_ids"]).logits.sum()


@pytest.mark.parametrize("wrap", [lambda x: x, Wrapped, lambda x: Wrapped(Wrapped(x).model)])
def test_wrappers_and_positional_arguments(wrap):
    model = wrap(families.make(COVERED["llama"], "ringattn"))
    tokens, _, mask = families.whole(COVERED["llama"], [45])
    plans = usual(model, mask)

    def work(own, rank):
        batch = local_batch(plans, rank.rank, tokens)
        with split_sequence(own, plans, rank):
            if isinstance(own, Wrapped):
                own(batch).backward()
            else:
                own(batch["input_ids"], None, batch["position_ids"]).logits.sum().backward()
            with pytest.raises(RuntimeError, match="already"), split_sequence(own, plans, rank):
                pass
        assert not any("_ringattn_split" in module.__dict__ for module in own.modules())

    on_two_ranks(model, plans, work)


def test_what_pools_or_counts_from_elsewhere_or_has_no_token_is_refused():
    config = COVERED["llama"].config()
    pools = transformers.LlamaForSequenceClassification._from_config(
        config, attn_implementation="ringattn"
    )
    sizes = {k: x for k, x in families.PLAIN.items() if k != "num_key_value_heads"}
    sizes |= {"pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    away = transformers.RobertaForMaskedLM._from_config(
        transformers.RobertaConfig(**sizes), attn_implementation="ringattn"
    )
    for model, mask, shown in (
        (pools, ra.masks.causal(45), "gives nothing by token"),
        (away, ra.masks.full(45), "positions do not begin at 0"),
    ):
        plan = ra.make_plan(mask, ra.layouts.zigzag(45, 2))

        def work(own, rank, plan=plan):
            batch = local_batch(plan, rank.rank, torch.arange(45)[None])
            keys = {k: x for k, x in batch.items() if "labels" not in k}
            with split_sequence(own, plan, rank), torch.no_grad():
                own(**keys)

        with pytest.raises(ValueError, match=shown):
            on_two_ranks(model, plan, work)
    empty = ra.make_plan(ra.masks.causal(2), ra.layouts.contiguous(2, 3))
    with pytest.raises(ValueError, match="have no token"), split_sequence(pools, empty):
        pass
    with pytest.raises(ValueError, match="compile its layers"):
        make_plans(torch.compile(pools), ra.masks.causal(9), "zigzag", world=1)


def test_a_part_of_a_mask():
    mask = ra.masks.documents([5, 7, 9]) & ra.masks.dilated(21, 3, 2)
    for begin, n in ((0, 8), (5, 10), (12, 9)):
        want = mask.to_dense()[begin : begin + n, begin : begin + n]
        assert (proof.part(mask, begin, n).to_dense() == want).all()
