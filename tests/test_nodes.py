"""Two machines: network namespaces with a link between them. One machine's losses, whatever
happens to the link."""

import json
import signal
import time

import pytest

from ringattn import living

from .nodes import ANEW, Nodes, finish, missing
from .processes import ROOT, TINY, metrics, train, wait_until

WHY_NOT = missing()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=f"no second node: {WHY_NOT}"),
]


@pytest.fixture
def nodes():
    with Nodes() as both:
        yield both


def keys(run_dir, text, *more):
    return [*TINY, text, f"run_dir={run_dir}", "parallel.cp=2", "parallel.timeout_s=20", *more]


def losses(run_dir):
    return [(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run_dir)]


@pytest.mark.parametrize("c10d", [False, True])
def test_two_nodes_train_as_one(nodes, tmp_path, text, c10d):
    """Over a slow link, by either rendezvous; with schedules that know of nodes."""
    nodes.limit(100)
    more = ("train.steps=4", "parallel.schedule=double_ring" if c10d else "engine.zero_stage=3")
    done = finish(
        nodes.torchrun(ROOT / "train.py", *keys(tmp_path / "two", text, *more), c10d=c10d)
    )
    assert [status for status, _ in done] == [0, 0], done
    assert train(2, *keys(tmp_path / "one", text, *more))[0] == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    folder = tmp_path / "two/checkpoints/step_4"
    assert {p.name for p in folder.iterdir()} == {
        "ringattn.json", "rank_00000.safetensors", "rank_00001.safetensors",
    }  # fmt: skip


def test_a_directory_that_is_not_shared_is_refused(nodes, tmp_path, text):
    runs = tmp_path / "runs"
    runs.mkdir()
    done = finish(
        nodes.torchrun(ROOT / "train.py", *keys(runs / "run", text, "train.steps=4"), hidden=runs)
    )
    for status, output in done:
        lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
        assert status and len(lines) == 1, output
        assert "is not the same directory for all machines: rank 1 on " in lines[0]
    assert not (runs / "run").exists()
    # Without checkpoints there is nothing to share.
    more = ("train.steps=2", "checkpoint.every=null")
    done = finish(nodes.torchrun(ROOT / "train.py", *keys(runs / "run", text, *more), hidden=runs))
    assert [status for status, _ in done] == [0, 0], done
    assert len(metrics(runs / "run")) == 2


def test_a_cut_link_ends_every_rank_with_a_line_and_a_restart_goes_on(nodes, tmp_path, text):
    """No rank waits for ever, also none that no word of the others can reach; both torchruns then
    start anew, once the link is back."""
    run_dir = tmp_path / "run"
    more = ("train.steps=80", "checkpoint.every=5", "parallel.timeout_s=10", "seq_len=1500",
            "batch_size=4")  # fmt: skip
    jobs = nodes.torchrun(ROOT / "train.py", *keys(run_dir, text, *more), c10d=True, restarts=3)
    file = run_dir / "metrics.jsonl"
    wait_until(lambda: file.exists() and file.read_text().count("\n") > 7, jobs[0])
    nodes.cut()
    ranks = nodes.ranks()
    assert len(ranks) == 2
    begin = time.monotonic()
    wait_until(lambda: not any(map(living.started, ranks)), jobs[0])  # their torchruns may wait
    waited = time.monotonic() - begin
    nodes.cut(False)
    done = finish(jobs)
    assert [status for status, _ in done] == [0, 0], done
    for rank, (_, output) in enumerate(done):
        lines = [line for line in output.splitlines() if line.startswith("train.py: ")]
        assert any(f"rank {rank}: " in line and "at step " in line for line in lines), output
    assert waited < 3 * 10, "far beyond parallel.timeout_s"
    assert "rank 1 has not been heard of" in done[0][1]
    assert f"the store of all ranks, on {nodes.hosts[0]}" in done[1][1]
    assert "resumed" in done[0][1]
    assert train(2, *keys(tmp_path / "whole", text, *more))[0] == 0
    assert losses(run_dir) == losses(tmp_path / "whole")


def test_a_machine_that_is_taken_away_comes_back(nodes, tmp_path, text):
    """SIGTERM to one torchrun, as a drained node's gets: all save, the other one does not end as if
    it were done, and waits; together they go on."""
    run_dir = tmp_path / "run"
    more = ("train.steps=60", "seq_len=1500", "batch_size=4")
    arguments = (ROOT / "train.py", *keys(run_dir, text, *more))
    options = {"c10d": True, "restarts": 3, "environment": ANEW}
    stays, leaves = nodes.torchrun(*arguments, **options)
    file = run_dir / "metrics.jsonl"
    wait_until(lambda: file.exists() and file.read_text().count("\n") > 4, stays)
    leaves.send_signal(signal.SIGTERM)
    status, output = finish([leaves])[0]
    assert status != 0, output
    wait_until(lambda: not nodes.ranks(), stays)
    assert stays.poll() is None and len(metrics(run_dir)) < 60
    done = finish([stays, *nodes.torchrun(*arguments, **options, only=1)])
    assert [status for status, _ in done] == [0, 0], "\n".join(text for _, text in done)
    assert "stopped on request" in done[0][1] and "resumed" in done[0][1]
    assert "stopped by a request to another machine" in done[0][1]
    assert train(2, *keys(tmp_path / "whole", text, *more))[0] == 0
    assert losses(run_dir) == losses(tmp_path / "whole")


def test_links_are_measured_from_both_ends(nodes):
    """What `ringattn calibrate` finds of a link of 100 Mbit/s, and of that within a machine."""
    nodes.limit(100)
    done = finish(nodes.torchrun(ROOT / "tests/workers/links.py", ranks=2))
    assert [status for status, _ in done] == [0, 0], done
    (line,) = [x for _, text in done for x in text.splitlines() if x.startswith("found: ")]
    found = json.loads(line.removeprefix("found: "))
    inter, intra = found["inter_node"], found["intra_node"]
    assert found["node_size"] == 2 and found["peak"] == {"fp32": 1e9}
    # What a link of 12.5 MB/s carries, and its bucket of 32 KiB; of it two ranks have a half each.
    most = 1.2 * 12.5e6
    assert 0 < inter["bandwidth"][str(2**20)] < most and 0 < inter.get("node", 1.0) < most
    for link in (inter, intra):
        assert 0 <= link["overlap_efficiency"] <= 1 and link["collective"] > 0
