"""ringattn plan and ringattn verify, and the snippets of the pages in docs/."""

import json
import re

import pytest
import torch
from ringattn.kernels import aten
from ringattn.kernels import launch as launch_table

import ringattn as ra
from ringattn import cost
from ringattn.cli import kernels, main, plan, verify
from ringattn.cli.request import RequestError, mask_of
from ringattn.planning import mask_text
from ringattn.planning.schedules import BUILDERS, RankPlan
from ringattn.verify import compare, oracle

from .processes import ROOT, launch

SMALL = ["n=96", "heads=4", "kv_heads=2", "head_dim=16", "mask=sliding_window(n, 30) | sinks(n, 2)"]


def out(capsys, *arguments):
    status = main(arguments)
    return status, capsys.readouterr()


def test_plan_as_json_says_what_the_plan_says(capsys):
    status, shown = out(
        capsys, "plan", *SMALL, "world=6", "schedule=direct", "layout=balanced", "ulysses=2",
        "dtype=fp32", "--json", "--check",
    )  # fmt: skip
    facts = json.loads(shown.out)
    assert status == 0 and facts["check"] == {"ok": True, "problems": []}
    mask = ra.masks.sliding_window(96, 30) | ra.masks.sinks(96, 2)
    same = ra.make_plan(mask, ra.layouts.balanced(mask, 6), "direct", 2)
    assert facts["area"] == mask.area and facts["imbalance"] == same.imbalance
    for rank, row in enumerate(facts["ranks"]):
        assert row["area"] == same.area(rank) and row["recv_tokens"] == same.recv_tokens(rank)
        want = cost.received(same, rank, cost.AttentionShape(4, 2, 16, itemsize=4))
        assert (row["forward_bytes"], row["backward_bytes"]) == (want.forward, want.backward)


def test_plan_for_people(capsys, tmp_path):
    picture = tmp_path / "plan.png"
    status, shown = out(
        capsys, "plan", "world=40", "n=4k", "schedule=auto", "--check", "--plot", str(picture)
    )
    assert status == 0 and picture.stat().st_size > 10_000
    text = " ".join(shown.out.split())
    assert "auto: estimated" in text and "check passed" in text
    assert max(map(len, shown.out.splitlines()[1:])) <= 100


def test_a_plan_that_is_wrong_fails_the_check(capsys, monkeypatch):
    complete = BUILDERS["ring"]

    def forgetful(partition, rank, node_size):
        whole = complete(partition, rank, node_size)
        return whole if rank else RankPlan(whole.blocks, whole.steps[:-1])

    monkeypatch.setitem(BUILDERS, "ring", forgetful)
    status, shown = out(capsys, "plan", "n=77", "world=3", "--check")
    assert status == 1 and "problem" in shown.out and "rank 0" in shown.out


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_verify_passes_and_draws(capsys, tmp_path, dtype):
    picture = tmp_path / "error.png"
    status, shown = out(
        capsys, "verify", *SMALL, "ranks=3", f"dtype={dtype}", "schedule=direct", "--json",
        "--plot", str(picture),
    )  # fmt: skip
    facts = json.loads(shown.out)
    assert status == 0 and facts["passed"] and picture.stat().st_size > 5_000
    assert set(facts["errors"]) == {"out", "dq", "dk", "dv"}
    assert all(error["worst"] <= 1 for error in facts["errors"].values())
    assert facts["curve"]["ranks"] == [1, 2, 4, 8, 16]
    limit = {"bf16": 1e-2, "fp32": 1e-6, "fp64": 1e-12}[dtype]
    assert all(0 < error["ours"] < limit for error in facts["errors"].values())


def test_verify_sees_a_wrong_gradient_under_a_right_output(capsys, monkeypatch):
    backward = aten.backward

    def per_block(prepared, **given):
        out, lse = prepared
        backward(prepared=(out, lse + 0.02 * (given["k"].shape[1] < 96)), **given)

    monkeypatch.setattr(aten, "backward", per_block)
    status, shown = out(capsys, "verify", *SMALL, "ranks=2")
    assert status == 1 and "FAILED" in shown.out
    verdicts = {line.split()[1]: line for line in shown.out.splitlines() if "│" in line}
    assert "ok" in verdicts["out"] and "WRONG" in verdicts["dk"]


@pytest.mark.parametrize("damage", [lambda x: 0 * x, lambda x: -x, lambda x: 1.3 * x])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_one_wrong_row_does_not_hide_in_the_whole(dtype, damage):
    """Under a causal mask the last keys have next to no gradient, yet they must be right."""
    n, mask = 1024, ra.masks.causal(1024)
    gen = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, 2, 16, generator=gen).to(dtype) for _ in range(4)]
    want = oracle(mask, *inputs)
    for x in want[2:]:
        got = x.to(dtype, copy=True)
        assert compare(got, got, x).ok
        got[:, -1] = damage(got[:, -1])
        result = compare(got, x.to(dtype), x)
        assert not result.ok and result.worst_at[1] == n - 1


def test_verify_on_processes():
    arguments = [*SMALL, "schedule=double_ring", "node_size=2", "layout=balanced", "dtype=bf16"]
    status, output = launch(4, "-m", "ringattn", "verify", *arguments)
    assert status == 0, output
    assert "4 processes" in output and output.count("PASSED") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "masc=full"], "unknown key 'masc'; did you mean: mask"),
        (["plan", "mask=casual"], "did you mean: causal"),
        (["plan", "mask=open('x')"], "unknown mask 'open'"),
        (["plan", "mask=causal(n).area"], "are understood"),
        (["plan", "mask=causal(n, 3, 4)"], "too many positional"),
        (["plan", "mask=n"], "this is no mask"),
        (["plan", "mask=causal("], "not an expression"),
        (["plan", "mask=documents([3, 4])", "n=9"], "has 7 queries, but n=9"),
        (["plan", "n=many"], "n must be an integer of at least 1"),
        (["plan", "schedule=spiral"], "ring, double_ring, all_gather, direct, auto"),
        (["plan", "ulysses=3"], "ulysses=3 does not divide the 8 ranks"),
        (["plan", "ulysses=8", "heads=12"], "8 ranks and 12 heads; choose one of: 1, 2, 4"),
        (["plan", "chunk=4"], "chunk=4 means nothing for layout=zigzag"),
        (["plan", "--chek"], "unknown flag --chek"),
        (["plan", "world"], "'world' is not KEY=VALUE"),
        (["plan", "--plot", "/no/such/folder/x.png"], "--plot /no/such/folder/x.png"),
        (["verify", "--plot", "x.jpeg"], "--plot x.jpeg: a file ending in .png, .svg, .pdf"),
        (["verify", "backend=gloo"], "backend=gloo needs torchrun"),
        (["verify", "seed=abc"], "seed must be an integer; got 'abc'"),
        (["plan", "heads=8", "kv_heads=3"], "kv_heads=3 does not divide 8 heads"),
        (["plan", "n=64", "n=32"], "n is given twice"),
        (["plan", "mask=causal(99999999999999999999999)"], "mask="),
        (["plan", "mask=documents(5)"], "documents needs the lengths of documents"),
        (["verify", "kernel=cudnn"], "kernel='cudnn' is unknown"),
        (["verify", "device=cuda"], "torch sees no GPU"),
        (["verify", "dtype=fp8"], "dtype must be one of: bf16, fp16, fp32, fp64; got 'fp8'"),
        (["verfy"], "unknown command 'verfy'; one of: plan, estimate, "),
        (["predict", "world=2"], "predict is estimate now"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, says):
    status, shown = out(capsys, *arguments)
    assert status == 2 and says in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_help_lists_commands_and_keys(capsys):
    assert main(["--help"]) == 0
    assert "verify" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = capsys.readouterr().out
    assert "schedule" in shown and "--check" in shown


def test_mask_expressions():
    assert mask_of("causal", None, 7) == ra.masks.causal(7)
    assert mask_of("sliding_window(n, n // 2) - sinks(n, 1)", 8, 1).area == 26 - 8 + 4
    assert mask_of("documents([2, 3], causal=False)", None, 99).area == 13
    # What a builder takes first may be left out.
    assert mask_of("sliding_window(4) | sinks(2)", 8, 1) == mask_of(
        "sliding_window(n, 4) | sinks(n, 2)", 8, 1
    )
    text = "documents & sliding_window(3) | sinks(1)"
    near, first = ra.masks.documents([5, 4]) & ra.masks.sliding_window(9, 3), ra.masks.sinks(9, 1)
    assert mask_text.parse(text, 9, [5, 4]) == near | first
    with pytest.raises(RequestError, match="different size"):
        mask_of("causal(3) | causal(n)", 4, 1)


def test_every_snippet_of_the_page_runs(capsys):
    page = (ROOT / "docs/attention.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    scope = {}
    exec(compile(code, "docs/attention.md", "exec"), scope)
    assert "auto: estimated" in capsys.readouterr().out
    assert scope["out"].shape == (1, 1000, 8, 32) and scope["loss"] > 0
    assert all(p.grad is not None for p in scope["layer"].parameters())
    for name in ra.masks.BUILDERS:
        assert name in page, f"docs/attention.md does not mention the mask {name}"


def test_the_page_on_kernels():
    """Its snippet runs; its commands and launch line exist; it names every kernel."""
    page = (ROOT / "docs/kernels.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope = {}
    exec(compile(code, "docs/kernels.md", "exec"), scope)
    assert scope["out"].shape == (1, 1000, 8, 64) and scope["out"].requires_grad
    keys = set(re.findall(r" (\w+)=", "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))))
    assert {"arch", "pass"} <= keys <= {*kernels.KEYS}
    (line,) = re.findall(r"```json\n(.*?)\n```", page, re.DOTALL)
    assert json.loads("{" + line + "}")["128"] == json.loads(launch_table.FILE.read_text())[
        "sm_90"]["forward 16 bit gluon"]["128"]  # fmt: skip
    assert all(f"`{name}`" in page for name in ra.kernels.NAMES)


def test_commands_of_the_page_are_understood():
    page = (ROOT / "docs/attention.md").read_text()
    commands = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    keys = set(re.findall(r"(?:^| )(\w+)=", commands, re.MULTILINE))
    assert {"mask", "schedule"} <= keys <= {*plan.KEYS, *verify.KEYS}
