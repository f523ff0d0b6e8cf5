"""From the command line to a typed run: hydra composes, the types of ``run`` check.
Every mistake is one line that names the key, what was given and what is legal, and is found before
torch.distributed or a model exists.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ringattn import typed
from ringattn.cost.hardware import Hardware, HardwareError
from ringattn.cost.presets import here
from ringattn.cost.presets import load as load_hardware
from ringattn.models import hf_config
from ringattn.models.lora_config import Lora
from ringattn.models.rope_config import RopeConfig
from ringattn.planning.head_split import check_degree
from ringattn.planning.layer_plans import NONE, ONE
from ringattn.refusal import advice
from ringattn.training.attention import Attention
from ringattn.training.engines import ENGINES
from ringattn.training.observing.loggers import LOGGERS
from ringattn.training.run import Model, TrainingRun, with_keys
from ringattn.typed import SettingsError

_REQUIRED = "<must be given>"


def register() -> None:
    """Hands hydra what the types say: the default of every key, and the groups that have no file.
    Needed before it composes, and harmless twice."""
    # For configs: ${required:} where the command line must say it (hydra's own ??? does not hide a
    # default); ${times:a,b}, as of the tokens of all ranks; ${stdlib:}, text that is everywhere.
    OmegaConf.register_new_resolver("required", lambda: _REQUIRED, replace=True)
    OmegaConf.register_new_resolver("times", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("stdlib", lambda: sysconfig.get_path("stdlib"), replace=True)
    store = ConfigStore.instance()
    store.store(name="keys", node=typed.defaults(TrainingRun))
    for group, kinds in (("engine", ENGINES), ("logger", LOGGERS)):
        for kind in kinds:
            store.store(group=group, name=kind.name, node=typed.defaults(kind))
    theirs = _open_keys(Model) | {"path": "${required:}", "lora": typed.defaults(Lora)}
    store.store(group="model", name="hf", node=theirs | {"unchanged": False})
    store.store(group="model", name="transformers", node=theirs | {"unchanged": True})


def _open_keys(kind: type) -> dict[str, Any]:
    """Null for every key: to be filled from somewhere else."""
    tree: dict[str, Any] = {}
    for key in typed.keys(kind):
        *path, name = key.name.split(".")
        inside = tree
        for part in path:
            inside = inside.setdefault(part, {})
        inside[name] = None
    return tree


def load(overrides: list[str]) -> TrainingRun:
    """The run of these arguments, every value checked. Raises SettingsError."""
    return typed.read(TrainingRun, composed(overrides))


def composed(overrides: list[str]) -> dict[str, Any]:
    """The keys as plain data, with what a model's folder says. Raises SettingsError."""
    free: list[str] = []  # of mappings with names of the user's own, which are replaced, not merged
    for override in list(overrides):
        if "=" not in override.lstrip("~")[1:] and not override.startswith("~"):
            raise SettingsError(f"{override!r} is not an override; write KEY=VALUE")
        key = override.split("=", 1)[0].lstrip("+~").split("@")[0]
        if any(f"{key}.".startswith(f"{name}.") for name in typed.free_names(TrainingRun)):
            free.append(override)
        else:
            groups = {*typed.groups(TrainingRun), "experiment"}
            typed.check_keys(TrainingRun, [key], groups)
            value = override.partition("=")[2].strip()
            if key in groups and value.startswith("["):
                raise SettingsError(f"{key}={value}: give one of: {', '.join(_choices(key))}")
    register()
    overrides = [quoted(override) for override in overrides if override not in free]
    try:
        with initialize_config_module("ringattn.configs", version_base="1.3"):
            config = compose("config", overrides)
            OmegaConf.resolve(config)
        tree = OmegaConf.to_container(config)
        for override in free:
            _put(tree, quoted(override))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise SettingsError(" ".join(lines)) from None
    for key, value in typed.values(tree):
        if value in (_REQUIRED, "???"):
            raise SettingsError(f"{key} must be given, as {key}=VALUE")
    layers = _fill_model(tree)
    attention = tree.get("attention")
    if isinstance(attention, dict) and tree["model"].get("unchanged") is True:
        usual = typed.defaults(Attention)
        for key in ("window", "sinks", "mask", "kinds", "pattern"):
            if attention.get(key) != usual[key]:
                raise SettingsError(
                    f"attention.{key}={attention[key]!r}: with model=transformers the masks are "
                    "the model's own"
                )
    if isinstance(attention, dict) and attention.get("window") == "auto":
        attention["window"] = None
        own = next((key for key in ("mask", "kinds") if attention.get(key) is not None), None)
        if own and layers.masks:
            raise SettingsError(
                f"attention.{own}={attention[own]!r}: the model has {layers.said}; say it there, "
                "and give attention.window=null"
            )
        if layers.pattern:
            attention |= {"kinds": layers.masks, "pattern": layers.pattern}
        elif layers.window is not None:
            attention["window"] = layers.window
        elif layers.masks:
            attention["mask"] = layers.masks[ONE]
    return tree


def _put(tree: dict[str, Any], override: str) -> None:
    """Sets what an override says of a mapping, or of one name in it."""
    parsed = OverridesParser.create().parse_override(override)
    *path, last = parsed.key_or_group.split(".")
    for part in path:
        tree[part] = inside = tree.get(part) if isinstance(tree.get(part), dict) else {}
        tree = inside
    if parsed.is_delete():
        tree.pop(last, None)
    else:
        tree[last] = parsed.value()


def quoted(override: str) -> str:
    """A mask, a token as <|endoftext|>, or sbatch's options, as hydra's grammar takes it: between
    quotes, where it has none."""
    key, equals, value = override.partition("=")
    kind = key.startswith("attention.kinds.") and key.count(".") == 2
    if (
        not (key in ("attention.mask", "data.end", "hydra.launcher.sbatch") or kind)
        or not equals
        or value[:1] in ("'", '"', "{")
    ):
        return override
    if value == "null":
        return override
    return f"{key}='{value}'"


def _fill_model(tree: dict[str, Any]) -> hf_config.Layers:
    """Takes what ``model.*`` leaves open from the config.json in ``model.path``; returns the masks
    of the model's layers. Of what is given there, only RoPE may differ: to extend the context.
    """
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        return hf_config.Layers()
    if model.get("unchanged") is True:
        return _fill_unchanged(model)
    with path_errors("model.path", model["path"]):
        try:
            read, layers = hf_config.read(Path(model["path"]).expanduser())
        except hf_config.UnknownModel as error:
            raise SettingsError(f"model.path: {error}") from None
    rope = read.pop("rope")
    for key, value in read.items():
        if model.get(key) is not None and model[key] != value:
            raise SettingsError(
                f"model.{key}={model[key]}: the model in model.path={model['path']} has {value}"
            )
        model[key] = value
    if isinstance(model.get("rope"), dict):
        same = model["rope"].get("type") in (None, rope["type"])
        usual = {f.name: f.default for f in fields(RopeConfig)}
        for key, value in model["rope"].items():
            keeps = same or key in ("theta", "original_length")
            if value is None and key in usual:
                model["rope"][key] = rope.get(key, usual[key]) if keeps else usual[key]
    return layers


def _fill_unchanged(model: dict[str, Any]) -> hf_config.Layers:
    """The same of a model that transformers makes; nothing that is given there may differ."""
    if importlib.util.find_spec("transformers") is None:
        raise SettingsError(f"model=transformers {advice('transformers')}")
    from ringattn.hf import describe  # here: it takes seconds

    path = Path(model["path"]).expanduser()
    with path_errors("model.path", model["path"]):
        (path / "config.json").stat()
        try:
            theirs = describe.config_of(path)
            masks, types = describe.masks(theirs)
            read = describe.sizes(theirs, _lora(model))
        except ValueError as error:
            raise SettingsError(f"model.path: {error}") from None
    usual = typed.defaults(Model)
    for key, value in model.items():
        if key in ("path", "unchanged", "lora"):
            continue
        own = read.get(key, usual.get(key))
        if isinstance(value, dict):  # of RoPE, where nothing is said
            value = {name: x for name, x in value.items() if x is not None}
        if value not in (None, {}, own):
            raise SettingsError(
                f"model.{key}={value}: with model=transformers it is what {path / 'config.json'} "
                f"says, {own}"
            )
        model[key] = own
    if all(mask == "causal" for mask in masks.values()):
        return hf_config.Layers()
    if len(masks) == 1 and isinstance(next(iter(masks.values())), str):
        return hf_config.Layers({ONE: next(iter(masks.values()))})
    return hf_config.Layers(masks, hf_config.shortest(types))


def _lora(model: dict[str, Any]) -> Lora | None:
    """The adapters that are asked for. Raises SettingsError."""
    try:
        lora = typed.read(Lora, model["lora"])
    except SettingsError as error:
        raise SettingsError(f"model.lora.{error}") from None
    if not lora.rank:
        return None
    if importlib.util.find_spec("peft") is None:
        raise SettingsError(f"model.lora.rank={lora.rank} {advice('peft')}")
    return lora


def resolved(run: TrainingRun, world: int, node_size: int | None = None) -> TrainingRun:
    """``run`` in a world of so many ranks: what depends on it is checked, and the defaults of
    ``parallel.cp`` and ``parallel.node_size`` are filled in. ``node_size``: ranks of a machine, by
    default those of this one. Raises SettingsError."""
    if run.ranks not in (None, world):
        raise SettingsError(f"ranks={run.ranks}: this run has {world}; start it with --multirun")
    if run.memory.loss == "liger" and importlib.util.find_spec("liger_kernel") is None:
        raise SettingsError(
            "memory.loss=liger: liger-kernel is not installed; pip install liger-kernel"
        )
    if run.model.unchanged and run.memory.ffn_tile is not None:
        raise SettingsError(
            f"memory.ffn_tile={run.memory.ffn_tile}: with model=transformers the feed-forward is "
            "theirs; give null"
        )
    hardware_of(run, world)
    cp = world if run.parallel.cp is None else run.parallel.cp
    if world % cp:
        legal = [d for d in range(1, world + 1) if world % d == 0]
        raise SettingsError(
            f"parallel.cp={cp} does not divide the world of {world} ranks; "
            f"choose one of: {', '.join(map(str, legal))}"
        )
    machine = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    node_size = run.parallel.node_size
    if node_size is None:
        node_size = math.gcd(machine, cp)
    if cp % node_size:
        legal = [d for d in range(1, cp + 1) if cp % d == 0]
        raise SettingsError(
            f"parallel.node_size={node_size} does not divide parallel.cp={cp}; "
            f"choose one of: {', '.join(map(str, legal))}"
        )
    if (ulysses := run.parallel.ulysses) is not None:
        try:
            check_degree(ulysses, cp, run.model.heads)
        except ValueError as error:
            raise SettingsError(f"parallel.{error}") from None
        if node_size % ulysses and ulysses % node_size:
            raise SettingsError(
                f"parallel.ulysses={ulysses} and parallel.node_size={node_size}: one must divide "
                "the other"
            )
    return with_keys(run, parallel={"cp": cp, "node_size": node_size})


def hardware_of(run: TrainingRun, world: int = 1) -> Hardware | None:
    """The description that ``hardware`` names; "auto" is that of this machine, if it has been
    measured, for so many ranks. Raises SettingsError, also where one that is named says nothing of
    so many."""
    name = run.hardware
    if name is None or (name == "auto" and not here().exists()):
        return None
    try:
        hardware = load_hardware("this" if name == "auto" else name)
        hardware.flops(run.precision)
        if name == "auto" and not hardware.covers(world):
            return None
        hardware.node(world)
    except HardwareError as error:
        advice = "; run ringattn calibrate again, or give hardware=null" if name == "auto" else ""
        raise SettingsError(f"{error}{advice}") from None
    return hardware


def without_effect(run: TrainingRun, done: int) -> list[str]:
    """A line for each key that is given and changes nothing in this run, of which so many steps
    are done."""
    attention, usual = run.attention, typed.defaults(TrainingRun)
    none_attends = set(attention.layers(run.model.layers)) <= {NONE, *attention.mixers}
    idle = {
        f"profile.steps={run.profile.steps}": run.profile.steps
        and (run.profile.steps[0] > run.train.steps or run.profile.steps[1] <= done)
        and f"this run makes steps {done + 1} to {run.train.steps}",
        f"attention.sinks={attention.sinks}": attention.sinks
        and attention.window in (None, "auto")
        and "there is no attention.window, and a text is attended from its beginning anyway",
        f"eval.probes={run.eval.probes}": run.eval.probes and not run.eval.every and "eval.every=0",
        f"eval.root={run.eval.root}": run.eval.root and not run.eval.every and "eval.every=0",
        f"parallel.ulysses={run.parallel.ulysses}": (run.parallel.ulysses or 1) > 1
        and none_attends
        and "no layer attends over a mask",
        f"train.sample_prompt={run.train.sample_prompt!r}": not run.train.sample_tokens
        and run.train.sample_prompt != usual["train"]["sample_prompt"]
        and "train.sample_tokens=0",
        f"checkpoint.keep={run.checkpoint.keep}": run.checkpoint.every is None
        and run.checkpoint.keep != usual["checkpoint"]["keep"]
        and "checkpoint.every=null",
        f"memory.loss_chunk={run.memory.loss_chunk}": run.memory.loss == "liger"
        and run.memory.loss_chunk
        and "memory.loss=liger chooses its own",
    }
    return [f"{key} has no effect: {why}" for key, why in idle.items() if why]


def as_yaml(run: TrainingRun) -> str:
    """Every key of the run with its value."""
    return yaml.safe_dump(asdict(run), sort_keys=False, width=100)


def help_text(tree: dict[str, Any]) -> str:
    """Groups and keys, each with its value in ``tree``, its meaning and what is legal."""
    lines = [
        "torchrun --nproc-per-node N train.py KEY=VALUE ...",
        "python train.py --multirun KEY=VALUE,VALUE ...   (a job for every point)",
        "",
    ]
    for group in ("model", "data", "attention", "memory", "engine", "logger", "experiment"):
        lines.append(f"{group}: {', '.join(_choices(group))}")
    lines += ["", "keys, with the values of this command line:", ""]
    before = None
    for key in typed.keys(TrainingRun, tree):
        *path, name = key.name.split(".")
        if path != before:
            lines += [""] if before is not None else []
            before = path
        value: Any = tree
        for part in (*path, name):
            value = value.get(part) if isinstance(value, dict) else None
        text = f"{key.meaning} ({typed.words(key.annotation)})"
        shown = yaml.safe_dump(value, default_flow_style=True, width=1000).split("\n")[0]
        lines += textwrap.wrap(
            f"{f'{key.name}={shown}':<36} {text}", 110, subsequent_indent=" " * 37,
            break_on_hyphens=False, break_long_words=False,
        )  # fmt: skip
    return "\n".join(lines)


def _choices(group: str) -> list[str]:
    """The names of a group: of files, and of types."""
    folder = files("ringattn.configs") / group
    names = [x.name for x in folder.iterdir()] if folder.is_dir() else []
    names += list(ConfigStore.instance().repo.get(group, {}))
    return sorted({x.removesuffix(".yaml") for x in names if x[0] not in "_."})


@contextmanager
def path_errors(key: str, value: Any) -> Iterator[None]:
    """Turns what a file system says about ``key`` into a SettingsError."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename and error.filename != value else ""
        raise SettingsError(f"{key}={value}: {where}{error.strerror}") from None
    except RuntimeError as error:  # "~nobody"
        raise SettingsError(f"{key}={value}: {error}") from None


def writable(run_dir: Path) -> None:
    """Raises OSError if nothing can be written at ``run_dir``; leaves nothing behind."""
    parent = run_dir
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    # Only a real attempt tells: access bits say nothing of read-only or special file systems.
    with tempfile.TemporaryDirectory(dir=parent):
        pass
