"""The page acts: answers under changes, addresses, names, cards, and what is hostile, in a browser."""

import json

import pytest
from test_explorer_browser import drawn, go, opened, page_file, part, parts  # noqa: F401

from patchsae.explorer import Change


def shares(page) -> list[str]:
    return page.locator(".px table.answer tbody td").all_inner_texts()


def expected(found) -> list[str]:
    return [f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" for share in found["share"]]


def test_answers_stand_beside_each_other_and_can_be_undone(opened, parts):  # noqa: F811
    explorer, state = parts.explorer(), drawn_state(opened)
    latent = state["latent"]
    assert part(opened, "truth").inner_text() == "True class: face with cowboy hat"
    part(opened, "off").click()
    assert drawn(opened)["gains"] == {str(latent): 0}
    columns = opened.locator(".px table.answer").all()
    for model, table in enumerate(columns):
        cells = [cell.replace(" %", "%") for cell in table.locator("tbody td").all_inner_texts()]
        pairs = explorer.answer(0, model), explorer.answer(0, model, Change({latent: 0.0}))
        for side, found in enumerate(pairs):
            for cell, name, share in zip(cells[side::2], found["classes"], expected(found), strict=True):
                assert name in cell and abs(float(cell.split()[-1][:-1]) - float(share[:-1])) <= 1
    assert len(columns) == 2
    part(opened, "undo").click()
    assert drawn(opened)["gains"] == {} and part(opened, "undo").is_disabled()


def drawn_state(page) -> dict:
    return page.evaluate("() => JSON.parse(document.querySelector('.px').dataset.drawn)")


def test_back_forward_reload_and_links_work(opened):  # noqa: F811
    state = go(opened, "image=3&patch=2,5&latent=12&off=12,40&turned=7:1.5&top=3:off&model=2&mask=0")
    assert (state["image"], state["patch"], state["latent"], state["adapted"]) == (3, 7 + 4, 12, 2)
    assert state["gains"] == {"12": 0, "40": 0, "7": 1.5} and (state["k"], state["keep"]) == (3, "off")
    address = opened.evaluate("() => location.hash")
    opened.locator(".px .thumbnail").nth(1).click()
    assert drawn(opened)["image"] == 1 and opened.evaluate("() => location.hash") != address
    opened.go_back()
    assert drawn(opened) == state
    opened.go_forward()
    assert drawn(opened)["image"] == 1
    opened.go_back()
    drawn(opened)
    opened.reload()
    opened.wait_for_selector(".px[data-drawn]")
    assert drawn_state(opened) == state and opened.evaluate("() => location.hash") == address


def test_an_address_of_nonsense_shows_what_there_is(opened):  # noqa: F811
    address = "image=99&patch=0,9&latent=x&off=999,-1&turned=1:9&top=0:on&strength=7&model=9"
    opened.evaluate("address => { location.hash = address; }", address)
    opened.wait_for_timeout(500)  # what is shown may be what was
    state = drawn_state(opened)
    assert (state["image"], state["patch"], state["gains"], state["keep"]) == (0, None, {}, "")
    assert state["latent"] is not None and state["opacity"] == 0.9 and state["adapted"] == 1
    opened.evaluate("() => { location.hash = 'fig-12'; }")  # of the book's, not of the explorer's
    opened.wait_for_timeout(200)
    assert drawn_state(opened) == state


@pytest.mark.parametrize("width", [400, 1280])
def test_the_picture_stays_on_the_screen(opened, width):  # noqa: F811
    opened.set_viewport_size({"width": width, "height": 900})
    opened.wait_for_timeout(300)
    for name in ("near-decoder", "common"):
        button = part(opened, name).locator("button").last
        button.scroll_into_view_if_needed()
        button.click()
        opened.wait_for_timeout(200)
        box = part(opened, "image").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900
        assert part(opened, "answers").bounding_box()["y"] < 900
    assert opened.evaluate("() => document.documentElement.scrollHeight") < 1200


def test_latents_are_found_by_word_and_by_class(opened):  # noqa: F811
    words = opened.evaluate(
        """() => [...document.querySelectorAll('.px .lists button i')].map(n => n.textContent)"""
    )
    word = words[0].removesuffix("?")
    part(opened, "search").fill(word)
    found = part(opened, "found").locator("button")
    assert found.count() and all(word in text for text in found.all_inner_texts())
    latent = int(found.last.get_attribute("data-latent"))
    found.last.click()
    opened.wait_for_timeout(300)
    assert drawn_state(opened)["latent"] == latent
    assert word in part(opened, "name").inner_text() and "proo" in part(opened, "name").inner_text()
    part(opened, "search").fill("<img src=x onerror=alert(1)>")
    assert "No latent is called “<img" in part(opened, "found-note").inner_text()
    part(opened, "next").click()
    assert part(opened, "next-note").inner_text()


def test_a_view_can_be_kept_as_picture_and_numbers(opened, tmp_path):  # noqa: F811
    with opened.expect_download() as card:
        part(opened, "card").click()
    card.value.save_as(tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")
    with opened.expect_download() as numbers:
        part(opened, "numbers").click()
    numbers.value.save_as(tmp_path / "numbers.json")
    kept = json.loads((tmp_path / "numbers.json").read_text("utf-8"))
    assert kept["state"] == drawn_state(opened) and len(kept["answers"]) == 2
    assert kept["latent"]["number"] == kept["state"]["latent"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_wrong(opened, theme):  # noqa: F811
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    opened.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    part(opened, "off").click()
    drawn(opened)
    found = axe.run(opened, context=".px").response["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
