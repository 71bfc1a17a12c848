"""Tables: numbers for people, intervals in small print, headers that can be read aloud."""

import re

import numpy as np
import pytest

from patchbook.tables import Estimate, Table, estimate, fixed, percent, plain


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2047.0, "2,047"),
        (94.97435897435896, "95.0"),
        (0.0301234, "0.0301"),
        (0.0, "0"),
        (-0.0, "0"),
        (-1.5, "−1.50"),
        (np.float32(0.25), "0.250"),
        (np.int64(12345), "12,345"),
        (float("nan"), ""),
        (None, ""),
        ("n/a", "n/a"),
        (float("inf"), "–"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert plain(value) == text


def test_zero_has_no_minus_and_a_minus_is_a_real_one():
    assert str(percent((-0.0001, -0.0004, 0.0003), 0)) == "0 [0, 0]"
    assert str(estimate((-0.5, -1.0, 0.25))) == "−0.50 [−1.00, 0.25]"
    assert fixed(0.004, 1, sign=True) == "+0.0" and fixed(-1234.5, 1) == "−1,234.5"
    assert str(estimate((np.nan, np.nan, np.nan))) == "– [–, –]"


ROWS = {
    ("base", "A & B"): {("accuracy %", "CLIP"): Estimate("50.0", "[40.0, 60.0]"), "images": 7.0},
    ("base", "C"): {("accuracy %", "CLIP"): "–", ("accuracy %", "MaPLe"): 0.5},
    ("novel", "C"): {"images": 1024.0},
}


def page(table):
    return table._repr_mimebundle_()["text/html"]


def test_an_interval_is_in_small_print_beside_its_estimate():
    shown = page(Table("Accuracy.", ROWS, ("classes", "data set")))
    assert "50.0 <small>[40.0, 60.0]</small>" in shown
    assert "<caption>Accuracy.</caption>" in shown and "A &amp; B" in shown
    assert "1,024" in shown and "NaN" not in shown and "nan" not in shown


def test_every_row_fills_every_column_and_no_header_is_empty():
    shown = page(Table("t", ROWS, ("classes", "data set")))
    lines = re.findall(r"<tr>(.*?)</tr>", shown)
    widths, reach = [], [0] * len(lines)
    for at, line in enumerate(lines):
        width = 0
        for cell in re.findall(r"<t[hd][^>]*>", line):
            span = [int((re.search(rf'{name}="(\d+)"', cell) or [0, 1])[1]) for name in ("col", "row")]
            span = [int(m[1]) if (m := re.search(rf'{n}span="(\d+)"', cell)) else 1 for n in ("col", "row")]
            width += span[0]
            for below in range(at + 1, at + span[1]):
                reach[below] += span[0]
        widths.append(width + reach[at])
    assert len(set(widths)) == 1, widths
    assert not re.search(r"<th[^>]*></th>", shown)
    assert shown.count('rowspan="2"') == 1 and shown.count('scope="row"') == 5


def test_a_folded_table_opens_by_its_caption():
    shown = page(Table("Long one.", ROWS, ("", ""), folded=True))
    assert shown.startswith('<details class="results"><summary>Long one.</summary>')
    assert "<caption>" not in shown and 'aria-label="Long one."' in shown


def test_plain_text_has_the_same_numbers():
    text = str(Table("Accuracy.", ROWS, ("classes", "data set")))
    assert text.startswith("Accuracy.\n")
    assert "50.0 [40.0, 60.0]" in text and "1,024" in text and "nan" not in text.lower()
