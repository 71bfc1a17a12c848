"""The reproduction report: one row for each figure and table of the paper, made by the cell it leads to."""

import json
import re
import sys
from itertools import count
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from patchbook import figures
from patchbook.collecting import collect, collect_beyond, count_verdicts
from patchbook.report import (
    BEYOND,
    ITEMS,
    KEY,
    Answer,
    Reason,
    Verdict,
    above,
    beyond,
    finding,
    label_of,
    within,
)
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.intervals import Interval
from patchsae.runs.stage import project_root

NOTEBOOKS = sorted((project_root() / "notebooks").glob("*.ipynb"))
DRAWN = {name: getattr(figures, name) for name in figures.__all__ if name[0].islower()}
WEIGHED = {"effect": 0.5, "effect_name": "Cohen's d"}
SAID = {"claim": "It holds.", "quantity": "gain", "unit": "points", "rule": "it does"} | WEIGHED
MORE = {"quantity": "gain", "unit": "points", "rule": "it does", "label": "more"} | WEIGHED


def code_below(label: str) -> str:
    """Join the code between a target and the next one; a target belongs to one notebook."""
    found = []
    for path in NOTEBOOKS:
        inside = False
        for cell in nbformat.read(path, as_version=4).cells:
            targets = re.findall(r"^\(([\w-]+)\)=$", cell.source, flags=re.MULTILINE)
            if cell.cell_type == "markdown" and targets:
                inside = label in targets
                found += [""] if inside else []
            elif cell.cell_type == "code" and inside:
                found[-1] += cell.source + "\n"
    assert len(found) == 1, f"{label} is the target of {len(found)} cells"
    return found[0]


def sources() -> list[str]:
    """Return the code that makes rows: chapters of the library, and the notebooks' own cells."""
    chapters = (project_root() / "lib" / "patchbook" / "chapters").rglob("*.py")
    cells = (cell for path in NOTEBOOKS for cell in nbformat.read(path, 4).cells)
    return [path.read_text() for path in chapters] + [c.source for c in cells if c.cell_type == "code"]


def labels_given() -> dict[str, str]:
    """Return the label of each item's row, as the sources give it."""
    calls = [
        found
        for source in sources()
        for found in re.findall(r'\bfinding\(\s*"([^"]+)",(?:\s*label="([^"]+)",)?', source)
    ]
    assert len(calls) == len(dict(calls)), "an item has two rows"
    return {item: label or label_of(item) for item, label in calls}


def test_the_paper_has_22_figures_and_two_tables():
    assert list(ITEMS) == [f"Fig. {n}" for n in range(1, 23)] + ["Table 1", "Table 2"]


def test_every_item_has_a_row_in_a_notebook():
    assert set(labels_given()) == set(ITEMS)


@pytest.mark.parametrize("item", ITEMS)
def test_the_cell_of_a_row_makes_its_figure(item):
    code = code_below(labels_given()[item])
    if item.startswith("Table"):
        assert "table" in code
    elif item == "Fig. 12":
        assert "found.explorer()" in code
    else:
        assert any(f"figures.{name}(" in code for name, draw in DRAWN.items() if item in draw.figure_of)


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_function_says_what_it_draws_and_is_shown(name):
    assert set(DRAWN[name].figure_of) <= set(ITEMS)
    assert any(f"figures.{name}(" in path.read_text() for path in NOTEBOOKS)


def test_a_finding_keeps_its_numbers():
    row = finding("Fig. 3", ours=Interval(2.0, 1.0, 3.0), paper=2.5, verdict=True, **SAID)
    shown, metadata = json.loads(json.dumps(row._repr_mimebundle_()))
    assert metadata[KEY]["ours"] == 2 and metadata[KEY]["interval"] == [1, 3]
    assert metadata[KEY]["paper"] == 2.5 and metadata[KEY]["verdict"] == "reproduced"
    assert "Paper: 2.5 points" in shown["text/html"] and "2.00 [1.00, 3.00] points" in shown["text/html"]


@pytest.mark.parametrize(
    ("ours", "written"),
    [
        (0.5, "0.5"),
        (Interval(-0.0338, -0.2, 0.452), "−0.034 [−0.200, 0.452]"),
        (Interval(59.04, 55.5, 62.3), "59.0 [55.5, 62.3]"),
        (Interval(150.0, 120.0, 180.0), "150 [120, 180]"),
        (Interval(0.0, 0.0, 0.0), "0 [0, 0]"),
        (Interval(-0.001, -0.2, 31.7), "0.0 [−0.2, 31.7]"),
    ],
)
def test_a_number_and_its_interval_have_the_same_decimals(ours, written):
    assert finding("Fig. 3", ours=ours, verdict=True, **SAID | {"unit": ""}).measured() == written


@pytest.mark.parametrize(
    "ours", [float("nan"), Interval(float("nan"), 0.0, 1.0), Interval(float("inf"), 0.0, 1.0)]
)
def test_a_number_that_is_none_is_left_empty(ours):
    row = finding("Fig. 3", ours=ours, verdict=False, why="There is none.", reason=Reason.LACKING, **SAID)
    assert row.ours is None and row.interval is None and "this run –" in str(row)
    json.dumps(row._repr_mimebundle_(), allow_nan=False)


@pytest.mark.parametrize(
    ("low", "high", "larger", "small"),
    [
        (0.1, 0.9, "reproduced", "reproduced"),
        (-0.9, -0.1, "differs", "reproduced"),
        (-0.5, 0.5, "not decided", "reproduced"),
        (0.5, 1.5, "reproduced", "not decided"),
        (1.5, 2.5, "reproduced", "differs"),
        (-2.5, -1.5, "differs", "differs"),
    ],
)
def test_an_interval_that_holds_both_answers_decides_nothing(low, high, larger, small):
    found = Interval((low + high) / 2, low, high)
    assert (above(found), within(found, 1)) == (larger, small)


def test_text_of_a_finding_is_no_markup():
    said = SAID | {"claim": "a < b & c"}
    assert (
        "a &lt; b &amp; c"
        in finding("Fig. 3", ours=1.0, verdict=True, **said)._repr_mimebundle_()[0]["text/html"]
    )


@pytest.mark.parametrize("verdict", [False, Verdict.DIFFERS, Verdict.PAPER_SCALE, Verdict.OPEN])
def test_a_verdict_other_than_reproduced_needs_a_reason(verdict):
    with pytest.raises(PatchSAEError, match="Fig. 3 is judged .* without a reason"):
        finding("Fig. 3", ours=1.0, verdict=verdict, **SAID)


@pytest.mark.parametrize("reason", [None, "", "bad luck"])
@pytest.mark.parametrize("verdict", [False, Verdict.OPEN, Verdict.PAPER_SCALE])
def test_a_verdict_other_than_reproduced_needs_a_reason_of_a_known_kind(verdict, reason):
    with pytest.raises(PatchSAEError, match="Fig. 3 is judged .* too few images, too few cl.*, at chance"):
        finding("Fig. 3", ours=1.0, verdict=verdict, why="It does not.", reason=reason, **SAID)


def test_a_reason_is_kept_where_it_is_needed_and_dropped_where_the_claim_holds():
    for verdict, kept in ((False, "effect absent"), (True, None)):
        row = finding("Fig. 3", ours=1.0, verdict=verdict, why="So.", reason="effect absent", **SAID)
        shown, metadata = row._repr_mimebundle_()
        assert metadata[KEY]["reason"] == kept and ("(effect absent)" in shown["text/html"]) == (
            not verdict
        )


@pytest.mark.parametrize("effect", [float("nan"), float("inf"), float("-inf")])
def test_an_effect_that_is_not_finite_is_refused(effect):
    with pytest.raises(PatchSAEError, match="The effect of Fig. 3 is .*: give a finite number, or None"):
        finding("Fig. 3", ours=1.0, verdict=True, **SAID | {"effect": effect})
    with pytest.raises(PatchSAEError, match="The effect of More is"):
        beyond("More", ours=1.0, verdict=True, **MORE | {"effect": effect})


def test_a_number_that_can_fail_needs_an_effect():
    bare = {key: value for key, value in SAID.items() if key not in WEIGHED}
    with pytest.raises(PatchSAEError, match="Fig. 3 has a number but no effect"):
        finding("Fig. 3", ours=1.0, verdict=True, **bare)
    with pytest.raises(PatchSAEError, match="Fig. 3 has a number but no effect"):
        finding("Fig. 3", ours=1.0, verdict=True, effect=0.5, **bare)
    assert finding("Fig. 3", ours=1.0, verdict=True, can_fail=False, **bare).weighed() == ""
    assert finding("Fig. 3", ours=None, verdict=True, **bare).weighed() == ""
    # a run may have no spread to measure the effect by, and says what it would have been
    assert finding("Fig. 3", ours=1.0, verdict=True, effect_name="d", **bare).weighed() == "– (d)"


def test_an_effect_stands_beside_the_verdict():
    row = finding("Fig. 3", ours=1.0, verdict=True, **SAID | {"effect": -0.25})
    shown, metadata = row._repr_mimebundle_()
    assert metadata[KEY]["effect"] == -0.25 and "−0.25 (Cohen&#x27;s d)" in shown["text/html"]


def test_what_is_true_by_construction_says_so_and_is_not_counted():
    given = finding("Fig. 1", ours=197, verdict=True, can_fail=False, **SAID)
    assert "true by construction" in given._repr_mimebundle_()[0]["text/html"]
    rows = [
        given._repr_mimebundle_()[1][KEY],
        finding("Fig. 3", ours=1.0, verdict=True, **SAID)._repr_mimebundle_()[1][KEY],
        finding("Fig. 4", ours=1.0, verdict=False, why="So.", reason=Reason.CHANCE, **SAID)
        ._repr_mimebundle_()[1][KEY],
    ]  # fmt: skip
    assert count_verdicts(rows) == {
        "reproduced": 1, "differs": 1, "needs paper scale": 0, "not decided": 0,
    }  # fmt: skip


def test_figures_1_and_12_alone_cannot_fail():
    marked = set()
    for source in sources():
        for call in re.split(r"\bfinding\(", source)[1:]:
            if "can_fail=False" in re.split(r"\n(?:def|class) ", call)[0]:
                marked |= set(re.findall(r'^\s*"([^"]+)"', call))
    assert marked == {"Fig. 1", "Fig. 12"}


@pytest.mark.parametrize(
    ("verdict", "answer"),
    [
        (True, Answer.HOLDS),
        (False, Answer.FAILS),
        (Verdict.OPEN, Answer.OPEN),
        (Verdict.PAPER_SCALE, Answer.OPEN),
    ],
)
def test_beyond_the_paper_nothing_is_reproduced(verdict, answer):
    row = beyond(
        "More", ours=Interval(2.0, 1.0, 3.0), verdict=verdict, why="So.", reason="at chance", **MORE
    )
    shown, metadata = row._repr_mimebundle_()
    assert metadata[BEYOND]["verdict"] == answer and metadata[BEYOND]["interval"] == (1, 3)
    assert 'data-beyond="More"' in shown["text/html"] and "Beyond the paper" in str(row)
    assert KEY not in metadata


def test_a_row_beyond_the_paper_is_refused_without_name_reason_or_effect():
    with pytest.raises(PatchSAEError, match="needs a name and the label"):
        beyond("", ours=1.0, verdict=True, **MORE)
    with pytest.raises(PatchSAEError, match="More is judged 'differs' without a reason"):
        beyond("More", ours=1.0, verdict=False, **MORE)
    with pytest.raises(PatchSAEError, match="give as reason one of"):
        beyond("More", ours=1.0, verdict=False, why="So.", **MORE)
    with pytest.raises(PatchSAEError, match="More has a number but no effect"):
        beyond("More", ours=1.0, verdict=True, **MORE | {"effect_name": ""})


def test_an_item_that_the_paper_lacks_is_refused():
    with pytest.raises(PatchSAEError, match="The paper has no 'Fig. 23'"):
        finding("Fig. 23", ours=1.0, verdict=True, **SAID)


def executed(path: Path, items, targets, more=()) -> Path:
    """Write a notebook that displays rows below targets, and some beyond the paper."""
    cells = [new_markdown_cell("\n".join(f"({target})=" for target in targets) + "\n# Title")]
    rows = [finding(item, ours=1.0, verdict=True, can_fail=item != "Fig. 1", **SAID) for item in items]
    rows += [beyond(name, ours=Interval(2.0, 1.0, 3.0), verdict=True, **MORE) for name in more]
    for row in rows:
        data, metadata = row._repr_mimebundle_()
        output = new_output("execute_result", data=data, metadata=metadata, execution_count=1)
        cells.append(new_code_cell("row", outputs=[output]))
    numbers = count()
    for cell in cells:
        cell["id"] = f"c{next(numbers)}"
    nbformat.write(new_notebook(cells=cells), path)
    return path


def test_rows_come_in_the_paper_order_with_their_cell(tmp_path):
    items = list(ITEMS)
    first = executed(tmp_path / "01.ipynb", items[::-2], [label_of(i) for i in items])
    second = executed(tmp_path / "02.ipynb", items[-2::-2], [label_of(i) for i in items])
    rows = collect([first, second])
    assert [row["id"] for row in rows] == items
    assert rows[-1]["cell"] == "01.ipynb#table-2" and rows[0]["cell"] == "02.ipynb#fig-1"
    assert set(rows[0]) >= {"id", "cell", "paper", "ours", "interval", "verdict", "why"}


@pytest.mark.parametrize(
    ("items", "targets", "message"),
    [
        (list(ITEMS)[1:], ITEMS, "No notebook reports Fig. 1: end its cell with a finding"),
        (["Fig. 2", "Fig. 2"], ITEMS, "reports Fig. 2, but one.ipynb#fig-2 does too"),
        (["Fig. 2"], ["Fig. 1"], r"reports Fig. 2 but has no target \(fig-2\)="),
    ],
)
def test_a_row_that_is_missing_double_or_leads_nowhere_is_refused(tmp_path, items, targets, message):
    path = executed(tmp_path / "one.ipynb", items, [label_of(target) for target in targets])
    with pytest.raises(PatchSAEError, match=message):
        collect([path])


def test_rows_beyond_the_paper_are_collected_apart(tmp_path):
    items = list(ITEMS)
    targets = [*map(label_of, items), "more"]
    paths = [
        executed(tmp_path / "01.ipynb", items[:12], targets, ["One", "Two"]),
        executed(tmp_path / "02.ipynb", items[12:], targets, ["Three"]),
    ]
    assert [row["id"] for row in collect(paths)] == items
    rows = collect_beyond(paths)
    assert [(row["id"], row["cell"]) for row in rows] == [
        ("One", "01.ipynb#more"), ("Two", "01.ipynb#more"), ("Three", "02.ipynb#more"),
    ]  # fmt: skip
    assert set(rows[0]) >= {"quantity", "ours", "interval", "rule", "verdict", "reason", "why", "effect"}
    json.dumps(rows, allow_nan=False)
    assert collect_beyond([executed(tmp_path / "03.ipynb", items, targets)]) == []


@pytest.mark.parametrize(
    ("names", "targets", "message"),
    [
        (["One", "One"], ["more"], "reports One, but one.ipynb#more does too"),
        (["One"], ["less"], r"reports One but has no target \(more\)="),
    ],
)
def test_a_row_beyond_the_paper_that_is_double_or_leads_nowhere_is_refused(
    tmp_path, names, targets, message
):
    with pytest.raises(PatchSAEError, match=message):
        collect_beyond([executed(tmp_path / "one.ipynb", [], targets, names)])


@pytest.fixture
def writer(monkeypatch):
    """Return book/report.py, which is no part of the package."""
    monkeypatch.setattr(sys, "path", [str(project_root() / "book"), *sys.path])
    sys.modules.pop("report", None)
    import report

    yield report
    sys.modules.pop("report")


@pytest.fixture
def small_report(tmp_path) -> dict:
    """Return a report of two notebooks with a row beyond the paper, as the build gathers it."""
    items = list(ITEMS)
    path = executed(
        tmp_path / "01_all.ipynb", items, [*map(label_of, items), "more"], ["More | than <that>"]
    )
    rows = collect([path])
    rows[3] |= {"verdict": "differs", "reason": "effect reversed", "why": "It is less."}
    book = {"notebook": "01_all.ipynb", "scale": "embedded", "seconds": 1.0, "peak_mb": 1.0, "machine": "m"}
    return {
        "rows": rows, "counts": count_verdicts(rows), "beyond": collect_beyond([path]),
        "lessons": [], "figures": [],
        "notebooks": [book | {"seeds": {"seed": 0}, "started": "now", "commit": "c"}],
        "commit": "c", "versions": {"python": "3"},
    }  # fmt: skip


def test_the_page_shows_verdict_and_effect_first_and_what_is_beyond_below(writer, small_report, tmp_path):
    writer.write_page(project_root(), small_report, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "Of the 23 that a run can refute: reproduced 22, differs 1." in text
    assert "Not counted, because true by construction: {ref}`Fig. 1 <fig-1>`." in text
    assert '<a href="../report.json">' in text
    (row,) = re.findall(r'<tr data-verdict="differs">.*</tr>', text)
    assert '<th scope="row"><a href="notebooks/01_all.html#fig-4">Fig. 4</a></th>' in row
    cells = re.findall(r'<td data-name="([^"]+)">(.*?)</td>', row)
    assert [name for name, _ in cells] == ["verdict", "this run", "effect", "paper", "about"]
    assert re.sub("<[^>]+>", " ", cells[0][1]).split() == ["differs", "effect", "reversed"]
    assert cells[1][1] == "1 points" and cells[2][1] == "0.5 (Cohen&#x27;s d)"
    assert "(**differs**, effect reversed): It is less." in text
    head, below = text.split("## Beyond the paper")
    assert head.count("<tr data-verdict=") == len(ITEMS) and below.count("<tr data-verdict=") == 1
    assert '<a href="notebooks/01_all.html#more">More | than &lt;that&gt;</a>' in below
    assert '2.00 <span class="interval">[1.00, 3.00]</span> points' in below


def test_a_verdict_has_a_button_with_the_number_of_its_rows(writer, small_report, tmp_path):
    writer.write_page(project_root(), small_report, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    buttons = re.findall(r'<button[^>]*data-verdict="([^"]*)"[^>]*>([^<]*) \((\d+)\)<', text)
    assert buttons == [
        ("", "all", "24"), ("by construction", "by construction", "1"),
        ("reproduced", "reproduced", "22"), ("differs", "differs", "1"),
    ]  # fmt: skip


def test_undecided_rows_are_listed_by_reason(writer, small_report, tmp_path):
    assert "by reason" not in "\n".join(writer._undecided(small_report))
    for at, reason in ((5, "at chance"), (6, "too few images"), (7, "at chance")):
        small_report["rows"][at] |= {"verdict": "not decided", "reason": reason, "why": "So."}
    lines = writer._undecided(small_report)
    assert "* **at chance**: {ref}`Fig. 6 <fig-6>`, {ref}`Fig. 8 <fig-8>`" in lines
    assert "* **too few images**: {ref}`Fig. 7 <fig-7>`" in lines


def test_the_index_leads_from_the_papers_numbers_to_pictures(writer, small_report):
    drawn = {"items": ["Fig. 2"], "png": "_static/figures/01_all/fig-2.png"}
    lines = writer._index(small_report | {"figures": [drawn, drawn]})
    (row,) = (line for line in lines if line.startswith("| {ref}`Fig. 2 <fig-2>`"))
    assert row.count('href="../_static/figures/01_all/fig-2.png"') == 2 and ITEMS["Fig. 2"] in row
    assert sum(line.startswith("| {ref}") for line in lines) == len(ITEMS)


def test_a_report_without_rows_beyond_has_no_such_part(writer, small_report, tmp_path):
    writer.write_page(project_root(), small_report | {"beyond": []}, tmp_path / "report.md")
    writer.write_digest(small_report | {"beyond": []}, tmp_path / "digest.txt")
    assert "Beyond the paper" not in (tmp_path / "report.md").read_text()
    assert "Beyond the paper" not in (tmp_path / "digest.txt").read_text()


def test_the_digest_counts_and_names_what_is_beyond(writer, small_report, tmp_path):
    writer.write_digest(small_report, tmp_path / "digest.txt")
    text = (tmp_path / "digest.txt").read_text()
    assert "of the 23 figures and tables" in text and "**reproduced 22, differs 1**" in text
    assert "{ref}`shown here <more>`): holds." in text
    assert "```{include} digest.txt" in (project_root() / "book" / "intro.md").read_text()


def test_the_digest_sets_the_three_claims_beside_this_run(writer, small_report, tmp_path):
    rows = {row["id"]: row for row in small_report["rows"]}
    rows["Fig. 17"] |= {"verdict": "differs", "reason": "at chance", "why": "No.", "paper": 6.25}
    picture = {"items": ["Fig. 1"], "png": "_static/a.png", "inches": [7.0, 2.0], "alt": "Seen.",
               "caption": "It.", "notebook": "01_all", "target": "fig-1"}  # fmt: skip
    writer.write_digest(small_report | {"figures": [picture]}, tmp_path / "digest.txt")
    text = (tmp_path / "digest.txt").read_text()
    shown = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*)</tr>', text)
    assert [claim for claim, _ in shown] == [claim for claim, *_ in writer.CLAIMS]
    assert "6.25 points" in shown[1][1] and "verdict-differs" in shown[1][1] and "No." in shown[1][1]
    assert "verdict-reproduced" in shown[0][1] and 'href="notebooks/01_all.html#fig-5"' in shown[0][1]
    assert 'alt="Seen."' in text and 'src="../_static/a.png"' in text
    # a blank line would end the HTML
    assert "" not in text[: text.index("</div>\n\nIn this run")].splitlines()


def test_the_main_result_of_a_chapter_is_its_lesson_or_its_first_row(writer, small_report):
    (line,) = writer._main_results(small_report)
    assert line.startswith("* [](notebooks/01_all.ipynb): It holds. **reproduced**: gain, 1 points")
    lesson = {"text": "All is well.", "cell": "01_all.ipynb#more"}
    assert writer._main_results(small_report | {"lessons": [lesson]}) == [
        "* [](notebooks/01_all.ipynb): All is well. {ref}`Shown here <more>`."
    ]


@pytest.fixture(scope="module")
def report(html) -> dict:
    """Return the report of the built book."""
    return json.loads((html / "report.json").read_text())


def test_the_built_report_has_24_rows_and_what_they_cost(report):
    assert [row["id"] for row in report["rows"]] == list(ITEMS)
    assert {row["verdict"] for row in report["rows"]} <= set(Verdict)
    for row in report["rows"]:
        assert row["ours"] is None or isinstance(row["ours"], float)
        assert row["why"] or row["verdict"] == Verdict.REPRODUCED
        assert row["interval"] is None or row["interval"][0] <= row["ours"] <= row["interval"][1]
        assert (row["reason"] in set(Reason)) == (row["verdict"] != Verdict.REPRODUCED)
        assert row["effect"] is None or isinstance(row["effect"], float)
        assert row["effect_name"] or row["ours"] is None or not row["can_fail"]
    assert report["counts"] == count_verdicts(report["rows"])
    assert [row["id"] for row in report["rows"] if not row["can_fail"]] == ["Fig. 1", "Fig. 12"]
    assert "05_adaptation.ipynb#seen-and-unseen" in [row["cell"] for row in report["beyond"]]
    assert [book["notebook"] for book in report["notebooks"]] == [path.name for path in NOTEBOOKS]
    for book in report["notebooks"]:
        assert book["seconds"] > 0 and "seed" in book["seeds"] and book["scale"] == "embedded"
        assert book["peak_mb"] > 100
    assert report["versions"]["torch"] and report["versions"]["python"]


def test_every_link_of_the_report_lands_on_its_cell(report, visit, html):
    page, wrong = visit(html / "book" / "report.html")
    page.emulate_media(reduced_motion="reduce")
    shown = page.evaluate("""() => [...document.querySelectorAll('table[data-of=paper] tbody tr')]
        .map(row => [row.cells[0].innerText.trim(), row.querySelector('a')?.href])""")
    links = dict(shown)
    for row in sorted(
        report["rows"], key=lambda row: row["cell"]
    ):  # a page is opened once for all its rows
        name, label = row["cell"].split("#")
        target = links[row["id"]]
        assert target.endswith(f"/{name.removesuffix('.ipynb')}.html#{label}")
        page.goto(target)
        page.wait_for_function(
            """label => { const at = document.getElementById(label);
            return at !== null && at.getBoundingClientRect().top < innerHeight; }""",
            arg=label,
        )
        # the sentence that the row was taken from stands on the same page
        card = page.locator(f'[data-finding="{row["id"]}"]')
        assert card.count() == 1 and row["verdict"] in card.inner_text()
    assert wrong == []


def test_the_report_keeps_the_rows_of_one_verdict(report, visit, html):
    page, wrong = visit(html / "book" / "report.html")
    rows = page.locator("table[data-of=paper] tbody tr")
    for button in page.locator(".filter button").all():
        button.click()
        wanted = button.get_attribute("data-verdict")
        shown = [row for row in rows.all() if row.is_visible()]
        assert f"({len(shown)})" in button.inner_text() and shown
        assert all(row.get_attribute("data-verdict") == (wanted or row.get_attribute("data-verdict"))
                   for row in shown)  # fmt: skip
    assert wrong == []
