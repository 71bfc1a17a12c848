"""The model in the page against torch: in Chromium, from disk, without a network."""

import base64
import copy
import io
import json
import shutil
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_page import Asked, png, write_page
from PIL import Image, ImageDraw
from tiny import tiny_backbone

from patchbook.scales import scale
from patchsae.adaptation.prompt_files import find_prompts
from patchsae.adaptation.prompts import Method, PromptConfig, adapt
from patchsae.clip.backbone import zero_shot_logits
from patchsae.explorer.answers import Answerer, Change, class_vectors
from patchsae.explorer.gallery import Shown
from patchsae.explorer.weights import ESCAPE, LIMIT, STATIC, TURN, write_model
from patchsae.images.files import Frame, resize_and_crop
from patchsae.runs.stage import project_root
from patchsae.sae.model import SAE, SAEConfig

SCENES, OTHERS = 15, 5
TEMPLATES = ["a photo of a {}.", "a drawing of a {}."]
WORDS = [
    "dog", "a red apple", "Café crème", "naïve Ωmega", "smörgåsbord", "日本の寺", "🍎", "👩‍🚀 astronaut",
    "it's a cat's, isn't it?", "they're we've I'm you'll he'd", "semi-trailer (18-wheeler)",
    "<img onerror>",
    "</script>", "R&D", "x &amp;amp; y", "“quoted” ‘words’", "ﬁne ligature", "snake_case_name",
    "3.14 × 10²",
    "TRAILING  spaces\t\n", "!!!???...", "<start_of_text> twice", "Straße", "İstanbul", "é", "ｗｉｄｅ", "",
    " ".join(["very"] * 60),
]  # fmt: skip


def relative(found, true) -> float:
    found, true = np.asarray(found, np.float64).ravel(), np.asarray(true, np.float64).ravel()
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))


def other_pictures() -> list[np.ndarray]:
    """Draw what the model was never trained on."""
    rng = np.random.default_rng(0)
    down, across = np.mgrid[:112, :112] / 111
    board = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((14, 14)))[..., None] * [255, 200, 0]
    written = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(written).text((8, 40), "not a scene", fill="black")
    return [
        rng.integers(0, 256, (112, 112, 3), np.uint8),
        np.stack([255 * down, 255 * across, 255 * (1 - down)], -1).astype(np.uint8),
        board.astype(np.uint8),
        np.array(written),
        np.zeros((112, 112, 3), np.uint8),
    ]


@pytest.fixture(scope="module")
def model():
    """Return the repository's CLIP, MaPLe on it, its autoencoder, and test images."""
    setup = scale("embedded")
    clip = setup.backbone(block=11)
    sets = setup.sets(clip, "")
    folder = project_root() / "artefacts"
    maple = find_prompts(folder / "prompts", "twemoji_clothing", clip, 1)
    return clip, maple, SAE.load(folder / "sae" / "main"), sets


def write(model, folder):
    """Write the model into a folder of that place; return the folder and what the index says."""
    clip, maple, sae, sets = model
    folder = folder / "explorer-0"
    folder.mkdir()
    shown = [Shown("CLIP", clip), Shown("MaPLe", maple)]
    names = sets.test.classnames[:50]
    texts = [[class_vectors(one.backbone, names, TEMPLATES) for one in shown]]
    entry, why = write_model(folder, sae, shown, texts)
    assert why == ""
    return folder, entry, texts


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Write the model, once."""
    return write(model, tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(visit, written):
    """Open the model's page; whatever it asks of a network, and every error in it, fails the test."""
    page, wrong = visit(write_page(written[0]))
    yield Asked(page)
    assert wrong == []


@pytest.fixture(scope="module")
def pictures(model):
    scenes = model[3].test.sample(SCENES, 1).load(range(SCENES)).images.permute(0, 2, 3, 1).numpy()
    return [*scenes, *other_pictures()]


def tensors(folder, kind):
    """Read a file as weights.py describes it, by other means than the page's."""
    text = (folder / "engine.js").read_text("utf-8")
    facts = json.loads(text[text.index("{") : text.rindex(")")])["facts"]["files"][kind]
    content = b""
    for number, part in enumerate(facts["parts"]):
        script = (folder / f"{kind}-{number}.js").read_bytes().decode("utf-16")
        units, at = [ord(c) for c in script[script.index('{"text":"') + 9 : script.rindex('"}')]], 0
        plain = []
        while at < len(units):
            plain.append(units[at + 1] ^ TURN if units[at] == ESCAPE else units[at])
            at += 1 + (units[at] == ESCAPE)
        raw = np.array(plain, "<u2").tobytes()
        assert len(raw) == part["bytes"] and zlib.crc32(raw) == part["crc"]
        content += raw
    first, second = facts["streams"]
    low, high = (
        np.frombuffer(zlib.decompress(part), np.uint8) for part in (content[:first], content[first:])
    )
    units, at, found = (low | (high.astype(np.uint16) << 8)), 0, {}
    for name, form, *shape in facts["tensors"]:
        size, rows = int(np.prod(shape)), shape[0]
        if form == "steps":
            step = units[at : at + rows].view("<f2").astype(np.float32)
            zigzag = units[at + rows : at + rows + size].astype(np.int64).reshape(rows, -1)
            whole = np.where(zigzag % 2, -(zigzag + 1) // 2, zigzag // 2)
            found[name], at = (whole * step[:, None]).astype(np.float32).reshape(shape), at + rows + size
        elif form == "single":
            found[name], at = units[at : at + 2 * size].view("<f4").reshape(shape), at + 2 * size
        elif form == "half":
            found[name], at = units[at : at + size].view("<f2").astype(np.float32).reshape(shape), at + size
        else:
            at += size
    assert at == len(units)
    return found


def test_what_is_loaded_at_a_time_is_at_most_8_mb_and_each_file_small(written):
    folder, entry, _ = written
    for kind, size in entry["bytes"].items():
        files = [file.stat().st_size for file in folder.glob(f"{kind}-*.js")]
        assert sum(files) <= 1.001 * size  # the rest is the call of a function
        assert size <= LIMIT == 8_000_000
    assert max(file.stat().st_size for file in folder.glob("*.js")) < 2_000_000
    assert entry["models"] == entry["text"] == [True, True] and entry["groups"] == [True]


def test_image_weights_are_the_models_own(written, model):
    found = tensors(written[0], "tower")
    state = model[0].model.visual.state_dict()
    assert np.array_equal(found["image.3.qkv.w"], state["transformer.resblocks.3.attn.in_proj_weight"])
    assert np.array_equal(found["image.conv"], state["conv1.weight"])
    assert np.array_equal(found["sae.dec"], model[2].W_dec.detach())


def test_tower_autoencoder_and_tail_are_those_of_torch(asked, model, pictures):
    clip, maple, sae, _ = model
    for number, pixels in enumerate(pictures):
        got = asked.open(number, png(pixels))
        assert np.array_equal(got["pixels"].reshape(112, 112, 4)[..., :3], pixels)
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        for m, backbone in enumerate((clip, maple)):
            with torch.no_grad():
                x = backbone.residual(backbone.normalize(images))
                f = sae.encode(x[0, :197])
                whole = backbone.finish(x)
                strong = [int(s) for s in f.mean(0).topk(3).indices]
                change = Change({strong[0]: 0.0, strong[1]: 2.5, strong[2]: 0.0})
                masked = backbone.finish(Answerer(sae, backbone).changed(x, [change]))
            stream = asked("residual", number, m)
            assert relative(stream["tokens"], x) < 1e-3 and stream["count"] == x.shape[1]
            acts, dense = asked("activations", number, m), np.zeros((len(f[0]), 196), np.float32)
            assert np.array_equal(acts["latent"], (f > 0).any(0).nonzero()[:, 0])
            rows = np.repeat(acts["latent"], np.diff(acts["start"]))
            dense[rows, acts["patch"]] = acts["value"]
            assert relative(dense, f[1:].T) < 1e-3
            assert relative(acts["mean"], f.mean(0)[acts["latent"].astype(np.int64)]) < 1e-3
            assert relative(asked("embedding", number, m, None), whole) < 1e-3
            gains = [list(pair) for pair in change.gains.items()]
            assert relative(asked("embedding", number, m, {"gains": gains}), masked) < 1e-3


@pytest.mark.parametrize("mode", ["add_error", "replace", "replace_bias"])
@pytest.mark.parametrize("patch", [None, 100])
@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_every_way_to_change_latents_is_that_of_torch(asked, model, pictures, mode, patch, rest):
    clip, _, sae, _ = model
    asked.open("one", png(pictures[2]))
    with torch.no_grad():
        x = clip.residual(clip.normalize(torch.from_numpy(pictures[2].copy()).permute(2, 0, 1)[None]))
        f = sae.encode(x[0])
        top = f.mean(0).topk(10).indices
        gain = torch.full((sae.d_sae,), rest)
        gain[top] = 1 - rest
        rows = slice(None) if patch is None else slice(patch + 1, patch + 2)
        y = x.clone()
        if mode == "add_error":
            y[0, rows] += (f[rows] * (gain - 1)) @ sae.W_dec
        else:
            y[0, rows] = sae.decode(f[rows] * gain) + 0.105131256516992 * (mode == "replace_bias")
        true = clip.finish(y)
    change = {"gains": [[int(s), 1 - rest] for s in top], "rest": rest, "patch": patch, "mode": mode}
    error = relative(asked("embedding", "one", 0, change), true)
    # one patch moves the answer by little: the error has to be small beside that, too
    assert error < min(1e-3, relative(clip.finish(x).detach(), true) / 5)


def test_classes_are_the_most_likely_of_torch(asked, model, written):
    clip, maple, sae, sets = model
    images = sets.test.sample(40, 3).load(range(40)).images
    for m, backbone in enumerate((clip, maple)):
        with torch.no_grad():
            logits = zero_shot_logits(backbone, backbone(backbone.normalize(images)), written[2][0][m])
        share, same = logits.double().softmax(-1).numpy(), 0
        for number, picture in enumerate(images.permute(0, 2, 3, 1).numpy()):
            if not m:
                asked.open(number, png(picture))
            got = asked("answer", number, m, {}, {"group": 0})
            same += got["first"] == [int(k) for k in np.argsort(-share[number], kind="stable")[:3]]
            assert np.abs(got["share"] - share[number]).max() < 1e-3
        assert same == len(images)


def test_a_newer_wish_of_a_slot_takes_the_place_of_an_older(asked, pictures):
    asked.open(0, png(pictures[0]))
    got = asked.page.evaluate("""async () => {
      const asked = (gain) => engine.answer(0, 0, { rest: gain }, { group: 0 }, "slider");
      const all = await Promise.all([0, 0.25, 0.5, 1].map(asked));
      return all.map((found) => found && found.first.length); }""")
    assert got == [3, None, None, 3]


def with_words_of(folder, clip):
    """Return CLIP with the text tower that a page's folder holds."""
    found, text = tensors(folder, "words"), copy.deepcopy(clip.model)
    names = {"n1": "ln_1", "n2": "ln_2", "out": "attn.out_proj", "fc": "mlp.c_fc", "proj": "mlp.c_proj"}
    state = text.state_dict()
    for number in range(12):
        for short, own in names.items():
            for end, long in (("w", "weight"), ("b", "bias")):
                state[f"transformer.resblocks.{number}.{own}.{long}"] = found[
                    f"text.{number}.{short}.{end}"
                ]
        for end, long in (("w", "weight"), ("b", "bias")):
            key = f"transformer.resblocks.{number}.attn.in_proj_{long}"
            state[key] = found[f"text.{number}.qkv.{end}"]
    state |= {
        "token_embedding.weight": found["text.words"], "positional_embedding": found["text.pos"],
        "ln_final.weight": found["text.norm.w"], "ln_final.bias": found["text.norm.b"],
        "text_projection": found["text.proj"],
    }  # fmt: skip
    text.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})
    rounded = copy.copy(clip)
    rounded._modules = {**clip._modules, "model": text}
    return rounded


CLASSES = ["dog", "a red apple", "umbrella", "Café crème", "semi-trailer", "cat"]


def test_text_tower_is_that_of_torch(asked, model):
    clip, maple, _, _ = model
    for templates in (TEMPLATES[:1], TEMPLATES):
        got = asked("texts", 0, CLASSES, templates)
        assert relative(got["vectors"], class_vectors(clip, CLASSES, templates)) < 1e-3
    learned = asked("texts", 1, CLASSES, None)
    assert relative(learned["vectors"], maple.class_weights(CLASSES)) < 1e-3
    assert relative(learned["vectors"], got["vectors"]) > 0.01


def test_a_text_tower_too_large_for_the_limit_is_rounded(model, visit, tmp_path, monkeypatch):
    clip, maple, _, _ = model
    monkeypatch.setattr("patchsae.explorer.weights.LIMIT", 5_000_000)
    folder, entry, _ = write(model, tmp_path)
    assert max(entry["bytes"].values()) <= 5_000_000
    page, wrong = visit(write_page(folder))
    asked, rounded = Asked(page), with_words_of(folder, clip)
    got = asked("texts", 0, CLASSES, TEMPLATES)
    assert relative(got["vectors"], class_vectors(rounded, CLASSES, TEMPLATES)) < 1e-3
    own = class_vectors(clip, CLASSES, TEMPLATES)
    close = (torch.from_numpy(got["vectors"].copy()).view_as(own) * own).sum(-1)
    assert 0.998 < close.min() < 0.999999 and wrong == []
    learned = asked("texts", 1, CLASSES, None)
    prompted = adapt(rounded, maple.prompts.config)
    prompted.prompts.load_state_dict(maple.prompts.state_dict())
    assert relative(learned["vectors"], prompted.class_weights(CLASSES)) < 1e-3


def test_tokens_are_those_of_open_clip(asked, model):
    clip = model[0]
    got = asked("texts", 0, WORDS, ["{}"])
    true = clip.tokenize([word.replace("_", " ") for word in WORDS])
    for word, found, ids in zip(WORDS, got["tokens"], true.tolist(), strict=True):
        assert found == ids[: len(found)] and not any(ids[len(found) :]), word
    assert got["cut"] == [WORDS[-1]]


@pytest.mark.parametrize("size", [(333, 200), (50, 81), (112, 112), (112, 300), (640, 111), (97, 1000)])
def test_pictures_are_framed_as_pillow_does(visit, written, size):
    page, wrong = visit(write_page(written[0]))
    page.add_script_tag(content=(STATIC / "framing.js").read_text("utf-8") + "window.framed = framed;")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(pixels[..., :3])
    for resize in ("shortest", "longest", "squash"):
        for interpolation in ("bicubic", "bilinear"):
            frame = Frame(112, resize, interpolation, 9)
            got = page.evaluate(
                """([w, h, frame, content]) => {
                  const all = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
                  const rows = (from, n) => all.subarray(4 * w * from, 4 * w * (from + n));
                  return text(framed(w, h, frame, rows)); }""",
                [*size, frame._asdict(), base64.b64encode(pixels.tobytes()).decode()],
            )
            found = np.frombuffer(base64.b64decode(got), np.uint8).reshape(112, 112, 4)
            true = resize_and_crop(image, frame).permute(1, 2, 0).numpy()
            # Pillow takes some tall pictures down before across, which rounds in between otherwise
            off = np.abs(found[..., :3].astype(int) - true).max()
            assert off <= (4 if size[1] > 2 * size[0] else 0), frame
    assert wrong == []


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_what_is_no_picture_is_said_in_one_sentence_and_the_page_lives(asked, pictures):
    said = [
        asked.refused(b"%PDF-1.4 and more of it, which is no picture", "<img onerror=alert(1)>.png"),
        asked.refused(b"", "empty.png"),
        asked.refused(png(pictures[0])[:60], "cut.png"),
        asked.refused(saved(Image.new("1", (6000, 5000)), "PNG"), "large.png"),
        asked.refused(saved(Image.new("L", (6000, 5000)), "JPEG"), "large.jpg"),
        asked.refused(saved(Image.new("1", (2000, 10)), "PNG"), "strip.png"),
    ]
    assert said[0].startswith("<img onerror=alert(1)>.png is no picture that can be read")
    assert [text.split()[0] for text in said[1:]] == [
        "empty.png",
        "cut.png",
        "large.png",
        "large.jpg",
        "strip.png",
    ]
    assert "30 megapixels" in said[3] and "30 megapixels" in said[4] and "100 times" in said[5]
    frames = [Image.fromarray(picture) for picture in pictures[:3]]
    moving = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], loop=0)
    assert (
        asked.open("moving", moving, "moving.gif")["note"]
        == "moving.gif moves: its first picture is taken."
    )
    asked.open(0, png(pictures[0]))
    assert asked("answer", 0, 0, {}, {"group": 0})["first"]


@pytest.mark.parametrize("harm", ["turned", "short", "gone", "engine"])
def test_damaged_weights_are_said_in_one_sentence_and_the_page_lives(visit, written, tmp_path, harm):
    folder = shutil.copytree(written[0], tmp_path / "explorer-0")
    file = folder / ("engine.js" if harm == "engine" else "tower-1.js")
    content = bytearray(file.read_bytes())
    if harm == "turned":
        content[len(content) // 2 | 1] ^= 1
    file.write_bytes(content if harm == "turned" else content[: len(content) // 3])
    if harm == "gone":
        file.unlink()
    asked = Asked(visit(write_page(folder))[0])
    said = [
        asked.page.evaluate(f"() => engine.activations({key}, 0).catch((e) => e.message)") for key in (0, 1)
    ]
    assert (
        said[0] == said[1] and said[0].count(".") == 1 and ("damaged" in said[0] or "not beside" in said[0])
    )
    assert asked.page.evaluate("() => document.title") == "the model"


@pytest.mark.parametrize("method", [Method.VPT, Method.COOP])
@pytest.mark.parametrize(
    "config",
    [
        SAEConfig(32, 4, activation="topk", k=5, input_norm="unit_rms"),
        SAEConfig(32, 4, activation="jumprelu", input_norm="layer_norm", subtract_b_dec=False),
    ],
    ids=["topk", "jumprelu"],
)
def test_other_shapes_run_too(visit, tmp_path, config, method):
    clip, folder = tiny_backbone(), tmp_path / "explorer-0"
    folder.mkdir()
    other = adapt(clip, PromptConfig(method, depth=1, n_ctx=3, context=""), seed=1)
    foreign = tiny_backbone()
    with torch.no_grad():
        foreign.model.visual.conv1.weight += 0.1
    sae = SAE(config, seed=0)
    with torch.no_grad():
        sae.b_dec += 0.1
        if hasattr(sae, "threshold"):
            sae.threshold += torch.linspace(0, 1, sae.d_sae)
    shown = [Shown("CLIP", clip), Shown("other", other), Shown("tuned", foreign)]
    entry, why = write_model(folder, sae, shown, [])
    assert why == "" and entry["models"] == entry["text"] == [True, True, False]
    page, wrong = visit(write_page(folder))
    asked, pixels = Asked(page), np.random.default_rng(1).integers(0, 256, (112, 112, 3), np.uint8)
    asked.open(0, png(pixels))
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    for m, backbone in ((0, clip), (1, other)):
        with torch.no_grad():
            x = backbone.residual(backbone.normalize(images))
            f = sae.encode(x[0, :50])
            top = int(f.mean(0).argmax())
            masked = backbone.finish(Answerer(sae, backbone).changed(x, [Change({top: 3.0}, 0.5)]))
        assert relative(asked("residual", 0, m)["tokens"], x) < 1e-3
        assert (
            relative(asked("activations", 0, m)["mean"], f.mean(0)[(f > 0).any(0)]) < 2e-3
        )  # half precision
        assert relative(asked("embedding", 0, m, {"gains": [[top, 3]], "rest": 0.5}), masked) < 2e-3
        classes = ["dog", "a red apple", "umbrella"]
        got = asked("texts", m, classes, TEMPLATES)["vectors"]
        assert relative(got, class_vectors(backbone, classes, TEMPLATES)) < 2e-3
    assert wrong == []


def test_what_does_not_fit_is_said_and_nothing_is_written(tmp_path, model):
    clip, _, sae, _ = model
    wide = SAE(replace(sae.config, expansion=32), seed=0)
    entry, why = write_model(tmp_path, SAE(replace(sae.config, expansion=64)), [Shown("CLIP", clip)], [])
    assert entry is None and "8192 latents" in why
    many = copy.deepcopy(clip.model)
    many.visual.transformer.resblocks.extend(copy.deepcopy(many.visual.transformer.resblocks))
    long = type(clip)(many, 11, name="long", tokenizer=lambda: clip.tokenize)
    entry, why = write_model(tmp_path, wide, [Shown("CLIP", long)], [])
    assert entry is None and "MB, more than 8." in why
    odd = tiny_backbone()
    odd.model.visual.pool_type = "avg"
    entry, why = write_model(tmp_path, SAE(SAEConfig(32)), [Shown("CLIP", odd)], [])
    assert entry is None and why.count(".") == 1 and list(tmp_path.glob("*.js")) == []
