"""Which extra of this package brings a package that is missing."""

from __future__ import annotations

_EXTRAS = {
    "train": ("deepspeed", "hydra", "omegaconf", "wandb", "matplotlib", "safetensors", "ninja"),
    "hf": ("transformers", "accelerate"),
    "data": ("datasets", "pyarrow", "tokenizers"),
    "liger": ("liger_kernel",),
}


def advice(package: str | None) -> str | None:
    """The line for a person; None for a package that no extra brings."""
    top = (package or "").split(".")[0]
    extra = next((name for name, packages in _EXTRAS.items() if top in packages), None)
    return extra and f"needs the package {top}: pip install 'ringattn[{extra}]'"
