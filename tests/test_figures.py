"""Every number that a document quotes is in a result that the same section of it names."""

import importlib.util
import re
import sys

import pytest

from .processes import ROOT

_spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks/figures.py")
figures = importlib.util.module_from_spec(_spec)
sys.modules["figures"] = figures  # dataclasses look their module up
_spec.loader.exec_module(figures)

NAMES = [page.relative_to(ROOT).as_posix() for page in figures.PAGES]
UNITS = (
    "TFLOP/s|tokens/s|TB/s|GB/s|Mbit/s|TiB|GiB|MiB|KiB|TB|GB|MB|kB|ns|ms|us|s|seconds|minutes|min|"
    "hours|h|days|nats|%|x"
)
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
# "1.2 s", "0.2 to 0.3 s", "4-6 kB", "10, 5 and 2 %": every number before the unit has it.
QUANTITY = re.compile(
    rf"(?<![\w.,/=^-])((?:{NUMBER}(?:-|(?:,| to| and| or|, and| %,| %,? and)? ))*{NUMBER}) ?"
    rf"({UNITS})(?![\w/])"
)


def quantities(text: str) -> set[tuple[str, str]]:
    """(number, unit) of everything with a unit in a text."""
    text = text.replace("\N{MULTIPLICATION SIGN}", "x").replace("µs", "us")
    found = set()
    for numbers, unit in QUANTITY.findall(text):
        # A minus between digits is a range.
        each = re.findall(NUMBER, re.sub(r"(?<=[\d%])-", " ", numbers))
        found |= {(n.lstrip("+").replace(",", ""), unit) for n in each}
    return found


def sections(page: str) -> list[str]:
    """A page, cut before its headings of the second level."""
    return re.split(r"^(?=## )", page, flags=re.MULTILINE)


def prose(page: str) -> list[str]:
    """Paragraphs, without code, tables and what is between markers."""
    page = figures._MARKED.sub("", re.sub(r"```.*?```", "", page, flags=re.DOTALL))
    page = re.sub(r"`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", "", page)
    lines = ["" if line.startswith("|") else line for line in page.splitlines()]
    return "\n".join(lines).split("\n\n")


def cited(page: str) -> str:
    """The text of all results that a page names: by a marker, a script or a link."""
    names = {name for _, name, *_ in figures._MARKED.findall(page)}
    names |= set(re.findall(r"benchmarks/results/([\w.-]+)\.md", page))
    texts = [figures.result(name) for name in names]
    for script in set(re.findall(r"benchmarks/(\w+)\.py", page)):
        texts += [each.read_text() for each in figures.RESULTS.glob(f"{script}*.md")]
    return "\n".join(texts)


@pytest.mark.parametrize("name", NAMES)
def test_a_table_between_markers_is_that_of_its_result(name):
    page = (ROOT / name).read_text()
    assert figures.written(page) == page, f"{name}: python benchmarks/figures.py --write"
    assert page.count("<!-- figures: ") == page.count("<!-- figures end -->")


@pytest.mark.parametrize("name", NAMES)
def test_a_number_with_a_unit_is_in_a_result_or_stated(name):
    allowed = stated_words(name)
    for section in sections((ROOT / name).read_text()):
        known, loose = quantities(cited(section)), []
        for paragraph in prose(section):
            for words in allowed:
                paragraph = re.sub(r"\s+".join(map(re.escape, words.split())), " ", paragraph)
            loose += sorted(quantities(paragraph) - known)
        title = section.splitlines()[0]
        assert not loose, f"{name}, {title!r}: in no result named there, nor in stated.md: {loose}"


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_numbers_is_between_markers(name):
    for section in sections((ROOT / name).read_text()):
        known = quantities(cited(section))
        for table in figures.tables(figures._MARKED.sub("", section)):
            text = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", table)
            for words in stated_words(name):
                text = text.replace(words, "")
            loose = quantities(text) - known
            assert not loose, f"{name}: in no result named there: {sorted(loose)}, in\n{table}"
            rows = [line.strip("| \n").split(" | ") for line in table.splitlines()[2:]]
            alone = rf"\**{NUMBER}( \([^)]*\))? ?({UNITS})?\**"
            numbers = [x for row in rows for x in row if re.fullmatch(alone, x.strip())]
            assert len(numbers) < 4, f"{name}: this table is from no result:\n{table}"


def stated_words(name: str) -> list[str]:
    """What ``stated.md`` says of a page."""
    rows = figures.tables((figures.RESULTS / "stated.md").read_text())[0].splitlines()[2:]
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows]
    return [words for page, words, _ in cells if page == name]


def test_what_is_stated_is_still_said():
    """And every line gives its reason."""
    rows = figures.tables((figures.RESULTS / "stated.md").read_text())[0].splitlines()[2:]
    for row in rows:
        name, words, why = [c.strip() for c in row.strip("|").split("|")]
        page = " ".join((ROOT / name).read_text().split())
        assert words in page, f"stated.md: {name} does not say {words!r}"
        assert len(why) > 5, row


def test_every_result_of_a_bench_says_what_ran_and_when():
    for name in figures.BENCHES:
        head = figures.result(name).splitlines()
        assert head[0] == f"# {name}"
        command = re.match(r"`python benchmarks/([^`]+)`, (\d{4}-\d\d-\d\d), ", head[2])
        assert command and command[1] == figures.BENCHES[name].command, name


def test_a_number_that_is_in_no_result_is_seen(tmp_path):
    page = (
        "It takes 1.25 s (`benchmarks/start.py`), 10, 5 and 2 % of it, 7 x as long, 0.2 to 0.3 ms, "
        "4-6 kB, -8 % and +9 %."
    )
    assert quantities(page) == {
        ("1.25", "s"), ("10", "%"), ("5", "%"), ("2", "%"), ("7", "x"), ("0.2", "ms"),
        ("0.3", "ms"), ("4", "kB"), ("6", "kB"), ("-8", "%"), ("9", "%"),
    }  # fmt: skip
    assert ("1.25", "s") not in quantities("1.26 s and 11.25 s and 1.250 s")
