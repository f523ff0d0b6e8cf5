"""What a release has to agree on, and its notes.

    python tools/release.py check 0.2.0    # pyproject.toml, CITATION.cff, CHANGELOG.md say so too
    python tools/release.py notes 0.2.0    # the part of CHANGELOG.md

Standard library only; exits with 1 and a line for each file that disagrees.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def disagreements(version: str, root: Path = ROOT) -> list[str]:
    """A line for each file that does not say ``version``."""
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)[1]
    found = {"pyproject.toml": declared, "CITATION.cff": cited}
    lines = [
        f"{name} says {said}, not {version}" for name, said in found.items() if said != version
    ]
    if not notes(version, root):
        lines.append(f"CHANGELOG.md has no part '## {version} (DATE)'")
    return lines


def notes(version: str, root: Path = ROOT) -> str:
    """The part of the changelog about ``version``; empty if there is none."""
    text = (root / "CHANGELOG.md").read_text()
    part = re.search(
        rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)\n(.*?)(?=^## |\Z)", text, re.M | re.S
    )
    return part[1].strip() if part else ""


def main(what: str, version: str) -> int:
    if what == "notes":
        print(notes(version))
        return 0
    lines = disagreements(version)
    print("\n".join(lines), file=sys.stderr) if lines else print(f"{version}: all agree")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
