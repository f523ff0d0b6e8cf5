"""The tables of docs/families.md: every method asks for something that runs and is the same on any
number of ranks, or says why not."""

import importlib.util
import re
import sys

import pytest

from . import oracle
from .processes import ROOT

_spec = importlib.util.spec_from_file_location("draw_families", ROOT / "docs/draw_families.py")
page = sys.modules["draw_families"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)
ROWS = list(page.rows())
# Of the survey's chapter (arXiv:2311.12351), and of its list of papers.
NAMED = [
    "BlockBERT",
    "Bi-BloSAN",
    "Landmark",
    "SPADE",
    "Mega",
    "Sinkhorn",
    "LongLoRA",
    "Longformer",
    "Funnel",
    "AltUp",
    "LM-Infinite",
    "StreamingLLM",
    "Self-Extend",
    "LongT5",
    "ETC",
    "Reformer",
    "HAN",
    "HIBERT",
    "HEGEL",
    "HAT",
    "LSRA",
    "Combiner",
    "H-Transformer",
    "BP-Transformer",
    "Adaptive",
    "LongNet",
    "DeepSpeed",
    "LogSparse",
    "Sparse",
    "MInference",
    "SparseBERT",
    "Expire-span",
    "Routing",
    "BigBird",
    "Star",
    "Linformer",
    "Luna",
    "Primal",
    "FourierFormer",
    "Random",
    "Performer",
    "Linear",
    "Scatterbrain",
    "LightSeq",
    "Self-attention",
    "FlashAttention",
    "SCFA",
    "Paged",
    "LASP",
    "Lightning",
    "TransNormerLLM",
]


def test_every_method_of_the_survey_has_a_row():
    methods = " ".join(row.method for row in ROWS)
    assert not [name for name in NAMED if name not in methods]


CODES = sorted({code for row in ROWS for code in row.codes})


@pytest.mark.parametrize("code", CODES)
def test_what_a_row_asks_for_is_the_same_on_any_ranks(code):
    whole = page.inputs()
    one, three = (page.run(code, world, whole) for world in (1, 3))
    assert one.shape[0] == 1 and one.abs().sum() > 0
    assert oracle.error(three, one.double()) < (1e-5 if "mixers.s" in code or "linear" in code
                                                or "conv" in code else 1e-11)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.method)
def test_a_row_without_code_says_why(row):
    text = (ROOT / "docs/families.md").read_text()
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {row.method} |")]
    words = r"for inference only|for serving only|not built|no attention|no key meets|ringattn"
    assert row.codes or re.search(words, line), line


def test_the_page_is_right():
    text = (ROOT / "docs/families.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    said, scope = [], {"print": lambda *words: said.append(" ".join(map(str, words)))}
    exec(compile(code, "docs/families.md", "exec"), scope)
    assert "\n".join(said) == shown.strip()
    assert [len(out) for out in scope["outs"]] == [1, 1]
