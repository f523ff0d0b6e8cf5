"""The launch table compiled for GPUs that are not here: nothing spills, nothing falls back."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from ringattn.kernels import launch, report, tune
from ringattn.kernels.launch import Launch
from ringattn.kernels.report import Case, Report

from ringattn.cli import main
from ringattn.cli.kernels import _facts

from .processes import PATIENCE_S, ROOT

COMPILED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
PASSES = {"forward", "backward_keys", "backward_queries"}


def kernels(*arguments):
    """`ringattn kernels` in a process where Triton compiles: (status, facts)."""
    done = subprocess.run(
        [sys.executable, "-m", "ringattn", "kernels", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=COMPILED,
        timeout=PATIENCE_S,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_nothing_spills_and_every_product_is_the_fastest_there_is():
    """Three architectures, fresh and adding: wgmma on sm_90, tcgen05 on sm_100, in all passes.
    CI runs the command on the whole table besides."""
    status, facts = kernels(
        "bits=16", "head_dim=64,128", "pointers=no", "softcap=no", "engine=triton"
    )
    assert [fact for fact in facts if fact["misses"]] == [] and status == 0
    seen = {(f["arch"], f["name"], f["head_dim"], f["adds"]) for f in facts}
    assert len(seen) == len(facts) == 3 * 3 * 2 * 2
    wanted = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}}
    for fact in facts:
        assert fact["spill"] == 0 and fact["shared"] <= fact["shared_limit"]
        assert set(fact["matrix"]) == wanted[fact["arch"]] and fact["mix"]["matrix"] > 0
        assert fact["mix"].get("spill", 0) == 0 and fact["programs"] >= 1
        # The loop over unmasked tiles has no mask in it: about what the algorithm takes.
        for kind, least in fact["needed"].items():
            # sm_100 has instructions for two floats at a time.
            packed = fact["arch"] == "sm_100" and kind == "float"
            found = fact["mix"][kind]
            assert least / (1 + packed) <= found <= 1.3 * least + 8, (fact, kind)


def test_heads_in_halves_and_views_that_no_descriptor_reads():
    """Heads in two halves, and masks that step: all products still wgmma."""
    status, facts = kernels(
        "arch=sm_90", "bits=16", "head_dim=96,192/128", "adds=no", "softcap=no", "engine=triton"
    )
    assert status == 0 and {f["pointers"] for f in facts} == {True, False}
    assert {f["name"] for f in facts} == PASSES


def test_the_gluon_kernels_take_as_few_instructions_as_the_best():
    """No spill in a loop, five products in the backward, none serialized; counts as in the bars."""
    status, facts = kernels("engine=gluon", "head_dim=128", "softcap=no")
    assert status == 0 and [fact["misses"] for fact in facts] == [[]] * 4
    for fact in facts:
        assert fact["mix"].get("spill", 0) == 0 and not fact["serialized"]
        # 64 x 128 pairs of a warpgroup: 8 + 8 products; 128 x 64 of two: 8 + 8 + 4 + 4 + 8.
        assert fact["mix"]["matrix"] == {"forward": 16, "backward": 32}[fact["name"]]


def test_prepare_compiles():
    script = """
import torch
from ringattn.kernels import report
from ringattn.kernels.triton import calls
for dtype in (torch.bfloat16, torch.float32):
    for dim in (64, 96, 256):
        x = torch.empty(2, 100, 4, dim, dtype=dtype, device="meta")
        rows = torch.empty(2, 4, 100, device="meta")
        for target, *_ in report.TARGETS.values():
            kernel = report.compiled(calls.prepare(x, x, rows, rows, rows), target)
            if target.backend == "cuda":
                assert report._read(kernel)[1] == 0, (dtype, dim, target)
"""
    subprocess.run([sys.executable, "-c", script], env=COMPILED, check=True, timeout=PATIENCE_S)


GOOD = Report(
    Case("sm_90", "forward", torch.bfloat16, 128, 128), 128, 64, 250, 0, 10**5, 2 * 10**5, 1, 0.1,
    {"HGMMA": 32}, "HGMMA", {"matrix": 16}, {}, 700, 128.0,
)  # fmt: skip


GLUON = replace(GOOD.case, engine="gluon")


@pytest.mark.parametrize(
    ("change", "miss"),
    [
        ({}, None),
        ({"spill": 8}, "spills 8 bytes"),
        ({"spill": 8, "case": replace(GOOD.case, v_dim=192)}, None),
        ({"shared": 3 * 10**5}, "300000 bytes of shared memory"),
        ({"matrix": {"HGMMA": 16, "HMMA": 128}}, "products are HGMMA, HMMA, not HGMMA"),
        # A kernel that the compiler has dropped altogether, as Triton 3.9 can.
        ({"matrix": {}}, "products are none"),
        ({"case": GLUON, "mix": {"matrix": 16, "other": 470}}, None),
        ({"case": GLUON, "mix": {"matrix": 16, "other": 480}}, "496 instructions a turn"),
        ({"case": GLUON, "edge": 721}, "721 instructions a masked turn"),
        ({"case": GLUON, "spill": 8}, "spills 8 bytes"),
        ({"case": GLUON, "serialized": True}, "ptxas serializes"),
    ],
)
def test_what_misses_a_bar(change, miss):
    misses = _facts(replace(GOOD, **change))["misses"]
    assert misses == [] if miss is None else misses[0].startswith(miss)


def test_the_table_file_is_what_the_table_renders_to():
    assert launch.FILE.read_text() == launch.render(launch.table())


def test_what_a_gpu_has_confirmed_lies_in_a_result():
    """No number in the table is from memory; and a line that is changed is no longer confirmed."""
    results = list((ROOT / "benchmarks/results").glob("*.json"))
    lines = [
        line
        for passes in launch.table().values()
        for some in passes.values()
        for line in some.values()
        if line.measured
    ]
    assert len(lines) > 10
    for line in lines:
        device, day = line.measured.split(",")[0].split()
        found = [x for x in results if device.lower() in x.name and day in x.name]
        rates = {
            f"{rate[0]:.0f}"
            for file in found
            for row in json.loads(file.read_text()).get("speed", [])
            for rate in row["tflops"].values()
        }
        what = line.measured.split(", ")[1].split()[0]
        assert found and (what == "right" or what in rates)
    case = Case("sm_90", "forward", torch.bfloat16, 128, 128, engine="gluon")
    assert all(line.measured == "" for line in tune.candidates(case, case.line))


def test_launch_lines_are_found():
    exact = launch.launch("sm_90", "forward", 2, 192, 128, True)
    assert exact == launch.table()["sm_90"]["forward 16 bit"]["192/128"] and exact.tma
    assert launch.launch("sm_90", "forward", 2, 80, 40, True).m > 0  # the line of 96
    assert not launch.launch("sm_90", "forward", 2, 64, 64, False).tma
    assert not launch.launch("sm_100", "forward", 4, 64, 64, True).tma


def test_tuning_takes_what_is_right_and_faster(monkeypatch):
    """The search itself, with a clock and a compiler that are told what to say."""
    case = Case("sm_90", "forward", torch.bfloat16, 64, 64)
    now = Launch(128, 64, 8, 3, tma=True)
    fast = Launch(128, 128, 8, 2, tma=True, overlap=True)
    wrong, spills = Launch(64, 64, 4, 2, tma=True), Launch(64, 64, 4, 3, tma=True)
    seconds = {now: 1.0, fast: 0.5, wrong: 0.1, spills: 0.2}

    def compiled(case, line):
        return replace(GOOD, case=case, spill=64 * (line == spills))

    def measure(case, line):
        if line.n == 32:
            raise RuntimeError("out of resources")
        return seconds.get(line, 0.99), [torch.ones(3) * (1 + (line == wrong))]

    monkeypatch.setattr(tune, "report", compiled)
    said = []
    assert tune.tune(case, now, measure, said.append) == fast
    assert any("WRONG" in line for line in said) and any("RuntimeError" in line for line in said)
    seconds[fast] = 0.99  # within noise of the line that is there
    assert tune.tune(case, now, measure, said.append) == now


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["arch=sm_70"], "arch must be one or more of sm_80, sm_90, sm_100, gfx942"),
        (["head_dim=100"], "no line of the launch table is so; head_dims: 64, 96, 128"),
        (["pass=sideways"], "pass must be one or more of forward"),
        (["bits=8"], "bits must be"),
        (["processes=0"], "processes must be an integer of at least 1"),
        (["--tune"], "--tune needs a GPU"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_an_interpreter_compiles_nothing(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["kernels"]) == 2 and "unset it" in capsys.readouterr().err


def test_a_case_is_launched_with_the_lines_of_its_own_table():
    cases = list(report.cases())
    for case in cases[:: len(cases) // 40]:
        call, outputs = report.example(case, tokens=256)
        assert call.arguments["ADD"] == case.adds and outputs
        if case.engine == "gluon":
            assert call.options["num_warps"] == case.line.warps
            continue
        how = (case.dtype.itemsize, case.head_dim, case.v_dim, not case.pointers, case.softcap > 0)
        line = launch.launch(case.arch, case.name, *how)
        assert (call.arguments["M"], call.arguments["N"]) == (line.m, line.n)
