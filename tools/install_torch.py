"""Installs the pinned torch, and never gigabytes of CUDA on a machine without a GPU.

    python tools/install_torch.py constraints.txt [INDEX_URL]

A dry run of pip shows what the pin would bring. Where that is a CUDA build and there is no
NVIDIA GPU, the installation stops and asks for an index with CPU builds (make TORCH_INDEX=URL);
ALLOW_CUDA=1 lets it pass, as the tests of old versions do, of which no other build may be at hand.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def pip(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], **options)


def brings_cuda(source: list[str]) -> bool:
    """Whether pip would install NVIDIA's packages; False where pip cannot tell."""
    report = pip(
        "install", "--dry-run", "--quiet", "--report", "-", *source, capture_output=True, text=True
    )
    if report.returncode:
        return False
    names = [item["metadata"]["name"].lower() for item in json.loads(report.stdout)["install"]]
    return any(name.startswith(("nvidia", "cuda")) for name in names)


def main(constraints: str, index: str = "") -> int:
    pin = re.search(r"^torch==\S+", Path(constraints).read_text(), re.MULTILINE).group()
    source = [*(["--index-url", index] if index else []), "-c", constraints, pin]
    allowed = os.environ.get("ALLOW_CUDA") == "1" or shutil.which("nvidia-smi")
    if not allowed and brings_cuda(source):
        print(
            f"{pin} would bring its CUDA build (gigabytes) to a machine without an NVIDIA GPU.\n"
            "Name an index with CPU builds, such as the one PyTorch's installation page gives for "
            "'CPU': make TORCH_INDEX=URL ...",
            file=sys.stderr,
        )
        return 1
    return pip("install", "--quiet", *source).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
