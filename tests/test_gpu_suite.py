"""benchmarks/gpu_suite.py is for a GPU; here its every line runs at tiny sizes on the CPU."""

import json
import subprocess
import sys

from .processes import ROOT


def test_rehearsal(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_suite.py", "--rehearse", "--to", tmp_path],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert len(found["correctness"]) >= 15 and all(row["right"] for row in found["correctness"])
    assert all(row["passed"] for row in found["ranks"]) and found["ranks"] and found["rings"]
    contenders = {who for row in found["speed"] for who in row["tflops"]}
    assert contenders == {"ringattn", "flash", "cudnn", "flex"}
    assert {row["pass"] for row in found["speed"]} == {"forward", "backward"}
    page = file.with_suffix(".md").read_text()
    assert "no number here means anything" in page and "| ours |" in page
