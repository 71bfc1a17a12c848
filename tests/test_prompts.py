"""Prompts inside a frozen CLIP: where the tokens go, what stays as it was, and what is refused."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP

from patchsae.adaptation.prompt_text import TextTower, pack
from patchsae.adaptation.prompts import AdaptedBackbone, Method, PromptConfig, Prompts, adapt
from patchsae.clip.backbone import Backbone, load_backbone, zero_shot_logits, zero_shot_weights
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.products import fast_float32

NAMES = ["cat", "hot_air balloon", "jack-o-lantern", "dog", "dog"]
VISION = {"image_size": 32, "patch_size": 8, "layers": 4, "width": 48, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}


def make(kind=CLIP, vision=(), text=()) -> Backbone:
    torch.manual_seed(0)
    model = kind(embed_dim=24, vision_cfg=VISION | dict(vision), text_cfg=TEXT | dict(text))
    for block in [*model.visual.transformer.resblocks]:  # attention that is not all but uniform
        block.attn.in_proj_weight.data *= 6
    tokenizer = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])
    return Backbone(model, 2, name="small", tokenizer=lambda: tokenizer)


def learned(plain: Backbone, **fields) -> AdaptedBackbone:
    """Return a backbone whose prompts are large enough to show."""
    adapted = adapt(plain, PromptConfig(**{"depth": 3} | fields), seed=1)
    torch.manual_seed(2)
    for parameter in adapted.prompts.parameters():
        parameter.data.normal_(std=0.5)
    return adapted


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def maple(plain):
    return learned(plain)


@pytest.fixture(scope="module")
def pictures(plain):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 32, 32, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def large():
    return load_backbone("ViT-B-16-quickgelu", block=11)


@fast_float32()
def image_stream(adapted, images):
    """Run MaPLe's image encoder as facts.md §1.1 writes it down: the stream before and after each block."""
    visual, p = adapted.model.visual, adapted.prompts
    tokens = visual.conv1(images).flatten(2).transpose(1, 2)
    cls = visual.class_embedding.expand(len(images), 1, -1)
    tokens = torch.cat([cls, tokens], 1) + visual.positional_embedding
    tokens = torch.cat([tokens, p.proj(p.ctx).expand(len(images), -1, -1)], 1)
    found = [visual.ln_pre(tokens)]
    for number, block in enumerate(visual.transformer.resblocks):
        tokens = found[-1]
        if 1 <= number <= len(p.compound_prompts_text):
            new = p.compound_prompt_projections[number - 1](p.compound_prompts_text[number - 1])
            tokens = torch.cat([tokens[:, : -len(new)], new.expand(len(images), -1, -1)], 1)
        found.append(block(tokens))
    return found


@fast_float32()
def encode_image(adapted, images):
    visual = adapted.model.visual
    return visual.ln_post(image_stream(adapted, images)[-1])[:, 0] @ visual.proj


def encode_texts(adapted, texts):
    """Run MaPLe's text encoder as facts.md §1.1 writes it down, one padded row per text."""
    model, prompts = adapted.model, adapted.prompts.text_prompts()
    n, ids = len(prompts[0]), adapted.tokenize(texts)
    x = model.token_embedding(ids)
    x[:, 1 : 1 + n] = prompts[0]
    x = x + model.positional_embedding
    for number, block in enumerate(model.transformer.resblocks):
        if 1 <= number < len(prompts):
            x[:, 1 : 1 + n] = prompts[number]
        x = block(x, attn_mask=model.attn_mask)
    return model.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ model.text_projection


@torch.no_grad()
def test_image_stream_is_that_of_the_published_architecture(maple, pictures):
    expected = image_stream(maple, pictures)
    found = maple.residuals(pictures, range(5))
    for block, tokens in enumerate(expected):
        assert torch.equal(found[block], tokens)
        assert tokens.shape == (3, 1 + 16 + 2, 48)
    assert not torch.equal(encode_image(maple, pictures), maple.model.encode_image(pictures))


@torch.no_grad()
@pytest.mark.parametrize("method", [Method.MAPLE, Method.VPT, Method.COOP])
def test_cut_at_any_block_gives_the_same_bits(plain, pictures, method):
    adapted = learned(plain, method=method)
    whole = encode_image(adapted, pictures) if method is Method.MAPLE else adapted(pictures)
    for block in range(5):
        cut = adapted.at_block(block)
        assert torch.equal(cut.finish(cut.residual(pictures)), whole)


@torch.no_grad()
def test_class_vectors_are_those_of_the_published_text_encoder(plain):
    for config in ({}, {"depth": 1}, {"n_ctx": 4}, {"method": "coop", "n_ctx": 3, "context": ""}):
        adapted = learned(plain, **config)
        context = adapted.prompts.config.context or "x x x"
        texts = [f"{context} {name.replace('_', ' ')}." for name in NAMES]
        expected = F.normalize(encode_texts(adapted, texts), dim=-1)
        found = adapted.class_weights(NAMES)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(*found[3:], rtol=0, atol=1e-6)  # equal names keep their rows


@torch.no_grad()
def test_packed_texts_are_padded_ones_whatever_the_group(plain):
    tower = TextTower(plain)
    ids = plain.tokenize(["a cat.", "a photo of a big cat.", "a c d e f g h.", "a.", "a dog."])
    for group in (1, 2, 64):
        packed = pack(ids, tower.ends(ids), group)
        assert packed.ids.shape[0] == -(-len(ids) // group)
        found = tower.encode(packed, [])
        torch.testing.assert_close(found, plain.encode_text(ids, normalize=False), rtol=0, atol=4e-6)
    one = pack(ids[:1], tower.ends(ids[:1]))
    torch.testing.assert_close(
        tower.encode(one, []), plain.encode_text(ids[:1], normalize=False), rtol=0, atol=4e-6
    )


@torch.no_grad()
def test_other_layouts_of_the_same_model_agree(pictures):
    """In float64, for such sharp attention makes much of float32's rounding, which differs by processor."""
    plain, other, pictures = make(), make(CustomTextCLIP), pictures.double()
    for one in (plain, other):
        one.model.double()
    maple = learned(plain)
    maple.prompts.double()
    state = {
        k if k.startswith(("visual", "logit")) else f"text.{k}": v
        for k, v in plain.model.state_dict().items()
    }
    other.model.load_state_dict(state)
    for transformer in (other.model.visual.transformer, other.model.text.transformer):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False
    other = AdaptedBackbone(Backbone(other.model, 2, tokenizer=lambda: plain.tokenize), maple.prompts)
    assert other.residual(pictures).shape == maple.residual(pictures).shape
    torch.testing.assert_close(other(pictures), maple(pictures), rtol=0, atol=1e-10)
    torch.testing.assert_close(other.class_weights(NAMES), maple.class_weights(NAMES), rtol=0, atol=1e-6)
    for block in (0, 4):
        cut = other.at_block(block)
        assert torch.equal(cut.finish(cut.residual(pictures)), other(pictures))


@torch.no_grad()
@fast_float32()
def test_without_prompts_it_is_plain_clip_bit_for_bit(plain, pictures):
    template = "a photo of a {}."
    weights = zero_shot_weights(plain, NAMES, template)
    expected = zero_shot_logits(plain, plain.model.encode_image(pictures), weights)
    for method in Method:
        adapted = adapt(plain, PromptConfig(method=method, depth=0, template=template))
        assert adapted.n_tokens == plain.n_tokens
        assert torch.equal(
            zero_shot_logits(adapted, adapted(pictures), adapted.class_weights(NAMES)), expected
        )


@torch.no_grad()
def test_first_words_start_as_those_of_the_context(plain):
    before = plain.encode_text([f"a photo of a {name.replace('_', ' ')}." for name in NAMES])
    shallow = adapt(plain, PromptConfig(depth=1))
    torch.testing.assert_close(shallow.class_weights(NAMES), before, rtol=0, atol=1e-6)
    again = adapt(plain, PromptConfig(depth=1, context="a sketch of a", n_ctx=3))
    expected = plain.encode_text([f"a sketch of a {name.replace('_', ' ')}." for name in NAMES])
    torch.testing.assert_close(again.class_weights(NAMES), expected, rtol=0, atol=1e-6)


def test_prompts_start_as_published():
    prompts = Prompts(PromptConfig(), 512, 768, start=torch.ones(2, 512), seed=3)
    assert (prompts.ctx == 1).all()
    deep = torch.stack(list(prompts.compound_prompts_text))
    assert deep.shape == (8, 2, 512)
    assert abs(deep.std().item() - 0.02) < 1e-3 and abs(deep.mean().item()) < 1e-3
    first, *others = prompts.compound_prompt_projections
    assert len(others) == 7
    for other in others:
        assert torch.equal(other.weight, first.weight) and other.weight is not first.weight
    assert not torch.equal(prompts.proj.weight, first.weight)
    same = Prompts(PromptConfig(), 512, 768, start=torch.ones(2, 512), seed=3)
    for key, value in prompts.state_dict().items():
        assert torch.equal(same.state_dict()[key], value)
    assert not torch.equal(Prompts(PromptConfig(), 512, 768, seed=4).ctx, prompts.ctx)


def test_seeding_leaves_the_callers_generator_alone(plain):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    adapt(plain, PromptConfig(depth=3))
    assert torch.equal(torch.rand(3), expected)


def test_token_kinds_say_where_the_prompts_are(plain, maple):
    assert maple.token_kind.tolist() == [*plain.token_kind, "prompt", "prompt"]
    assert (learned(plain, method="vpt", n_ctx=3).token_kind == "prompt").sum() == 3
    assert learned(plain, method="coop").token_kind.tolist() == plain.token_kind.tolist()
    assert maple.embed_dim == plain.embed_dim


def test_fingerprint_changes_with_the_prompts_and_the_cut_alone(plain, maple):
    same = learned(plain)
    assert same.fingerprint() == maple.fingerprint() != plain.fingerprint()
    assert maple.at_block(1).fingerprint() != maple.fingerprint()
    with torch.no_grad():
        same.prompts.compound_prompts_text[1][0, 0] += 1e-3
    assert same.fingerprint() != maple.fingerprint()
    assert learned(plain, context="a sketch of a").fingerprint() != maple.fingerprint()


def test_weights_are_shared_frozen_and_unchanged(plain, maple):
    assert maple.model is plain.model
    assert not any(parameter.requires_grad for parameter in maple.parameters())
    assert plain.n_tokens == 17 and type(plain.tower) is not type(maple.tower)
    assert (maple.plain.block, maple.at_block(4).plain.block) == (2, 4)
    assert maple.plain.fingerprint() == plain.fingerprint()


def test_every_prompt_carries_a_gradient(plain, pictures):
    adapted = learned(plain)
    adapted.prompts.requires_grad_(True)
    text = F.normalize(adapted.class_embeddings(adapted.pack_classes(NAMES)), dim=-1)
    zero_shot_logits(adapted, adapted(pictures), text)[:, 0].sum().backward()
    for name, parameter in adapted.prompts.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in plain.parameters())


@torch.no_grad()
@fast_float32()
def test_full_size_has_199_tokens_and_the_published_number_of_parameters(large):
    nine, three = (adapt(large, PromptConfig(depth=depth)) for depth in (9, 3))
    assert sum(p.numel() for p in nine.prompts.parameters()) == 3_555_072
    assert sum(p.numel() for p in three.prompts.parameters()) == 1_185_024
    coop = adapt(large, PromptConfig(method="coop", n_ctx=4))
    assert sum(p.numel() for p in coop.prompts.parameters()) == 4 * 512
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for tokens in nine.residuals(image, range(13)).values():
        assert tokens.shape == (1, 199, 768)
    assert (coop.n_tokens, nine.n_tokens) == (197, 199)
    expected = image_stream(nine, image)[-1]
    assert torch.equal(nine.at_block(12).residual(image), expected)
    bare = adapt(large, PromptConfig(depth=0))
    weights = zero_shot_weights(large, ["cat", "dog"], "a photo of a {}.")
    logits = zero_shot_logits(bare, bare(image), bare.class_weights(["cat", "dog"]))
    assert torch.equal(logits, zero_shot_logits(large, large.model.encode_image(image), weights))


def test_what_does_not_fit_is_refused(plain, maple):
    for config, sentence in (
        ({"depth": 4}, "depth=4 is more than the 3 blocks of small's text tower"),
        ({"depth": 5, "method": "vpt"}, "depth=5 is more than the 4 blocks of small's image tower"),
        ({"depth": 2, "n_ctx": 5}, "context='a photo of a' has 4 tokens, fewer than n_ctx=5"),
        ({"depth": 2, "n_ctx": 18, "context": ""}, "n_ctx=18 leaves no room for a class name"),
    ):
        with pytest.raises(PatchSAEError, match=sentence):
            adapt(plain, PromptConfig(**config))
    with pytest.raises(PatchSAEError, match="is adapted already"):
        adapt(maple, PromptConfig(depth=1))
    with pytest.raises(PatchSAEError, match="method='lora' is unknown; choose one of maple, coop, vpt"):
        PromptConfig(method="lora")
    with pytest.raises(PatchSAEError, match="depth=-1"):
        PromptConfig(depth=-1)
    with pytest.raises(PatchSAEError, match="give a list of at least one name"):
        maple.class_weights([])
    deaf = make(CustomTextCLIP, text={"no_causal_mask": True, "pool_type": "last"})
    with pytest.raises(PatchSAEError, match="is not CLIP's"):
        adapt(deaf, PromptConfig(depth=2))
    assert adapt(deaf, PromptConfig(depth=2, method="vpt")).n_tokens == 19


def test_a_tower_that_is_not_open_clips_own_is_refused():
    siglip = load_backbone("ViT-B-16-SigLIP", block=11)
    with pytest.raises(PatchSAEError, match="is not open_clip's own VisionTransformer"):
        adapt(siglip, PromptConfig(method="vpt"))
