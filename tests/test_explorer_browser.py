"""The explorer in a browser without a network, opened from disk: every control changes what is drawn."""

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from test_explorer import stored
from tiny_explorer import make_parts

from patchsae.explorer import Explorer
from patchsae.explorer.data import group_latents, image_values, patch_map
from patchsae.explorer.gallery import picture_block

PIXELS = """name => { const c = document.querySelector(`[data-part="${name}"]`);
  return c.width + ' ' + c.toDataURL(); }"""
PATCH_COLOUR = """([row, column, rows, columns]) => {
  const c = document.querySelector('[data-part="map-clip"]');
  const x = (column + 0.5) * c.width / columns, y = (row + 0.5) * c.height / rows;
  return [...c.getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)]; }"""
AXIS = """peak => { const context = document.createElement('canvas').getContext('2d');
  context.font = '11px system-ui, sans-serif';
  return Math.ceil(context.measureText(peak.toPrecision(3)).width) + 10; }"""
REFERENCES = "() => [...document.querySelectorAll('.references canvas')].map(c => c.toDataURL()).join()"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("explorer"))


@pytest.fixture
def page_file(parts):
    """Write a page with the explorer beside its blocks."""
    path = parts.folder.parent / "page.html"
    head = '<!doctype html><html data-theme="light"><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1"><body>'
    path.write_text(head + parts.explorer().html(base="./"), encoding="utf-8")
    return path


def drawn(page) -> dict:
    """Wait until the explorer shows its state, and return that."""
    page.wait_for_function("""() => { const d = document.querySelector('.px')?.dataset.drawn;
      if (!d || d === window.seen) return false; window.seen = d; return true; }""")
    return page.evaluate("() => JSON.parse(window.seen)")


def go(page, address: str) -> dict:
    """Follow a link to an address of the explorer's."""
    page.evaluate("address => { location.hash = address; }", address)
    return drawn(page)


@pytest.fixture
def opened(visit, page_file):
    """Open the page; whatever it asks of a network, and every error in it, fails the test."""
    page, wrong = visit(page_file, width=1100)
    page.set_default_timeout(10_000)
    drawn(page)
    go(page, "image=0")
    yield page
    assert wrong == []


def part(page, name):
    return page.locator(f'.px [data-part="{name}"]')


def pixels(page, *names) -> list[str]:
    return [page.evaluate(PIXELS, name) for name in names]


def lists(page) -> dict[str, list[tuple[int, float]]]:
    return {
        group: [
            (int(b.get_attribute("data-latent")), float(b.get_attribute("data-value")))
            for b in part(page, group).locator("button").all()
        ]
        for group in ("common", "clip", "adapted")
    }


def click_patch(page, row: int, column: int, grid) -> dict:
    box = part(page, "image").bounding_box()
    place = {"x": (column + 0.5) * box["width"] / grid[1], "y": (row + 0.5) * box["height"] / grid[0]}
    part(page, "image").click(position=place)
    return drawn(page)


def test_an_image_of_the_gallery_is_shown(opened):
    before = pixels(opened, "image", "bars-image", "map-clip", "map-adapted")
    opened.locator(".px .thumbnail").nth(3).click()
    assert drawn(opened)["image"] == 3
    after = pixels(opened, "image", "bars-image", "map-clip", "map-adapted")
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert opened.locator(".px .thumbnail").nth(3).get_attribute("aria-pressed") == "true"


def test_a_patch_can_be_clicked_and_taken_back(opened, parts):
    grid = parts.models[0].backbone.grid
    before = pixels(opened, "image", "bars-patch")
    assert click_patch(opened, 3, 4, grid)["patch"] == 3 * grid[1] + 4
    after = pixels(opened, "image", "bars-patch")
    assert before[0] != after[0] and before[1] != after[1]
    assert "row 4, column 5" in part(opened, "where").inner_text()
    part(opened, "whole").click()
    assert drawn(opened)["patch"] is None
    assert pixels(opened, "image", "bars-patch") == before
    assert part(opened, "whole").is_disabled()


@pytest.mark.parametrize("patch", [None, (2, 3), (6, 6)])
@pytest.mark.parametrize("model", [1, 2])
def test_the_lists_are_those_that_python_computes(opened, parts, patch, model):
    grid, left_out = parts.models[0].backbone.grid, parts.sets[0].atlas.image_frequency_tau.values > 0.5
    if model == 2:
        part(opened, "model").select_option("2")
        drawn(opened)
    for image in range(len(parts.gallery)):
        if image:
            opened.locator(".px .thumbnail").nth(image).click()
            drawn(opened)
        number = None
        if patch:
            number = click_patch(opened, *patch, grid)["patch"]
        groups = group_latents(stored(parts, image, 0), stored(parts, image, model), left_out, number)
        assert list(lists(opened).values()) == [[(s, float(np.float32(v))) for s, v in g] for g in groups]


def test_a_latent_changes_maps_scatter_statistics_and_references(opened, parts):
    names = ["map-clip", "map-adapted", "scatter", "bars-image"]
    before, table = pixels(opened, *names), part(opened, "statistics").inner_text()
    references = opened.evaluate(REFERENCES)
    button = part(opened, "common").locator("button").nth(1)
    latent = int(button.get_attribute("data-latent"))
    button.click()
    assert drawn(opened)["latent"] == latent
    assert all(a != b for a, b in zip(before, pixels(opened, *names), strict=True))
    assert part(opened, "heading").inner_text() == f"Latent {latent}"
    assert part(opened, "statistics").inner_text() != table and opened.evaluate(REFERENCES) != references
    atlas = parts.sets[0].atlas.isel(latent=latent)
    cells = part(opened, "statistics").locator("td").all_inner_texts()
    shown = ("image_frequency", "image_frequency_tau", "mean_activation", "entropy", "label_std")
    for cell, name in zip(cells, shown, strict=True):
        assert float(cell) == pytest.approx(float(atlas[name]), rel=0.01)
    values = image_values(stored(parts, 0, 0), parts.sae.d_sae)
    caption = part(opened, "caption-clip").inner_text()
    assert float(caption.removeprefix("CLIP: image ")) == pytest.approx(values[latent], rel=0.01)


def test_references_carry_label_and_value_of_every_set(opened, parts):
    latent = opened.evaluate("() => JSON.parse(window.seen).latent")
    for row, one in zip(opened.locator(".px .references").all(), parts.sets, strict=True):
        column = one.atlas.isel(latent=latent)
        found = row.locator("figure")
        labels = [one.images.classnames[label] for label in column.top_label.values[:4] if label >= 0]
        assert found.count() == (column.top_value.values[:4] > 0).sum()
        for figure, label, value in zip(found.all(), labels, column.top_value.values, strict=False):
            assert figure.get_attribute("data-label") == label
            assert float(figure.get_attribute("data-value")) == pytest.approx(float(value), rel=1e-6)


def test_the_model_the_slider_and_the_mask_change_what_is_drawn(opened):
    before = pixels(opened, "bars-image", "map-adapted")
    part(opened, "model").select_option("2")
    assert drawn(opened)["adapted"] == 2
    after = pixels(opened, "bars-image", "map-adapted")
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert part(opened, "title-adapted").inner_text().startswith("Only Fine-tuned")
    seen = [pixels(opened, "map-clip")]
    for step in ("Home", "End"):
        part(opened, "opacity").press(step)
        drawn(opened)
        seen.append(pixels(opened, "map-clip"))
    assert seen[0] != seen[1] != seen[2] != seen[0]
    masked = opened.evaluate(REFERENCES)
    part(opened, "mask").uncheck()
    assert drawn(opened)["mask"] is False
    plain = opened.evaluate(REFERENCES)
    assert masked != plain
    part(opened, "mask").check()
    drawn(opened)
    assert opened.evaluate(REFERENCES) == masked


def test_bars_and_scatter_choose_a_latent(opened):
    first = opened.evaluate("() => JSON.parse(window.seen).latent")
    values = {s: v for group in lists(opened).values() for s, v in group}
    # in the middle, where a place without the margin for the axis would be beside the bar
    other = min(set(values) - {first}, key=lambda s: abs(s - 40))
    left = opened.evaluate(AXIS, max(values.values()))
    x = left + (other + 0.5) * (part(opened, "bars-image").bounding_box()["width"] - 4 - left) / 128
    part(opened, "bars-image").click(position={"x": x, "y": 75})
    assert drawn(opened)["latent"] == other
    chosen = opened.evaluate("""() => { const c = document.querySelector('[data-part="scatter"]');
      for (let y = 30; y < c.clientHeight - 40; y += 6) for (let x = 45; x < c.clientWidth - 8; x += 6) {
        const box = c.getBoundingClientRect();
        c.dispatchEvent(new MouseEvent('click', {clientX: box.x + x, clientY: box.y + y, bubbles: true}));
      } return true; }""")
    assert chosen and drawn(opened)["latent"] != other


def test_any_latent_can_be_called_by_its_number(opened, parts):
    left_out = int(np.flatnonzero(parts.sets[0].atlas.image_frequency_tau.values > 0.5)[0])
    entry, before = part(opened, "number"), pixels(opened, "map-clip", "scatter")
    assert int(entry.input_value()) == opened.evaluate("() => JSON.parse(window.seen).latent")
    entry.fill(str(left_out))
    entry.press("Enter")
    assert drawn(opened)["latent"] == left_out
    assert all(a != b for a, b in zip(before, pixels(opened, "map-clip", "scatter"), strict=True))
    assert "Left out of the lists: f (0.2) is above 0.5." in part(opened, "statistics").inner_text()
    for wrong in ("128", "-1", "2.5", "2.5"):
        entry.fill(wrong)
        entry.press("Enter")
        message = part(opened, "number-message")
        assert message.inner_text() == f"There is no latent {wrong}: choose a whole number from 0 to 127."
        assert message.get_attribute("role") == "alert" and entry.input_value() == str(left_out)
        field, said = entry.bounding_box(), message.bounding_box()
        assert 0 <= said["y"] - field["y"] - field["height"] < 60  # where the reader looks
    entry.fill("")
    entry.press("Enter")
    assert part(opened, "number-message").inner_text() == "" and entry.input_value() == str(left_out)
    entry.fill("128")
    entry.press("Enter")
    entry.fill("3")
    entry.press("Enter")
    assert drawn(opened)["latent"] == 3 and part(opened, "number-message").inner_text() == ""


@pytest.mark.parametrize("ground", ["black", "white"])
def test_a_map_shows_on_black_and_on_white(visit, parts, tmp_path, ground):
    folder, side = tmp_path / parts.folder.name, parts.gallery.load([0]).images.shape[-1]
    shutil.copytree(parts.folder, folder)
    text = json.dumps(picture_block(Image.new("RGB", (side, side), ground)))
    (folder / "image-0.js").write_text(f'patchsaeExplorer.receive("{folder.name}","image-0",{text});')
    path = tmp_path / "page.html"
    path.write_text(
        "<!doctype html><meta charset=utf-8>" + Explorer(folder).html(base="./"), encoding="utf-8"
    )
    page, wrong = visit(path, width=1100)
    drawn(page)
    grid, found = parts.models[0].backbone.grid, stored(parts, 0, 0)
    maps = {int(s): patch_map(found, s, grid[0] * grid[1]) for s in found.latent}
    latent = max(maps, key=lambda s: maps[s].max() * (maps[s].min() == 0))
    part(page, "number").fill(str(latent))
    part(page, "number").press("Enter")
    drawn(page)
    part(page, "opacity").press("End")
    drawn(page)
    places = [int(maps[latent].argmax()), int(maps[latent].argmin())]
    fires, silent = (page.evaluate(PATCH_COLOUR, [*divmod(place, grid[1]), *grid]) for place in places)
    assert max(silent) - min(silent) <= 10 and fires[0] - fires[2] > 60  # grey, and yellow
    assert fires[0] - silent[0] > 60
    part(page, "opacity").press("Home")
    drawn(page)
    plain = page.evaluate(PATCH_COLOUR, [*divmod(places[0], grid[1]), *grid])
    assert np.ptp(plain) == 0 and plain[0] == (255 if ground == "white" else 0) and wrong == []


def test_a_reader_is_told_what_is_what(opened, parts):
    grid = parts.models[0].backbone.grid
    click_patch(opened, 2, 3, grid)
    assert opened.locator('.px [data-part="gallery"] .set').all_inner_texts() == ["General"]
    names = ["Common", "Only CLIP", "Only MaPLe"]
    assert part(opened, "legend").locator("span").all_inner_texts() == [*names, "on no list"]
    for name, group in zip(names, lists(opened), strict=True):
        count = len(lists(opened)[group])
        assert part(opened, f"title-{group}").inner_text() == f"{name} ({count})"
    assert "common if both models name it" in part(opened, "rule").inner_text()
    part(opened, "opacity").press("Home")
    drawn(opened)
    assert part(opened, "strength").inner_text() == "0 %"
    symbols = part(opened, "statistics").locator("th:first-child").all_inner_texts()
    assert symbols == ["f", "f (0.2)", "a", "e", "σ"]
    latent = opened.evaluate("() => JSON.parse(window.seen).latent")
    maps = [patch_map(stored(parts, 0, model), latent, grid[0] * grid[1]) for model in (0, 1)]
    brightest = float(part(opened, "scale").inner_text().removesuffix(".").split()[-1])
    assert brightest == pytest.approx(np.max(maps), rel=0.01)


def test_the_keyboard_reaches_everything(opened, parts):
    columns = parts.models[0].backbone.grid[1]
    opened.locator(".px .thumbnail").first.focus()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Enter")
    assert drawn(opened)["image"] == 1
    opened.keyboard.press("Tab")  # the gallery is one stop
    assert opened.evaluate("() => document.activeElement.textContent") == "A picture of your own"
    opened.keyboard.press("Tab")
    assert opened.evaluate("() => document.activeElement.dataset.part") == "image"
    part(opened, "model").focus()
    opened.keyboard.press("ArrowDown")
    assert drawn(opened)["adapted"] == 2
    part(opened, "image").focus()
    opened.keyboard.press("ArrowDown")
    assert drawn(opened)["patch"] == 0
    for key in ("ArrowDown", "ArrowRight"):
        opened.keyboard.press(key)
        state = drawn(opened)
    assert state["patch"] == columns + 1
    opened.keyboard.press("Escape")
    assert drawn(opened)["patch"] is None
    part(opened, "model").focus()
    opened.keyboard.press("Tab")
    assert opened.evaluate("() => document.activeElement.className") == "latent"
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("Enter")
    assert drawn(opened)["latent"] == lists(opened)["common"][1][0]
    part(opened, "mask").focus()
    opened.keyboard.press("Space")
    assert drawn(opened)["mask"] is False
    names = opened.evaluate("""() => ['button', 'input', 'select', 'canvas']
      .flatMap(tag => [...document.querySelectorAll('.px ' + tag)])
      .filter(n => !(n.getAttribute('aria-label') || n.textContent.trim() || n.labels?.length)).length""")
    assert names == 0


def another(page):
    """Return the thumbnail of a picture that is not shown: a page may open on any."""
    image = page.evaluate("() => JSON.parse(document.querySelector('.px').dataset.drawn).image")
    thumbnails = page.locator(".px .thumbnail")
    return thumbnails.nth((image + 1) % thumbnails.count())


def quickest(page, loads=3) -> tuple[float, float]:
    """Return the seconds until the explorer can be used, and from a click to its picture: each the best."""
    found, url = [], page.url.partition("#")[0]  # what is shown is in the address
    for _ in range(loads):
        page.goto("about:blank")
        page.goto(url, wait_until="commit")
        page.wait_for_function("() => document.querySelector('.px')?.dataset.drawn", polling=20)
        ready = page.evaluate("() => performance.now()") / 1000
        page.evaluate("() => { window.seen = document.querySelector('.px').dataset.drawn; }")
        started = time.perf_counter()
        another(page).click()
        drawn(page)
        found.append((ready, time.perf_counter() - started))
    return tuple(map(min, zip(*found, strict=True)))


def test_the_first_interaction_comes_within_a_second(opened):
    assert max(quickest(opened)) < 1


@pytest.mark.parametrize("width", [400, 1000])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_fits_and_is_readable(opened, width, theme):
    opened.set_viewport_size({"width": width, "height": 900})
    opened.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
    opened.wait_for_timeout(300)
    assert opened.evaluate("() => document.documentElement.scrollWidth") <= width
    contrast = opened.evaluate("""() => Math.min(...['h3', 'figcaption', 'th', 'button.latent'].map(one => {
      const s = {color: getComputedStyle(document.querySelector('.px ' + one)).color,
        backgroundColor: getComputedStyle(document.querySelector('.px')).backgroundColor};
      const light = c => c.match(/\\d+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const [a, b] = [light(s.color), light(s.backgroundColor)];
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }))""")
    assert contrast > 7
    image, bars = (part(opened, name).bounding_box() for name in ("image", "bars-image"))
    assert (bars["x"] > image["x"] + image["width"]) == (width == 1000)  # beside it where there is room
    for canvas in opened.locator(".px canvas").all():
        box = canvas.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_the_theme_is_drawn_into_the_charts(opened):
    light = pixels(opened, "bars-image", "scatter")
    opened.evaluate("() => { document.documentElement.dataset.theme = 'dark'; }")
    opened.wait_for_timeout(300)
    assert all(a != b for a, b in zip(light, pixels(opened, "bars-image", "scatter"), strict=True))


def test_missing_data_is_said_in_the_page(browser, parts, tmp_path):
    path = tmp_path / "alone.html"
    path.write_text("<!doctype html><meta charset=utf-8>" + parts.explorer().html(base="./"))
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_function("() => document.querySelector('.px [data-part=message]')?.textContent")
    assert "is not beside it" in part(page, "message").inner_text()
    page.close()


@pytest.fixture
def held(browser, page_file):
    """Open the page with a gate before its blocks: `wait` names those kept back, `lose` those lost."""

    class Gate:
        def __init__(self):
            self.page, self.wait, self.lose, self.kept = browser.new_page(), (), (), []

        def pass_on(self, route):
            name = route.request.url.rsplit("/", 1)[-1]
            if name.startswith(self.lose):
                route.abort()
            elif name.startswith(self.wait):
                self.kept.append(route)
            else:
                route.continue_()

        def release(self):
            self.wait = ()
            for route in self.kept:
                route.continue_()

    gate = Gate()
    gate.page.set_default_timeout(10_000)
    gate.page.route("**/*.js", gate.pass_on)
    gate.page.goto(f"{page_file.as_uri()}#image=0&latent=5")  # of the first block of references
    drawn(gate.page)
    yield gate
    gate.page.close()


def settled(page) -> dict:
    """Wait until nothing has been drawn for a while, and return the state."""
    page.wait_for_timeout(400)
    return page.evaluate("() => JSON.parse(window.seen = document.querySelector('.px').dataset.drawn)")


def call(page, latent) -> None:
    part(page, "number").fill(str(latent))
    part(page, "number").press("Enter")


def test_a_latent_chosen_again_before_the_other_came_is_not_loading_for_ever(held):
    call(held.page, 3)
    assert drawn(held.page)["latent"] == 3
    held.wait = ("refs-1",)
    call(held.page, 100)  # in the other block
    held.page.wait_for_timeout(200)
    assert held.kept and part(held.page, "loading").inner_text() == "loading …"
    call(held.page, 3)
    held.release()
    assert settled(held.page)["latent"] == 3 and part(held.page, "loading").inner_text() == ""


def test_a_choice_during_loading_does_not_lose_the_one_before(held):
    held.wait = ("image-4", "acts-4")
    held.page.locator(".px .thumbnail").nth(4).click()
    part(held.page, "opacity").press("Home")
    held.release()
    state = settled(held.page)
    assert state["image"] == 4 and state["opacity"] == 0
    assert state["latent"] in {s for group in lists(held.page).values() for s, _ in group}


def test_a_choice_whose_data_are_lost_is_taken_back(held):
    before = pixels(held.page, "image", "map-clip"), part(held.page, "where").inner_text()
    held.lose = ("acts-4", "acts-0-2")
    held.page.locator(".px .thumbnail").nth(4).click()
    held.page.wait_for_selector('.px [data-part="message"].wrong')
    held.page.set_viewport_size({"width": 900, "height": 900})  # draws again
    held.page.set_viewport_size({"width": 1280, "height": 720})
    assert settled(held.page)["image"] == 0
    assert (pixels(held.page, "image", "map-clip"), part(held.page, "where").inner_text()) == before
    assert held.page.locator('.px .thumbnail[aria-pressed="true"]').get_attribute("data-number") == "0"
    part(held.page, "model").select_option("2")
    held.page.wait_for_timeout(300)
    assert part(held.page, "model").input_value() == "1"
    assert part(held.page, "title-adapted").inner_text().startswith("Only MaPLe")
    part(held.page, "opacity").press("Home")
    assert drawn(held.page)["opacity"] == 0
    held.lose = ()  # asked for again, it comes
    held.page.locator(".px .thumbnail").nth(4).click()
    assert drawn(held.page)["image"] == 4


def test_references_that_are_lost_are_not_those_of_another_latent(held):
    call(held.page, 3)
    drawn(held.page)
    held.lose = ("refs-1",)
    call(held.page, 100)
    assert drawn(held.page)["latent"] == 100
    references = part(held.page, "references")
    assert references.locator("canvas").count() == 0
    assert "is not beside it" in references.locator('[role="alert"]').inner_text()
    held.lose = ()
    call(held.page, 3)
    drawn(held.page)
    call(held.page, 100)
    drawn(held.page)
    assert references.locator(".references").count() == 2


def test_a_damaged_block_is_said_in_the_page(held):
    held.page.route("**/refs-1.js", lambda route: route.fulfill(body="/* half of it */"))
    call(held.page, 100)
    drawn(held.page)
    assert "is damaged" in part(held.page, "references").locator('[role="alert"]').inner_text()


def test_the_patch_taken_back_by_keyboard_leaves_the_focus_on_the_image(opened, parts):
    click_patch(opened, 1, 1, parts.models[0].backbone.grid)
    part(opened, "whole").focus()
    opened.keyboard.press("Enter")
    assert drawn(opened)["patch"] is None
    assert opened.evaluate("() => document.activeElement.dataset.part") == "image"


def test_tab_leaves_the_gallery_from_any_of_its_images(opened):
    opened.locator(".px .thumbnail").first.focus()
    for _ in range(2):
        opened.keyboard.press("ArrowLeft")  # from the first to the last, and back by one
    opened.keyboard.press("Tab")
    assert opened.evaluate("() => document.activeElement.textContent") == "A picture of your own"
    opened.keyboard.press("Tab")
    assert opened.evaluate("() => document.activeElement.dataset.part") == "image"


def test_a_notice_stands_on_the_page(browser, parts, tmp_path):
    path = parts.folder.parent / "other.html"
    other = Explorer(parts.folder, parts.sae, "sae-another", parts.models)
    path.write_text("<!doctype html><meta charset=utf-8>" + other.html(base="./"), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    drawn(page)
    assert "only the gallery can be picked" in part(page, "notices").inner_text()
    page.locator(".px .thumbnail").nth(2).click()
    assert drawn(page)["image"] == 2
    page.close()


def test_no_control_of_the_static_page_needs_a_kernel(opened):
    assert opened.locator(".px form").count() == 0  # a file and typed names are for the program in the page


def test_the_chapter_shows_the_explorer(visit, html):
    path = html / "book" / "notebooks" / "07_explorer.html"
    page, wrong = visit(path)
    drawn(page)
    folder = page.locator(".patchsae-explorer").get_attribute("data-blocks").rsplit("/", 1)[-1]
    blocks = list((html / "_static" / "explorer" / folder).glob("*.js"))
    assert blocks and max(block.stat().st_size for block in blocks) < 2_000_000
    assert path.stat().st_size < 500_000
    assert part(page, "notices").locator("li").all_inner_texts() == []  # every atlas was of use
    assert page.locator(".px .references").count() > 1 and page.locator(".px .references figure").count()
    before = pixels(page, "image")
    another(page).click()
    drawn(page)
    assert pixels(page, "image") != before and wrong == []
    assert max(quickest(page)) < 1 and wrong == []
