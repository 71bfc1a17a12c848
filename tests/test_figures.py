"""Figures can be read: large enough text, few inches, colours that many tell apart, words, numbers."""

import csv
import io
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from drawn import calls
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from patchbook import figures
from patchbook.collecting import FIGURE
from patchbook.figures import parts, showing

DRAWN = sorted(name for name in figures.__all__ if name[0].islower())
PALE = {"#F6D6C2", "#CFE3F1"}
"""Grounds below ✓ and ✗, which say the same."""


@pytest.fixture(scope="module")
def drawn() -> dict[str, tuple[Figure, dict, dict]]:
    """Draw each figure once: itself, its forms, and what is said of it."""
    found = {}
    for name, call in calls(np.random.default_rng(0)).items():
        figure = call()
        found[name] = (figure, *showing.bundle(figure))
        plt.close(figure)
    return found


def test_every_figure_function_has_a_call(drawn):
    assert sorted(drawn) == DRAWN


@pytest.mark.parametrize("name", DRAWN)
def test_text_is_at_least_8_points_on_at_most_7_inches(drawn, name):
    figure, _, said = drawn[name]
    assert said[FIGURE]["inches"][0] <= parts.WIDTH
    assert showing.smallest_text(figure) >= parts.SMALL
    assert said[FIGURE]["smallest"] >= parts.SMALL


@pytest.mark.parametrize("name", DRAWN)
def test_colours_are_of_the_palette_or_grey(drawn, name):
    figure, _, _ = drawn[name]
    allowed = {colour.upper() for colour in parts.PALETTE} | PALE
    colours = [
        colour
        for line in figure.findobj(Line2D)
        if line.get_linestyle() != "None" or line.get_marker() not in ("None", "", None)
        for colour in (line.get_color(), line.get_markerfacecolor())
    ]
    colours += [text.get_color() for text in figure.findobj(Text)]
    colours += [patch.get_facecolor() for patch in figure.findobj(Patch)]
    for colour in colours:
        if isinstance(colour, str) and colour == "none":
            continue
        red, green, blue = to_rgb(colour)
        assert max(red, green, blue) - min(red, green, blue) < 0.02 or to_hex(colour).upper() in allowed


@pytest.mark.parametrize("name", DRAWN)
def test_a_figure_has_words_numbers_and_a_drawing_to_print(drawn, name):
    _, data, said = drawn[name]
    assert set(data) == {"image/png", "application/pdf", "text/csv", "text/plain"}
    rows = list(csv.reader(io.StringIO(data["text/csv"])))
    assert tuple(rows[0]) == showing.HEAD and len(rows) > 1
    assert len({len(row) for row in rows}) == 1
    alt, caption = said[FIGURE]["alt"], said[FIGURE]["caption"]
    assert 20 <= len(alt) <= showing.LONG + 2 and len(caption.split()) > 5 and caption.endswith(".")


def test_the_csv_holds_what_is_drawn():
    one = figures.dead_latents({"with": [{"step": 3, "dead_share": 0.25}, {"step": 9, "dead_share": 0.5}]})
    rows = list(csv.DictReader(io.StringIO(showing.as_csv(one))))
    assert [(row["series"], row["x"], row["y"]) for row in rows] == [
        ("with", "3", "25"),
        ("with", "9", "50"),
    ]
    assert "dead latents (%) over step: with from 25 to 50" in showing.described(one)
    plt.close(one)


def test_the_oracle_lies_above_the_predicted(drawn):
    axis = drawn["masking_curves"][0].axes[0]
    order = [line.get_label() for line in axis.lines]
    for switch in ("on", "off"):
        below = order.index(f"{switch} top-k, class (predicted)")
        above = order.index(f"{switch} top-k, class (oracle)")
        assert below < above
        assert axis.lines[below].get_linewidth() > 2 * axis.lines[above].get_linewidth()


def test_series_differ_by_more_than_their_colour(drawn):
    axis = drawn["score_intervals"][0].axes[0]
    marks = [line.get_marker() for line in axis.lines if line.get_marker() not in ("None", "", "|")]
    assert len(marks) == len(set(marks)) == 5
    said = {text.get_text()[0] for text in drawn["masked_predictions"][0].axes[1].texts}
    assert said == {"✓", "✗"}


def test_a_text_that_is_too_small_is_noticed():
    figure, axis = plt.subplots()
    axis.text(0.5, 0.5, "small", fontsize=5)
    assert showing.smallest_text(figure) == 5
    axis.axis("off")
    axis.tick_params(labelsize=2)  # not drawn
    assert showing.smallest_text(figure) == 5
    plt.close(figure)


def test_a_chapter_loads_the_figures_that_it_draws_and_no_others():
    """So that a change of another figure does not run it again."""
    code = (
        "import sys; from patchbook import figures; figures.learning_curve; "
        "print(sorted(m.split('.')[2] for m in sys.modules if m.startswith('patchbook.figures.')))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "['parts', 'showing', 'training']"
