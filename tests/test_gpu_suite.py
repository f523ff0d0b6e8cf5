"""benchmarks/gpu_suite.py is for a GPU; here its every line runs at tiny sizes on the CPU."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from .processes import PATIENCE_S, ROOT


def cases():
    spec = importlib.util.spec_from_file_location("gpu_cases", ROOT / "benchmarks/gpu_cases.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_cases"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_verdict_sees_wrong_rows(dtype):
    judge = cases().judge
    want = [torch.randn(1, 2000, 4, 64, dtype=torch.float64) for _ in range(4)]
    right = [x.to(dtype) for x in want]
    assert judge(right, want, dtype)[2]
    for damage in (lambda x: 3 * x, lambda x: 0 * x, lambda x: x * torch.nan):
        for rows in (slice(None), slice(7, 8)):
            wrong = [x.clone() for x in right]
            wrong[2][:, rows, 1] = damage(wrong[2][:, rows, 1])
            assert not judge(wrong, want, dtype)[2]


def test_rehearsal(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_suite.py", "--rehearse", "--to", tmp_path],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert len(found["correctness"]) >= 21 and all(row["right"] for row in found["correctness"])
    assert all(row["passed"] for row in found["ranks"]) and found["ranks"] and found["rings"]
    contenders = {who for row in found["speed"] for who in row["tflops"]}
    assert contenders == {"triton", "flash", "cudnn", "flex"}
    assert found["first"]["triton"]["same"] and len(found["host"]) == 3
    assert len(found["states"]) == 4 and all(x["right"] and x["same"] for x in found["states"])
    assert {row["pass"] for row in found["speed"]} == {"forward", "backward"}
    page = file.with_suffix(".md").read_text()
    assert "no number here means anything" in page and "| cudnn |" in page
