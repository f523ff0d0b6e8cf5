"""Who may import whom: the table in CONTRIBUTING.md, kept true."""

import ast
import re
import subprocess
import sys

import pytest

from .processes import ROOT


def table():
    """{room: (rooms, packages) it may import}, read from CONTRIBUTING.md."""
    allowed = {}
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        cells = [re.findall(r"`(\w+)`", cell) for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0]:
            for room in cells[0]:
                allowed[room] = {*cells[2], room}, {*cells[3]}
    return allowed


MAY_IMPORT = table()


def modules():
    for top in ("ringattn", "kernels", "configs"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield parts[0] if top != "ringattn" else parts[1], path


def test_every_room_is_in_the_table():
    assert {room for room, _ in modules()} == set(MAY_IMPORT)
    assert all(rooms <= set(MAY_IMPORT) for rooms, _ in MAY_IMPORT.values())


def test_rooms_have_no_circle():
    """Of what they really import, at any level of a file."""
    found = {room: set() for room in MAY_IMPORT}
    for room, path in modules():
        for name in re.findall(r"^\s*from ringattn\.(\w+)", path.read_text(), re.MULTILINE):
            found[room].add(name)
        for names in re.findall(r"^\s*from ringattn import (.*)$", path.read_text(), re.MULTILINE):
            found[room] |= {name.split(" as ")[0].strip() for name in names.split(",")}
    while ends := [room for room, names in found.items() if not names - {room}]:
        for room in ends:
            del found[room]
        found = {room: names - {*ends} for room, names in found.items()}
    assert not found, f"rooms that import each other: {found}"


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
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            names = [x.value for x in node.args[:1] if isinstance(x, ast.Constant)]
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
