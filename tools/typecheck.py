"""Strict types over the public interface: mypy on every module that defines a public name.

    python tools/typecheck.py

What is public is what tests/public.py finds. Each module that defines such a name has to pass
``mypy --strict``, and so has ``tests/typed_use.py``, which is written as a user writes. The
packages are checked as they install.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from as_installed import ROOT, lay_out

sys.path.insert(0, str(ROOT / "tests"))


def main() -> int:
    from public import MODULES, interface

    modules = sorted({*MODULES, *(value.__module__ for value in interface().values())})
    with tempfile.TemporaryDirectory(prefix="ringattn-types-") as name:
        folder = lay_out(Path(name))
        use = folder / "typed_use.py"
        use.write_text((ROOT / "tests/typed_use.py").read_text())
        command = [sys.executable, "-m", "mypy", "--follow-imports=silent",
                   "--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache",
                   *(f"-m{each}" for each in modules), "-mtyped_use"]  # fmt: skip
        return subprocess.run(command, cwd=folder, env=os.environ | {"MYPYPATH": name}).returncode


if __name__ == "__main__":
    sys.exit(main())
