"""What models answer with latents changed, and names with their proof: against direct computation."""

import numpy as np
import pytest
import torch
from tiny_explorer import make_parts

from patchsae.clip.backbone import zero_shot_logits
from patchsae.explorer import Change, Pictures, Vocabulary, answers
from patchsae.explorer.answers import Answerer, class_vectors, predictions, telling
from patchsae.explorer.blocks import read_block
from patchsae.explorer.data import References, references
from patchsae.explorer.names import name_latents, strongest_patches
from patchsae.explorer.packing import unpack
from patchsae.explorer.relations import leading_class
from patchsae.runs.errors import PatchSAEError
from patchsae.training.activations import Tokens, token_columns

TEMPLATES = ("a photo of a {}.",)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("answers"))


@torch.no_grad()
def stream(parts, image: int, model: int) -> torch.Tensor:
    backbone = parts.models[model].backbone
    return backbone.residual(backbone.normalize(parts.gallery.load([image]).images))


@pytest.mark.parametrize("model", [0, 1])
def test_no_change_is_the_models_own_answer(parts, model):
    backbone, x = parts.models[model].backbone, stream(parts, 2, model)
    answerer = Answerer(parts.sae, backbone)
    assert torch.equal(answerer.changed(x, [Change()])[0], x[0])
    text = class_vectors(backbone, parts.gallery.classnames, TEMPLATES)
    label = int(parts.gallery.labels[2])
    found = answerer(x, text, [Change()], label)
    with torch.no_grad():
        shares = zero_shot_logits(backbone, backbone.finish(x), text).softmax(-1)[0].numpy()
    np.testing.assert_array_equal(found.klass[0], np.argsort(-shares)[:3])
    np.testing.assert_allclose(found.share[0], np.sort(shares)[::-1][:3], rtol=1e-4)
    assert found.true[0] == pytest.approx(shares[label], rel=1e-4)


@pytest.mark.parametrize("model", [0, 1])
def test_a_change_takes_away_what_the_latents_wrote_and_nothing_else(parts, model):
    backbone, x = parts.models[model].backbone, stream(parts, 1, model)
    columns = token_columns(backbone, Tokens.ALL)
    with torch.no_grad():
        f = parts.sae.encode(x[0, columns])
    s, t = map(int, f[1:].sum(0).argsort(descending=True)[:2])
    off, twice, alone, one = Answerer(parts.sae, backbone).changed(
        x, [Change({s: 0.0}), Change({s: 0.0, t: 2.0}), Change({s: 1.0}, rest=0), Change({s: 0.0}, patch=5)]
    )
    wrote = f[:, s, None] * parts.sae.W_dec[s].detach()
    expected = x[0].clone()
    expected[columns] -= wrote
    torch.testing.assert_close(off, expected)
    expected[columns] += f[:, t, None] * parts.sae.W_dec[t].detach()
    torch.testing.assert_close(twice, expected)
    expected = x[0].clone()
    expected[columns] -= f @ parts.sae.W_dec.detach() - wrote
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)
    row = columns[1 + 5]  # after CLS
    expected = x[0].clone()
    expected[row] -= wrote[1 + 5]
    torch.testing.assert_close(one, expected)
    prompts = backbone.token_kind == "prompt"
    for changed in (off, twice, alone):
        assert torch.equal(changed[prompts], x[0, prompts])


def test_what_cannot_be_changed_is_refused(parts):
    answerer, x = Answerer(parts.sae, parts.models[0].backbone), stream(parts, 0, 0)
    for change, said in (
        (Change({parts.sae.d_sae: 0.0}), "none of the 128"),
        (Change({1: 0.0}, patch=49), "none of the 49"),
        (Change({1: float("nan")}), "no number"),
    ):
        with pytest.raises(PatchSAEError, match=said):
            answerer.changed(x, [change])


def test_stored_answers_are_those_that_are_computed(parts):
    explorer = parts.explorer()
    for image in (0, 3):
        block = read_block(parts.folder, f"answers-{image}")
        names = read_block(parts.folder, "names")["classes"][0]
        for model in range(3):
            stored = {name: unpack(packed) for name, packed in block["models"][model].items()}
            for row, latent in [(0, None), (1, stored["latent"][0]), (16, stored["latent"][15])]:
                change = None if latent is None else Change({int(latent): 0.0})
                found = explorer.answer(image, model, change)
                assert found["classes"] == [names[k] for k in stored["class"].reshape(-1, 3)[row]]
                np.testing.assert_allclose(found["share"], stored["share"].reshape(-1, 3)[row], rtol=1e-3)
                assert found["true"] == pytest.approx(stored["true"][row], rel=1e-3)
    typed = explorer.answer(0, 0, names=["cat", "</script><img onerror=alert(1)>"])
    assert set(typed["classes"]) == {"cat", "</script><img onerror=alert(1)>"} and typed["true"] is None
    with pytest.raises(PatchSAEError, match="two names"):
        explorer.answer(0, 0, names=["cat"])


def test_the_opening_view_follows_its_rule(parts):
    first, best = parts.explorer().index["first"], []
    for image in range(len(parts.gallery)):
        label = int(parts.gallery.labels[image])
        stored = [
            {name: unpack(packed) for name, packed in model.items()}
            for model in read_block(parts.folder, f"answers-{image}")["models"]
        ]
        for m in (1, 2):
            klass = stored[m]["class"].reshape(-1, 3)[:, 0]
            if klass[0] == label:
                only = stored[0]["class"][0] != label
                drops = stored[m]["true"][0] - stored[m]["true"][1:]
                best += [(only, k != label, drop) for k, drop in zip(klass[1:], drops, strict=True)]
    assert (first["only"], first["lost"]) == max(best)[:2]
    assert first["drop"] == pytest.approx(max(best)[2])


def test_pictures_are_drawn_by_the_stated_rule(parts):
    clip, adapted = parts.models[0].backbone, parts.models[2].backbone
    pool = Pictures("General", parts.sets[0].images)
    chosen = telling(pool, clip, adapted, 6, 2).images
    says = [predictions(m, pool.images, class_vectors(m, pool.names, TEMPLATES)) for m in (clip, adapted)]
    only = np.flatnonzero((says[1] == pool.images.labels) & (says[0] != pool.images.labels))[:2]
    assert len(chosen) == 6 == len(set(chosen.indices)) and list(chosen.indices[: len(only)]) == list(only)


def test_models_are_not_asked_beyond_the_pictures_that_are_wanted(parts, monkeypatch):
    clip, adapted = parts.models[0].backbone, parts.models[2].backbone
    pool, asked = Pictures("General", parts.sets[0].images), []

    def says(model, images, _):
        asked.append(len(images))
        return images.labels + (model is clip)  # one is always wrong, the other always right

    monkeypatch.setattr(answers, "predictions", says)
    assert list(telling(pool, clip, adapted, 6, 2).images.indices[:2]) == [0, 1]
    assert asked == [answers.BATCH, answers.BATCH] and len(pool.images) > answers.BATCH


def test_a_name_is_proven_by_what_is_known_and_by_that_alone(parts):
    sae, clip, (_, atlas, images) = parts.sae, parts.models[0].backbone, parts.sets[0]
    living = atlas.image_frequency.values > 0
    rng = np.random.default_rng(0)
    looks = rng.standard_normal((sae.d_sae, clip.embed_dim)).astype(np.float32)
    words = ("cat", "dog", "red", "apple")
    texts = tuple(f"a photo of a {word}." for word in words)
    blind = Vocabulary(words, texts, images, rng.random((len(images), 4)) < 0.4)
    x = stream(parts, 0, 0)
    found = name_latents(sae, clip, looks, living, blind, x, progress=False)
    assert ((found.word >= 0) == living).all() and not found.proven.any()
    fires = strongest_patches(sae, clip, images, np.arange(sae.d_sae), progress=False)
    latent = next(s for s in np.flatnonzero(living) if 8 < len(np.unique(fires[:, s])))
    known = blind.shows.copy()
    known[:, found.word[latent]] = fires[:, latent] > np.quantile(fires[:, latent], 0.7)
    again = name_latents(sae, clip, looks, living, blind._replace(shows=known), x, progress=False)
    np.testing.assert_array_equal(again.word, found.word)  # no label has a part in the name
    assert again.auroc[latent] == 1 and again.proven[latent]
    none = name_latents(sae, clip, looks, living, blind._replace(shows=known & False), x, progress=False)
    assert np.isnan(none.auroc).all() and not none.proven.any()
    with pytest.raises(PatchSAEError, match="two or more"):
        name_latents(sae, clip, looks, living, blind._replace(words=("cat",)), x, progress=False)


def test_nearest_latents_are_those_of_the_decoder_and_of_the_atlas(parts):
    rows = torch.nn.functional.normalize(parts.sae.W_dec.detach(), dim=-1)
    cosine = (rows @ rows.T).numpy()
    np.fill_diagonal(cosine, -1)
    block = read_block(parts.folder, "near-1")["decoder"]
    found = unpack(block["latent"]).reshape(64, -1)
    np.testing.assert_array_equal(found[:, 0], cosine[64:].argmax(1))
    np.testing.assert_allclose(
        unpack(block["value"]).reshape(64, -1)[:, 0], cosine[64:].max(1), rtol=1e-4, atol=1e-6
    )
    together = unpack(read_block(parts.folder, "near-1")["together"]["value"])
    assert ((together >= 0) & (together < 1.0001)).all() and together.max() > 0.1


def test_a_latent_leads_to_the_class_of_most_of_its_references(parts):
    index = np.array([[0, 1, 2, -1], [3, 4, 5, -1], [6, 7, 8, -1]])
    label = np.array([[5, 1, 2, 0], [5, 2, 3, 0], [1, 2, 4, 0]])
    made = References(index, np.ones((3, 4)), label, np.arange(9))
    assert leading_class(made).tolist() == [6, 3, 0, 0]
    stored = unpack(read_block(parts.folder, "labels")["leading"][0])
    np.testing.assert_array_equal(stored, leading_class(references(parts.sets[0].atlas, 4)))
