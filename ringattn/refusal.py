"""How a wrong request ends: one line of one rank, status 2; also for a package that is missing."""

from __future__ import annotations

import os
import sys
import time

USAGE_ERROR = 2
SILENCE_S = 5
_EXTRAS = {
    "train": ("deepspeed", "hydra", "omegaconf", "wandb", "matplotlib", "safetensors", "ninja"),
    "hf": ("transformers", "accelerate"),
    "data": ("datasets", "pyarrow", "tokenizers"),
    "liger": ("liger_kernel",),
    "lora": ("peft",),
}


def advice(package: str | None) -> str | None:
    """The line for a person; None for a package that no extra brings."""
    top = (package or "").split(".")[0]
    extra = next((name for name, packages in _EXTRAS.items() if top in packages), None)
    return extra and f"needs the package {top}: pip install 'ringattn[{extra}]'"


def refuse(line: str) -> int:
    """Prints the line and returns the exit status of a wrong request.

    torchrun ends all ranks as soon as one has failed. So that the line is always read, and once,
    each machine's first rank prints at once and the others hold still until they are ended; one
    that is not, since its first rank found nothing wrong, prints after all.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        sys.stdout.flush()
        time.sleep(SILENCE_S)
    print(line, file=sys.stderr, flush=True)
    return USAGE_ERROR
