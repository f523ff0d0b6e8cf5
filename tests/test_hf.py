"""Hugging Face checkpoints in and out, against transformers on the same weights."""

import json
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ringattn.cli import main as cli
from ringattn.execution.attention import ring_attention
from ringattn.execution.carriers import VirtualWorld
from ringattn.models import hf_config
from ringattn.models.decoder import Decoder, ModelConfig, shapes
from ringattn.models.hf_weights import Pretrained
from ringattn.models.rope import frequencies, rotation
from ringattn.models.rope_config import RopeConfig
from ringattn.strategy import Strategy
from ringattn.training import config
from ringattn.training.attention import Attention
from ringattn.typed import SettingsError

from .processes import metrics, train

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 300, "max_position_embeddings": 64, "head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "attn_implementation": "eager",
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-linear": transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=9),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=0
    ),
    "qwen3-yarn": transformers.Qwen3Config(**SIZES, rope_parameters=YARN),
    "qwen2-mixed": transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "gemma2": transformers.Gemma2Config(
        **SIZES, sliding_window=7, query_pre_attn_scalar=25, attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, sliding_window=7, layer_types=["sliding_attention"] * 2 + ["full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        },
    ),
    "olmo3": transformers.Olmo3Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}, sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            "full_attention": YARN | {"rope_theta": 5e5},
        },
    ),
}  # fmt: skip


def make(config, folder):
    """A random model of transformers whose every weight matters, saved in several files."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder, max_shard_size="100kB")
    return model


def load(folder):
    keys, layers = hf_config.read(folder)
    config = ModelConfig(**keys)
    source = Pretrained(folder, shapes(config))
    attention = Attention(**_keys(layers))
    model = Decoder(config, None, None, attention.layers(config.layers))
    with torch.no_grad():
        for name, p in model.named_parameters():
            half = p.numel() // 2
            parts = [
                source.read("weight", name, tuple(p.shape), start, count)
                for start, count in ((0, half), (half, p.numel() - half))
            ]
            p.copy_(torch.cat(parts).view(p.shape))
    return model, attention


def _keys(layers):
    """What config.load makes of them."""
    if layers.pattern:
        return {"kinds": layers.masks, "pattern": layers.pattern, "window": None}
    return {"window": layers.window}


def split_logits(model, attention, tokens, cp):
    n = tokens.shape[1]
    plans = Strategy(cp).plans(attention.masks([n], n), model.kinds)

    def work(rank):
        own = torch.from_numpy(plans.layout.positions(rank.rank))
        attend = {
            kind: partial(ring_attention, plan=plan, group=rank) for kind, plan in plans.items()
        }
        with torch.no_grad():
            return model(tokens[:, own], own, attend)

    return plans.layout.unshard(VirtualWorld(cp).run(work), 1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    theirs = make(MODELS[name], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours, attention = load(tmp_path)
    window = getattr(MODELS[name], "sliding_window", None) if "window" in name else None
    assert attention.window == window
    types = getattr(MODELS[name], "layer_types", None) or ["full_attention"]
    assert (len(set(types)) > 1) == (attention.kinds is not None)
    tokens = torch.randint(300, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(tokens).logits
    for cp in (1, 4):
        got = split_logits(ours, attention, tokens, cp)
        assert (got - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1), (name, cp)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        LLAMA3 | {"original_max_position_embeddings": 8192},
        YARN | {"original_max_position_embeddings": 4096, "factor": 32.0},
        YARN | {"original_max_position_embeddings": 4096, "beta_fast": 20.0, "beta_slow": 2.0,
                "attention_factor": 1.5},
    ],
    ids=lambda given: given["rope_type"],
)  # fmt: skip
def test_rope_tables_are_those_of_transformers(given, tmp_path):
    config = transformers.LlamaConfig(**{**SIZES, "head_dim": 128}, rope_parameters=dict(given))
    want, amplitude = ROPE_INIT_FUNCTIONS[given["rope_type"]](config, "cpu")
    config.save_pretrained(tmp_path)
    rope = RopeConfig(**hf_config.read(tmp_path)[0]["rope"])
    assert torch.allclose(frequencies(rope, 128).float(), want, rtol=1e-5, atol=0)
    assert rope.amplitude == pytest.approx(amplitude)
    position = torch.tensor([777])
    cos, _ = rotation(position, 128, rope)
    assert torch.allclose(cos[0, 0], (777 * want).cos() * amplitude, atol=1e-3)


def test_ntk_is_transformers_dynamic_at_that_length():
    length, trained, scaling = 4096, 512, 2.0
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": scaling}
    config = transformers.LlamaConfig(
        **{**SIZES, "max_position_embeddings": trained}, rope_parameters=dynamic
    )
    want, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
    factor = scaling * length / trained - (scaling - 1)
    got = frequencies(RopeConfig(type="ntk", factor=factor), 16)
    assert torch.allclose(got.float(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; legal: llama, mistral, qwen2, qwen3, gemma2"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 2}, "has more: 9 weights"),
        ({"num_hidden_layers": 4}, "lacks 9 weights"),
        ({"vocab_size": 290}, r"is \(300, 64\), not \(290, 64\)"),
        ({"rope_scaling": {"rope_type": "longrope"}, "rope_parameters": None}, "longrope"),
    ],
)
def test_what_this_decoder_is_not_is_refused(tmp_path, change, shown):
    make(MODELS["llama"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(hf_config.UnknownModel, match=shown):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    make(MODELS["llama"], tmp_path)
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(hf_config.UnknownModel, match=r"pytorch_model\.bin are not read"):
        load(tmp_path)


def test_settings_come_from_the_folder_and_rope_may_be_extended(tmp_path):
    make(MODELS["mistral-window"], tmp_path)
    keys = ["model=hf", f"model.path={tmp_path}"]
    run = config.load(keys)
    assert run.model.dim == 64 and run.attention.window == 9
    assert run.model.rope.type == "default" and run.model.rope.theta == 1e4
    assert config.load([*keys, "attention.window=null"]).attention.window is None
    longer = config.load([*keys, "model.rope.type=yarn", "model.rope.factor=8"]).model.rope
    assert (longer.type, longer.factor, longer.original_length) == ("yarn", 8, 64)
    for key, shown in (("model.dim=32", "model.dim=32"), ("model.path=/nowhere", "/nowhere")):
        with pytest.raises(SettingsError, match=shown):
            config.load([*keys, key])


def from_hf(name, tmp_path, text, *more):
    """Trains a saved model of the family on two ranks; what was printed."""
    make(MODELS[name], tmp_path / "in")
    keys = [
        "model=hf", f"model.path={tmp_path / 'in'}", "data=files", text, "seq_len=64",
        "logger=none", "train.sample_tokens=0", "train.steps=2", "peak_flops=1e9",
        f"run_dir={tmp_path / 'run'}", "optim.warmup_tokens=0", *more,
    ]  # fmt: skip
    status, output = train(2, *keys)
    assert status == 0, output
    return output


def assert_exported(folder):
    """Logits of transformers on what was exported, and ours on two ranks."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ours, attention = load(folder)
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        want = theirs(tokens).logits
    assert (split_logits(ours, attention, tokens, 2) - want).abs().max() < 1e-4 * want.abs().max()


def test_train_from_hf_export_and_load_again(tmp_path, text):
    from_hf("qwen3-yarn", tmp_path, text, "engine.zero_stage=3")
    assert metrics(tmp_path / "run")[0]["loss"] > 0
    export = [f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "dtype=float32"]
    assert cli(["export", *export, "shard_gb=0.0001"]) == 0
    assert cli(["export", *export]) == 2  # it is already there
    assert not list(tmp_path.glob("*.partial"))
    before, after = (
        {k: v for path in (tmp_path / x).glob("*.safetensors") for k, v in load_file(path).items()}
        for x in ("in", "out")
    )
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before)  # trained, all of it
    assert_exported(tmp_path / "out")
