"""The packages of the checkout where an installation has them, for tools that read sources.

``kernels/`` is ``ringattn.kernels`` once installed, ``configs/`` is ``ringattn.configs``: an
importer knows that of an editable installation, a type checker or a reader of docstrings does not.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_WHERE = {"ringattn": "ringattn", "kernels": "ringattn/kernels", "configs": "ringattn/configs"}


def lay_out(folder: Path) -> Path:
    """Copies the packages into an empty folder, as they install."""
    for source, target in _WHERE.items():
        shutil.copytree(
            ROOT / source, folder / target, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder
