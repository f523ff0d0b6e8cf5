"""Builds the packages and tries them where nothing else of ours is.

    python tools/try_packages.py build               # dist/: sdist, wheel, and what is in them
    python tools/try_packages.py core                # the wheel alone, in an empty environment
    python tools/try_packages.py extras [NAME ...]   # each extra on top of it, by itself
    python tools/try_packages.py oldest              # the oldest set, with the tests of the core

Environments are made in a temporary folder and removed. TORCH_INDEX: an index with CPU builds of
torch. Without one, and without a GPU, the oldest set brings torch's CUDA build of some GB, if
ALLOW_CUDA=1 says that it may.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"

# What a user of each extra does first; run in a folder of its own, on the CPU.
EXTRAS = {
    "data": """
        from pathlib import Path
        from ringattn.cli import main
        Path("text").mkdir()
        Path("text/a.txt").write_text("the ring goes round " * 200)
        assert main(["bpe", "root=text", "vocab_size=280", "out=tokenizer.json"]) == 0
        made = ["root=text", "tokenizer=tokenizer.json", "out=tokens", "workers=1"]
        assert main(["tokenize", *made]) == 0
    """,
    "hf": """
        import torch, transformers
        import ringattn as ra
        import ringattn.hf
        config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=99,
            attn_implementation="ringattn")
        model = transformers.LlamaForCausalLM(config)
        plans = ra.hf.make_plans(model, ra.masks.causal(64), ra.layouts.zigzag(64, 1))
        batch = ra.hf.local_batch(plans, 0, torch.arange(64)[None] % 99)
        with ra.hf.split_sequence(model, plans):
            model(**batch, num_items_in_batch=63).loss.backward()
    """,
    "lora": """
        import peft, transformers
        import ringattn.hf
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=32,
            num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99))
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    """,
    "liger": "import liger_kernel, ringattn.models.loss",
    "fla": "import importlib.metadata as m; assert m.version('fla-core').startswith('0.6')",
    "train": """
        import json, os, subprocess, sys
        from pathlib import Path
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", "2", "-m", "ringattn.training", "train.steps=2", "seq_len=256",
            "run_dir=run", "train.sample_tokens=0"], check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 2
        from ringattn.cli import main
        assert main(["estimate", "model=8b", "precision=bf16", "seq_len=1M", "ranks=64",
            "engine=fsdp", "memory=long"]) == 0
        assert main(["report", "run"]) == 0 and Path("run/report/index.html").exists()
    """,
    "trl": """
        import trl, ringattn.hf
        class LongSFTTrainer(ringattn.hf.SplitSequences, trl.SFTTrainer): ...
    """,
}

# What the core promises, by docs/start.md.
CORE = """
    import importlib.util, subprocess, sys
    for name in ("deepspeed", "hydra", "wandb", "transformers", "matplotlib"):
        assert importlib.util.find_spec(name) is None, f"the core brings {name}"
    def ask(*words, status=0):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr
    loaded = ask("-X", "importtime", "-c", "import ringattn")
    assert "ringattn.make" in loaded and "torch" not in loaded.replace("ringattn", "")
    planned = ask("-X", "importtime", "-m", "ringattn", "plan", "n=4k", "world=8",
                  "schedule=direct", "mask=sliding_window(512) | sinks(4)", "--check")
    assert "check passed" in planned and "| torch" not in planned, planned
    assert "ok" in ask("-m", "ringattn", "verify", "mask=causal", "n=256", "ranks=4", "dtype=fp32")
    assert "torch" in ask("-m", "ringattn", "info")
    assert "ringattn[train]" in ask("-m", "ringattn", "estimate", "model=8b", status=2)
    assert "matplotlib" in ask("-m", "ringattn", "report", ".", status=2)
"""

# What needs nothing but the core and a test runner.
CORE_TESTS = [
    "tests/test_planning.py", "tests/test_attention.py", "tests/test_call.py",
    "tests/test_compile.py", "tests/test_union.py", "tests/test_mixers.py",
]  # fmt: skip


def run(*words: object, **options: object) -> None:
    subprocess.run([str(word) for word in words], check=True, **options)


def environment(folder: Path, constraints: str) -> Path:
    """An environment with the constrained torch; its Python."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    index = [os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    run(python, ROOT / "tools/install_torch.py", ROOT / constraints, *index)
    return python


def install(python: Path, what: str, constraints: str = "constraints.txt") -> None:
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / constraints, what)


def script(python: Path, code: str, folder: Path) -> None:
    """Runs it in a folder without a checkout."""
    folder.mkdir()
    away = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "WANDB_MODE": "offline",
    }
    run(python, "-c", textwrap.dedent(code), cwd=folder, env=os.environ | away)


def wheel() -> Path:
    (found,) = DIST.glob("ringattn-*.whl")
    return found


def build() -> None:
    """sdist, and the wheel that the sdist makes; both hold what they should and no more."""
    shutil.rmtree(DIST, ignore_errors=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # else files of earlier builds come along
    run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, stdout=subprocess.DEVNULL)
    (source,) = DIST.glob("ringattn-*.tar.gz")
    with zipfile.ZipFile(wheel()) as packed:
        in_wheel = set(packed.namelist())
    with tarfile.open(source) as packed:
        in_source = {name.split("/", 1)[-1] for name in packed.getnames()}
    folders = {"ringattn": "ringattn", "kernels": "ringattn/kernels", "configs": "ringattn/configs",
               "hydra_plugins": "hydra_plugins"}  # fmt: skip
    for folder, name in folders.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".json", ".typed"):
                inside = path.relative_to(ROOT / folder)
                assert f"{name}/{inside}" in in_wheel, f"the wheel lacks {folder}/{inside}"
                assert f"{folder}/{inside}" in in_source, f"the sdist lacks {folder}/{inside}"
    foreign = [
        x
        for x in in_wheel
        if not re.match(r"(ringattn|hydra_plugins|ringattn-[\d.]+\.dist-info)/", x)
    ]
    assert not foreign, f"the wheel holds {foreign}"
    print(f"{wheel().name}: {len(in_wheel)} files; {source.name}: {len(in_source)}")


def core(folder: Path) -> Path:
    python = environment(folder / "core", "constraints.txt")
    install(python, str(wheel()))
    run(python, "-m", "pip", "check")
    script(python, CORE, folder / "core-work")
    page = (ROOT / "docs/start.md").read_text()
    (folder / "quick.py").write_text("".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)))
    run(python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        folder / "quick.py", cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    print(
        "core: imports, plans without torch, verifies, explains what is missing; the loop of "
        "docs/start.md runs on 2 ranks"
    )
    return python


def extras(folder: Path, names: list[str]) -> None:
    python = core(folder)
    below = next((folder / "core/lib").glob("python*/site-packages"))
    for name in names:
        # The core's packages are seen, not installed again: an extra adds what it declares.
        run(sys.executable, "-m", "venv", folder / name)
        own = next((folder / name / "lib").glob("python*/site-packages"))
        (own / "core.pth").write_text(f"{below}\n")
        python = folder / name / "bin/python"
        install(python, f"{wheel()}[{name}]")
        script(python, EXTRAS[name], folder / f"{name}-work")
        print(f"extra {name}: installed and used")
        shutil.rmtree(folder / name)


def oldest(folder: Path) -> None:
    python = environment(folder / "oldest", "constraints-oldest.txt")
    install(python, str(wheel()), "constraints-oldest.txt")
    run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints-oldest.txt",
        "greenlet", "hypothesis", "pytest", "pytest-xdist")  # fmt: skip
    show = "import numpy, torch, triton; print(*(m.__version__ for m in (torch, triton, numpy)))"
    run(python, "-c", show)
    run(python.parent / "pytest", "-n", 2, "--dist", "loadgroup", *CORE_TESTS, cwd=ROOT)
    script(python, CORE, folder / "oldest-work")


def main(what: str, *names: str) -> int:
    if what == "build":
        build()
        return 0
    with tempfile.TemporaryDirectory(prefix="ringattn-") as name:
        folder = Path(name)
        if what == "extras":
            extras(folder, list(names or EXTRAS))
        else:
            {"core": core, "oldest": oldest}[what](folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
