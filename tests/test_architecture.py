"""Who may import whom: the table in CONTRIBUTING.md, kept true."""

import ast
import subprocess
import sys

import pytest

from .processes import ROOT

PLANNING = {"runs", "masks", "layouts", "schedules", "plan"}
CORE = PLANNING | {"comm", "attention", "kernels"}
MAY_IMPORT = {  # room: (rooms of ringattn, packages beside the standard library)
    "planning": (PLANNING, {"numpy"}),
    "kernels": ({"kernels", "runs", "masks"}, {"torch", "triton", "einops", "numpy"}),
    "comm": (set(), {"torch"}),
    "attention": (CORE, {"torch", "einops"}),
    "context": (CORE, {"torch"}),
    "models": ({"models", "attention", "context"}, {"torch", "einops"}),
    "data": ({"data", "layouts", "context"}, {"numpy"}),
    "training": (CORE | {"context", "models", "data", "training"},
                 {"torch", "numpy", "deepspeed", "hydra", "omegaconf", "wandb", "rich"}),
    "__init__": (PLANNING | {"layouts", "masks"}, set()),
    "configs": (set(), set()),
}  # fmt: skip


def modules():
    for top in ("ringattn", "kernels", "configs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            room = parts[0] if top != "ringattn" else parts[1]
            yield "planning" if room in PLANNING else room, path


@pytest.mark.parametrize(("room", "path"), list(modules()), ids=lambda x: getattr(x, "name", x))
def test_imports_stay_in_bounds(room, path):
    rooms, packages = MAY_IMPORT[room]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "ringattn":
                names = [f"ringattn.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if top == "ringattn":
                assert rest and rest[0] in rooms, f"{path} ({room}) may not import {name}"
            elif top not in sys.stdlib_module_names:
                assert top in packages, f"{path} ({room}) may not import {name}"


def test_import_ringattn_stays_light():
    heavy = "{'torch', 'triton', 'deepspeed', 'hydra', 'wandb', 'einops'}"
    code = (
        f"import sys, ringattn; ringattn.masks.causal(3); print(sorted({heavy} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.stdout.strip() == "[]", run


def test_files_stay_small():
    for _, path in modules():
        assert len(path.read_text().splitlines()) <= 500, path


def test_the_checkout_does_not_shadow_packages():
    code = "import runpy; runpy.run_path('train.py'); import kernels"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "No module named 'kernels'" in run.stderr
