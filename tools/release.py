"""What a release has to agree on, its notes, and its page in a package index.

    python tools/release.py check 0.2.0    # pyproject.toml, CITATION.cff, CHANGELOG.md say so too
    python tools/release.py notes 0.2.0    # the part of CHANGELOG.md
    python tools/release.py readme https://github.com/OWNER/NAME/blob/v0.2.0    # links get it

An index shows README.md alone: before the packages of a release are built, ``readme`` makes its
links and pictures addresses of the tagged files. Standard library only; exits with 1 and a line for
each file that disagrees.
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


def addressed(readme: str, files: str) -> str:
    """A README whose links lead to ``files``, the address of the checkout's files. Pictures are
    asked for as they are (``?raw=true``), not as a page that shows them."""
    readme = re.sub(r"(!\[[^]]*\]\()([\w./-]+)(?=\))", rf"\1{files}/\2?raw=true", readme)
    return re.sub(r"(?<=\]\()(?!\w+:|#)([\w./-]+)(?=[)#])", rf"{files}/\1", readme)


def main(what: str, version: str) -> int:
    if what == "notes":
        print(notes(version))
        return 0
    if what == "readme":
        page = ROOT / "README.md"
        page.write_text(addressed(page.read_text(), version.rstrip("/")))
        return 0
    if what != "check":
        sys.exit(__doc__)
    lines = disagreements(version)
    print("\n".join(lines), file=sys.stderr) if lines else print(f"{version}: all agree")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
