"""What the site needs beside MkDocs: pages that live elsewhere in the checkout, and links to its
files.

A hook of mkdocs.yml. README.md is the first page, CONTRIBUTING.md and CHANGELOG.md are pages too. A
link that leads out of docs/ (to an example, a result, a source) goes to a copy of that file in the
site, as text, so that the site needs neither a host of the code nor the network; a link to a folder
goes to a list of it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Files, config) -> Files:
    """Adds the pages from elsewhere, then every file outside of docs/ that a page links to."""
    for name, path in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text()))
    for file in list(files.documentation_pages()):
        if not file.src_uri.endswith(".md"):
            continue
        for link in _LINK.findall(file.content_string):
            path = _outside(file.src_uri, link)
            if path and not files.get_file_from_path(target := _copy(path)):
                files.append(File.generated(config, target, content=_text(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Links of a page as the site has them."""
    here = page.file.src_uri

    def moved(found: re.Match[str]) -> str:
        path = _target(here, found[1])
        if path is None:
            return found[1]
        inside = next((name for name, each in PAGES.items() if each == path), None)
        if inside is None and path.startswith("docs/") and (ROOT / path).is_file():
            inside = path.removeprefix("docs/")
        if inside is None and path == "docs/notebooks":
            inside = "notebooks/masks_layouts_plans.ipynb"
        return posixpath.relpath(inside or _copy(path), posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def _target(page: str, link: str) -> str | None:
    """The path in the checkout that a link of a page means; None for an address."""
    if "://" in link or link.startswith(("mailto:", "#")):
        return None
    source = PAGES.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return path if (ROOT / path).exists() else None


def _outside(page: str, link: str) -> str | None:
    """The same, if no page or picture of docs/ is meant."""
    path = _target(page, link)
    return None if path is None or path.startswith("docs/") or path in PAGES.values() else path


def _copy(path: str) -> str:
    return f"source/{path}.txt"


def _text(path: str) -> str:
    """A file's text, or the names in a folder."""
    at = ROOT / path
    if at.is_file():
        return at.read_text()
    return "\n".join(sorted(each.name for each in at.iterdir() if each.name[0] not in "._")) + "\n"
