"""The notebooks run from top to bottom, and print what they show."""

import pytest
from nbclient import NotebookClient
from nbformat import read

from .processes import PATIENCE_S, ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


def printed(cell):
    return "".join(x["text"] for x in cell.get("outputs", []) if x.get("name") == "stdout")


def pictures(cell):
    return sum("image/png" in x.get("data", {}) for x in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_is_kept(path, tmp_path):
    """But for cells with the tag "varies": times, and what a search finds in its time."""
    kept, run = read(path, 4), read(path, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(run, timeout=PATIENCE_S, kernel_name="python3", resources=resources).execute()
    for before, after in zip(kept.cells, run.cells, strict=True):
        assert pictures(before) == pictures(after), after["source"]
        if "varies" not in before.metadata.get("tags", []):
            assert printed(before) == printed(after), after["source"]


def test_notebooks_are_kept_with_what_they_show():
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        cells = read(path, 4).cells
        assert sum(map(pictures, cells)), f"{path.name}: run it, and keep its pictures"
