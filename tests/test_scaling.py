"""ringattn estimate, ringattn report, and what they refuse. No ranks are started."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ringattn.cli import main
from ringattn.report import page
from ringattn.report.read import find

from . import browser


def out(capsys, *arguments):
    status = main(arguments)
    return status, capsys.readouterr()


RUN = ["estimate", "model=8b", "model.vocab_size=128256", "precision=bf16", "seq_len=128k",
       "ranks=16", "--search", "--seconds", "0.3"]  # fmt: skip


def test_estimate_for_machines(capsys):
    status, shown = out(capsys, *RUN, "hardware=h200", "--json")
    facts = json.loads(shown.out)
    assert status == 0 and facts["ranks"] == 16 and facts["hardware"] == "H200 SXM"
    best, last = facts["ranked"][0], facts["ranked"][-1]
    assert best["tokens_per_s"] >= last["tokens_per_s"]
    assert best["cp"] * best["dp"] == 16 and 0 < best["mfu"] < 1
    assert sum(best["parts"].values()) == pytest.approx(best["seconds"])
    assert facts["longest_seq_len"] > 2**20 and "attention kernel" in facts["why"]


def test_estimate_for_people(capsys, tmp_path):
    trace, picture = tmp_path / "step.json", tmp_path / "splits.png"
    status, shown = out(capsys, *RUN, "--trace", str(trace), "--plot", str(picture))
    text = " ".join(shown.out.split())
    assert status == 0 and "longest sequence that fits" in text and "why: " in text
    command = next(line for line in shown.out.splitlines() if line.startswith("torchrun"))
    assert "--nnodes 2 --nproc-per-node 8" in command and "model=8b" in command
    assert picture.stat().st_size > 10_000
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert spans and all(e["dur"] > 0 and e["ts"] >= 0 for e in spans)
    tracks = {(e["pid"], e["tid"]) for e in spans}
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert tracks <= named and any("forward, step 0" in e["name"] for e in spans)


def test_the_commands_that_are_printed_train_what_was_estimated(capsys):
    """Each is estimated again, to the same number, whatever was given."""
    for keys in (
        [*RUN, "attention.mask=sliding_window(4096) | sinks(4)", "attention=causal"],
        [*RUN, "parallel.schedule=auto", "engine=fsdp", "memory=long", "--sequences", "64"],
        ["estimate", "model=1b", "seq_len=64k", "ranks=4", "precision=bf16", "hardware=mi300x",
         "parallel.schedule=auto", "parallel.layout=balanced"],
    ):  # fmt: skip
        _, shown = out(capsys, *keys, "--json")
        for row in json.loads(shown.out)["ranked"][:3]:
            words = shlex.split(row["command"])
            again = words[words.index("train.py") + 1 :]
            _, shown = out(capsys, "estimate", *again, f"ranks={row['cp'] * row['dp']}", "--json")
            (same,) = json.loads(shown.out)["ranked"]
            assert same["seconds"] == row["seconds"] and same["memory"] == row["memory"]
            assert same["command"] == row["command"]


def test_an_experiment_is_given(capsys, tmp_path):
    folder(tmp_path)
    keys = ["estimate", "experiment=continue_llama", f"model.path={tmp_path}", "ranks=8"]
    _, shown = out(capsys, *keys, "--search", "--json")
    facts = json.loads(shown.out)
    assert {row["engine"]["name"] for row in facts["ranked"]} == {"fsdp"}
    assert {row["memory_keys"]["ffn_tile"] for row in facts["ranked"]} == {8192}


def folder(path):
    (path / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 1e4,
        "architectures": ["LlamaForCausalLM"],
    }))  # fmt: skip


def test_estimate_reads_a_hugging_face_folder_and_any_mask(capsys, tmp_path):
    folder(tmp_path)
    keys = ["estimate", "model=hf", f"model.path={tmp_path}", "seq_len=64k", "ranks=4",
            "hardware=mi300x", "precision=bf16", "--json"]  # fmt: skip
    _, whole = out(capsys, *keys)
    mask = "attention.mask=documents & sliding_window(1024) | sinks(4)"
    _, window = out(capsys, *keys, mask)
    whole, window = json.loads(whole.out), json.loads(window.out)
    assert whole["ranked"][0]["flops"] > 2 * window["ranked"][0]["flops"]


def test_what_cannot_fit_is_said_with_status_1(capsys):
    status, shown = out(capsys, "estimate", "model=8b", "seq_len=64M", "ranks=8", "--search")
    assert status == 1 and "nothing fits" in shown.out and "GiB" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "model=9b", "seq_len=1M"], "ringattn estimate"),
        (["estimate", "model=9b"], "Could not find 'model/9b'"),
        (["estimate", "hardware=tpu"], "hardware=tpu is unknown; one of: "),
        (["estimate", "parallel.cp=3", "ranks=8"], "parallel.cp=3 does not divide"),
        (["estimate", "parallel.cp=3", "ranks=8", "--search"], "parallel.cp=3 does not divide"),
        (["estimate", "gpus=8"], "unknown key 'gpus'"),
        (["estimate", "attention.mask=causal(7)", "attention=causal"], "has 7 queries"),
        (["estimate", "attention.mask=prefix_lm(9)"], "a text of 1 tokens: prefix must be at most"),
        (["estimate", "attention.mask=causal", "attention.sinks=3"], "say window and sinks there"),
        (["estimate", "engine.zero_stage=4"], "engine.zero_stage must be one of"),
        (["estimate", "--trace", "/none/x.json"], "no such folder"),
        (["estimate", "--search", "--sequences", "3", "parallel.cp=2", "ranks=4"], "sequences=3"),
        (["report"], "give run directories"),
        (["report", "/none"], "/none: no such directory"),
        (["calibrate", "heads=3", "kv_heads=2"], "kv_heads=2 does not divide heads=3"),
        (["calibrate", "out=/proc/none/x.yaml"], "out=/proc/none/x.yaml"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, message):
    status, shown = out(capsys, *arguments)
    assert status == 2 and not shown.out
    assert message in shown.err and shown.err.count("\n") == 1


def run_dir(path, seconds=1.0, predicted=1.1, status="finished", ranks=2, seq_len=1024, reason=""):
    path.mkdir(parents=True)
    varied = {"seq_len": str(seq_len)}
    (path / "point.json").write_text(json.dumps(
        {"format": 1, "status": status, "overrides": [], "varied": varied, "ranks": ranks,
         "seconds": 9, "reason": reason}
    ))  # fmt: skip
    if status != "finished":
        return path
    config = {"seq_len": seq_len, "train": {"steps": 4}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    parts = {"matrix products": 0.3, "elementwise": 0.1, "attention kernel": predicted - 0.5,
             "exposed exchange": 0.1, "engine": 0, "offload": 0}  # fmt: skip
    facts = {
        "format": 1, "setup": {"world": ranks}, "device": "cpu", "kernel": "aten",
        "hardware": {"name": "x", "source": "y"}, "versions": {"torch": "2"},
        "predicted": {"seconds": predicted, "parts": parts, "exposed_s": 0.1, "mfu": 0.4,
                      "tokens_per_s": seq_len / predicted, "peak_memory_bytes": 3 * 2**30},
    }  # fmt: skip
    (path / "facts.json").write_text(json.dumps(facts))
    lines = [
        {"step": i, "loss": 5 - i, "tokens_seen": i * seq_len, "step_s": seconds * (1, 9)[i < 3],
         "tokens_per_s": 7.0, "mfu": 0.5, "peak_memory_bytes": 2 * 2**30 + i,
         "compute_s": 0.8, "exchange_s": 0.1, "engine_s": 0.05, "data_s": 0.05, "pairs": 100}
        for i in (1, 2, 3, 4)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.skipif(not browser.CHROMIUM, reason="no Chromium")
def test_the_report_is_readable_on_a_phone_light_and_dark_and_asks_nobody(tmp_path, capsys):
    for n in (1024, 2048, 16384):
        run_dir(tmp_path / "runs" / f"seq_len-{n}", seconds=n / 1024, seq_len=n)
    assert out(capsys, "report", str(tmp_path / "runs"))[0] == 0
    script = """{
      width: d.documentElement.scrollWidth,
      asked: w.performance.getEntriesByType("resource")
        .filter(x => !x.name.startsWith("data:")).length,
      pictures: [...d.images].filter(x => x.complete && x.naturalWidth > 0).length,
      ground: w.getComputedStyle(d.body).backgroundColor, ink: w.getComputedStyle(d.body).color}"""
    page = tmp_path / "runs/report/index.html"
    light = browser.measured(page, 390, tmp_path, script)
    dark = browser.measured(page, 390, tmp_path, script, "--force-dark-mode")
    for found in (light, dark):
        assert found["width"] <= 390 and found["asked"] == 0 and found["pictures"] == 4, found
    brightness = [sum(map(int, re.findall(r"\d+", x["ground"])[:3])) for x in (light, dark)]
    assert brightness[0] > 700 > 200 > brightness[1], (light, dark)
    assert light["ink"] != dark["ink"]


def test_report_reads_a_sweep_and_needs_nothing_but_itself(capsys, tmp_path):
    for n in (1024, 2048, 16384):
        run_dir(tmp_path / f"seq_len-{n}", seconds=n / 1024, seq_len=n)
    run_dir(tmp_path / "seq_len-1048576", status="memory", seq_len=2**20, reason="<no> room")
    status, shown = out(capsys, "report", str(tmp_path))
    assert status == 0 and "off by" in " ".join(shown.out.split())
    text = (tmp_path / "report" / "index.html").read_text()
    assert (
        "http:" not in text
        and "https:" not in text
        and "&lt;no&gt; room" in text
        and "<no>" not in text
    )
    sources = re.findall(r'src="([^"]*)', text)
    assert len(sources) == 4 and all(s.startswith("data:image/png;base64,") for s in sources)
    assert {p.name for p in (tmp_path / "report").iterdir()} == {
        "index.html", "scaling.png", "parts.png", "predicted.png", "loss.png"
    }  # fmt: skip
    _, shown = out(capsys, "report", str(tmp_path), "--json")
    found = json.loads(shown.out)
    assert [run["seq_len"] for run in found] == [1024, 2048, 16384, 0]
    # The first two steps warm up; a prediction is compared with the median of the others.
    assert found[0]["measured"]["step_s"] == 1.0 and found[0]["error"] == pytest.approx(0.1)
    assert found[0]["memory_error"] == pytest.approx(0.5, abs=1e-6)
    assert found[3]["status"] == "memory" and found[3]["reason"] == "<no> room"


def test_a_prediction_follows_the_pairs_that_a_step_had(tmp_path):
    path = run_dir(tmp_path / "a", predicted=1.1)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["pairs"] = 50
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = find([path])
    attention = 0.6 + 0.1
    assert run.guess == pytest.approx(1.1 - attention / 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "facts.json").unlink(), "earlier version"),
        (lambda p: (p / "facts.json").write_text('{"format": 7}'), "format 7; this one reads 1"),
        (lambda p: (p / "point.json").write_text("{"), "point.json: this is no JSON"),
        (lambda p: (p / "metrics.jsonl").write_text("{}\n{"), "metrics.jsonl: line 2"),
    ],
)
def test_a_directory_of_another_version_is_one_line(capsys, tmp_path, damage, message):
    path = run_dir(tmp_path / "a")
    damage(path)
    status, shown = out(capsys, "report", str(path))
    assert status == 2 and message in shown.err and shown.err.count("\n") == 1
    assert not (path / "report").exists()


def test_the_page_says_what_ran_as_far_as_all_runs_agree(tmp_path, monkeypatch):
    for name, schedule in (("a", "ring"), ("b", "direct")):
        path = run_dir(tmp_path / name)
        facts = json.loads((path / "facts.json").read_text())
        facts |= {"parameters": 1234, "setup": {"world": 2, "cp": 2, "precision": "bf16"},
                  "plan": {"schedule": schedule, "layout": "zigzag",
                           "kinds": {"all": {"mask": "causal"}}}}  # fmt: skip
        (path / "facts.json").write_text(json.dumps(facts))
    run_dir(tmp_path / "c", status="failed")
    runs = find([tmp_path])
    shared = page.what_ran(runs)
    for words in ("parameters 1,234", "mask causal", "over 2 of 2 ranks", "layout zigzag", "bf16"):
        assert words in shared
    assert "schedule" not in shared and "schedule ring" in page.what_ran(runs[:1])
    monkeypatch.chdir(tmp_path / "a")
    assert page.titled(find([Path()])) == "a"
    assert page.titled(runs) == f"3 runs in {tmp_path.name}"


def test_an_empty_folder_is_refused(capsys, tmp_path):
    status, shown = out(capsys, "report", str(tmp_path))
    assert status == 2 and "no run directory" in shown.err


def test_points_that_vary_in_anything_are_drawn(tmp_path):
    for name in ("ring", "direct"):
        run_dir(tmp_path / f"parallel.schedule-{name}")
    runs = find([tmp_path])
    files = page.write(runs, tmp_path / "report")
    assert all(file.stat().st_size > 3_000 for file in files)
    table = page.rows(runs)
    assert table[0]["status"] == "finished"
    shown = page.columns(table)
    assert "step s" in shown and all(any(row[title] for row in table) for title in shown)
    text = files[0].read_text()
    assert f"<h1>2 runs in {tmp_path.name}</h1>" in text and page.what_ran(runs) in text
