"""Every section of book/facts.md that is cited anywhere exists, and its tables are those the code has."""

import json
import re
from pathlib import Path

import pytest

from patchbook.chapters.published import TABLE_1, TABLE_2
from patchsae.images.benchmark_table import BENCHMARKS, RECIPES
from patchsae.runs.stage import project_root

ROOT = project_root()
PLACES = ("lib", "tests", "notebooks", "benchmarks", "book", "artefacts", "workflow")
TEXTS = (".py", ".ipynb", ".md", ".txt", ".yaml", ".yml", "")  # '' is the Snakefile

NUMBER = r"\d+(?:\.\d+)*"
# '§4.5-4.7', '§4.1, §4.2', '§4.5 and §4.7'; a line of a comment may begin in between
LIST = rf"§{NUMBER}(?:\s?[-–]\s?§?{NUMBER}|(?:,|,?\s(?:and|or|to))[\s#]+§{NUMBER})*"
CITATION = re.compile(rf"[Ff]acts(?:\.md)?[\s#]+({LIST})")
OUTSIDE = re.compile(r"\b(?:peers|book|embedded|paper)\.md\b")


def cited(text: str) -> list[str]:
    """List the sections that a text cites, ranges written out."""
    found = []
    for citation in CITATION.findall(text):
        for first, last in re.findall(rf"({NUMBER})(?:\s?[-–]\s?§?({NUMBER}))?", citation):
            found += between(first, last or first)
    return found


def between(first: str, last: str) -> list[str]:
    (chapter, _, a), (other, _, b) = first.rpartition("."), last.rpartition(".")
    if chapter != other:
        return [first, last]
    return [f"{chapter}.{n}".lstrip(".") for n in range(int(a), int(b) + 1)]


def headings(page: str) -> list[str]:
    return re.findall(rf"^##+ §({NUMBER}) ", page, re.M)


def unknown(text: str, page: str) -> set[str]:
    return set(cited(text)) - set(headings(page))


def read(path: Path) -> str:
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "book" / "facts.md").read_text("utf-8")


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    files = [path for place in PLACES for path in (ROOT / place).rglob("*") if path.suffix in TEXTS]
    files = [path for path in files if path.is_file() and path != Path(__file__).resolve()]
    return {str(path.relative_to(ROOT)): read(path) for path in [*files, ROOT / "README.md"]}


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("as facts.md §1.1 says, and paper §3.2", ["1.1"]),
        ("(facts.md §2).", ["2"]),
        ("paper §3.2, facts.md §4.5-4.7.", ["4.5", "4.6", "4.7"]),
        ("facts.md §4.9–§4.10", ["4.9", "4.10"]),
        ("facts.md §4.1, §4.2 and §4.7, 3 images", ["4.1", "4.2", "4.7"]),
        ("facts.md\n    # §0, §1.4; §9", ["0", "1.4"]),
        ("facts.md §1-3", ["1", "2", "3"]),
        ("the facts of facts.md", []),
    ],
)
def test_a_citation_is_read_with_its_ranges_and_lists(text, sections):
    assert cited(text) == sections


def test_a_section_that_is_not_there_is_noticed(page):
    assert unknown("facts.md §4.1, §4.99 and facts.md §8-9", page) == {"4.99", "8", "9"}
    assert unknown("facts.md §4.1", page.replace("### §4.1 ", "### 4.1 ")) == {"4.1"}


def test_every_section_that_is_cited_has_a_heading(page, texts):
    assert sum(len(cited(text)) for text in texts.values()) > 40
    assert {name: missing for name, text in texts.items() if (missing := unknown(text, page))} == {}


def test_sections_are_numbered_once_and_in_order(page):
    numbers = [[int(part) for part in number.split(".")] for number in headings(page)]
    assert numbers == sorted(numbers) and len(set(map(tuple, numbers))) == len(numbers)
    assert len(numbers) == len(re.findall(r"^##", page, re.M))


def test_no_file_cites_a_page_that_a_reader_does_not_have(texts):
    assert {name: found for name, text in texts.items() if (found := OUTSIDE.findall(text))} == {}
    assert OUTSIDE.findall('(peers.md, "The idea", 2), reference/book.md, book/facts.md') == [
        "peers.md",
        "book.md",
    ]


def rows(page: str, section: str) -> list[list[str]]:
    """Return the cells of the rows of the one table of a section."""
    body = re.split(r"^##+ ", page.partition(f"# §{section} ")[2], maxsplit=1, flags=re.M)[0]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_tables_of_the_paper_are_those_of_the_code(page):
    expected = []
    for name, row in TABLE_1.items():
        columns = (row.clip, row.official_clip, row.maple, row.official_maple, *row[:3])
        expected.append([RECIPES[name].title, *(f"{base:.2f} / {novel:.2f}" for base, novel in columns)])
    assert rows(page, "0.2") == expected
    found = [[None if cell == "–" else float(cell) for cell in row[1:]] for row in rows(page, "0.1")]
    assert found == [list(row) for row in TABLE_2.values()]


def test_the_data_sets_are_those_of_the_code(page):
    found = {row[0].strip("`"): (int(row[3]), row[4].strip("`")) for row in rows(page, "2")}
    assert found == {name: (RECIPES[name].classes, RECIPES[name].template) for name in BENCHMARKS}
