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


PAGE = (ROOT / "docs/architecture.md").read_text()


def test_the_house_is_as_drawn():
    """Every file in the drawing exists, and every room and file of planning, execution and the top
    level is drawn."""
    (drawing,) = re.findall(r"```\n(train\.py.*?)```", PAGE, re.DOTALL)
    drawn, folders = set(), []
    for line in drawing.splitlines():
        indent, names = re.fullmatch(r"( *)(.*)", line).groups()
        folders = folders[: len(indent) // 2]
        for name in re.match(r"((?:[\w.]+\.py|\w+/)(?: +|$))+", names)[0].split():
            path = "".join([*folders, name])
            assert (ROOT / path).exists(), path
            drawn.add(path)
        first = names.split()[0]
        if first.endswith("/"):
            folders.append(first)
    for room in ("ringattn", "ringattn/planning", "ringattn/execution"):
        for path in (ROOT / room).iterdir():
            name = path.relative_to(ROOT).as_posix() + "/" * path.is_dir()
            if not path.name.startswith("__") and path.name not in (
                "comm.py",
                "refusal.py",
                "py.typed",
            ):
                assert name in drawn, f"docs/architecture.md does not draw {name}"


def test_the_example_prints_what_the_page_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/architecture.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_how_to_add_names_files_that_exist():
    (table,) = re.findall(r"## How to add\n\n(.*?)\n\n", PAGE, re.DOTALL)
    rows = table.splitlines()[2:]
    assert len(rows) == 13
    for row in rows:
        paths = re.findall(r"`((?:ringattn|kernels)/[\w/.]*)`", row)
        assert 1 <= len(paths) <= 2, row
        assert all((ROOT / path).exists() for path in paths), row
        file = (ROOT / paths[-1]).read_text() if paths[-1].endswith(".py") else ""
        for name in re.findall(r"`([A-Z]+)`", row):
            assert f"\n{name} = " in file, row


def test_a_missing_extra_is_one_line():
    blocked = {"deepspeed", "hydra", "omegaconf", "wandb", "matplotlib", "safetensors"}
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Missing())
import ringattn.context, ringattn.models.decoder
from ringattn.training.main import main
from ringattn.cli import main as cli
assert cli(["plan", "n=64", "world=2"]) == 0
assert main([]) == cli(["estimate"]) == cli(["report", "/tmp"]) == 2
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 3 and all("pip install 'ringattn[train]'" in line for line in lines)
