"""Changed weights: LoRA and fine-tuning as equations, as trained, and as read from disk."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prompt_training import Held, Killed
from test_prompts import make
from tiny import tiny_images
from torch.nn.utils import parametrize

from patchsae.adaptation import prompt_training
from patchsae.adaptation.prompt_files import (
    find_prompts,
    load_prompts,
    prompts_folder,
    read_card,
    save_prompts,
)
from patchsae.adaptation.prompt_training import train_prompts
from patchsae.adaptation.prompts import PromptConfig, adapt
from patchsae.adaptation.weights import LR, Change, TunedBackbone, WeightConfig, WeightTrainConfig
from patchsae.clip.backbone import Backbone, load_backbone, zero_shot_weights
from patchsae.clip.tail import Tail
from patchsae.runs.errors import PatchSAEError

METHODS = tuple(Change)
NAMES = ("cat", "red_apple", "bus")


@pytest.fixture(scope="module")
def plain():
    return make()


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def tuned(plain: Backbone, method: Change, **fields) -> TunedBackbone:
    """Return a backbone whose changes are large enough to show."""
    found = TunedBackbone(plain, WeightConfig(method=method, **fields), seed=1)
    torch.manual_seed(2)
    for parameter in found.learned.parameters():
        parameter.data.normal_(std=0.2)
    return found


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_before_training_it_is_clip(plain, pictures, method):
    start = TunedBackbone(plain, WeightConfig(method=method))
    assert torch.equal(start(pictures), plain(pictures))
    expected = zero_shot_weights(plain, NAMES, "a photo of a {}.")
    torch.testing.assert_close(start.class_weights(NAMES), expected, rtol=1e-5, atol=1e-6)
    assert start.fingerprint() != plain.fingerprint() and start.plain.fingerprint() == plain.fingerprint()


@torch.no_grad()
def test_lora_is_its_equation_in_both_towers(plain, pictures):
    found = tuned(plain, Change.LORA, rank=3)
    by_hand = make()
    layers = {
        f"{path}.in_proj_weight".replace(".", "/"): module
        for path, module in by_hand.model.named_modules()
        if isinstance(module, torch.nn.MultiheadAttention)
    }
    assert layers.keys() == found.learned.keys() and len(layers) == plain.n_blocks + len(
        found.text_tower.blocks
    )
    for key, module in layers.items():
        change = found.learned[key]
        for part, (B, A) in enumerate(zip(change.B, change.A, strict=True)):
            d = B.shape[0]
            module.in_proj_weight[part * d : (part + 1) * d] += B @ A / 3
    torch.testing.assert_close(found(pictures), by_hand(pictures), rtol=1e-4, atol=1e-5)
    expected = zero_shot_weights(by_hand, NAMES, "a photo of a {}.")
    torch.testing.assert_close(found.class_weights(NAMES), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found(pictures), plain(pictures), rtol=1e-2)
    assert not torch.allclose(expected, zero_shot_weights(plain, NAMES, "a photo of a {}."), rtol=1e-2)


@torch.no_grad()
def test_full_changes_every_weight_of_the_image_tower_and_no_word(plain, pictures):
    found, by_hand = tuned(plain, Change.FULL), make()
    weights = dict(by_hand.model.visual.named_parameters())
    assert {key.removeprefix("visual/").replace("/", ".") for key in found.learned} == set(weights)
    for name, weight in weights.items():
        weight += found.learned[f"visual/{name}".replace(".", "/")].D
    torch.testing.assert_close(found(pictures), by_hand(pictures), rtol=1e-4, atol=1e-5)
    expected = zero_shot_weights(plain, NAMES, "a photo of a {}.")
    assert torch.equal(found.class_weights(NAMES), expected)


@pytest.mark.parametrize("method", METHODS)
def test_settled_it_says_the_same_as_an_ordinary_model(plain, pictures, method):
    found = tuned(plain, method)
    with torch.no_grad():
        before, words = found(pictures), found.class_weights(NAMES)
        found.settle()
        torch.testing.assert_close(found(pictures), before, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.class_weights(NAMES), words, rtol=1e-5, atol=1e-6)
        at = found.at_block(1)
        tokens = at.residual(pictures)
        torch.testing.assert_close(Tail(at)(tokens), at.finish(tokens), rtol=1e-4, atol=1e-5)
    assert not any(map(parametrize.is_parametrized, found.model.modules()))
    assert [type(m) for m in found.model.modules()] == [type(m) for m in plain.model.modules()]
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_what_is_learned_and_nothing_else(plain, pictures, method):
    found = tuned(plain, method)
    found.learned.requires_grad_(True)
    loss = found(pictures).square().sum()
    if found.text_tower:
        loss = loss + found.class_embeddings(found.pack_classes(NAMES)).square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found.learned.parameters())
    learned = {id(p) for p in found.learned.parameters()}
    assert all(p.grad is None for p in found.parameters() if id(p) not in learned)


def test_at_full_size_lora_has_the_published_number_of_parameters():
    with pytest.warns(UserWarning, match="random weights"):
        large = load_backbone("ViT-B-16-quickgelu", block=11)
    found = TunedBackbone(large, WeightConfig())
    assert sum(p.numel() for p in found.learned.parameters()) == 184_320


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_found_again(plain, pictures, tmp_path, method):
    found = tuned(plain, method, template="a drawing of a {}.")
    folder = prompts_folder(tmp_path, "silhouettes", 3, method)
    save_prompts(folder, found, NAMES, 3, "test")
    found.settle()
    again = find_prompts(tmp_path, "silhouettes", plain.at_block(1), 3, method)
    assert again.block == 1 and read_card(folder).config == found.what == again.what
    with torch.no_grad():
        torch.testing.assert_close(again(pictures), found(pictures), rtol=1e-6, atol=1e-6)
        assert torch.equal(again.class_weights(NAMES), found.class_weights(NAMES))
    assert again.name == f"small+{method}"


def test_what_does_not_fit_is_refused(plain, tmp_path):
    save_prompts(tmp_path, tuned(plain, Change.LORA), NAMES, 1, "test")
    path, card = tmp_path / "prompts.safetensors", tmp_path / "prompts.json"
    good, said = load_file(path), json.loads(card.read_text())
    first = next(iter(good))
    for wrong, match in (
        ({k: v for k, v in good.items() if k != first}, f"{first} is absent in the file"),
        (good | {first: good[first][..., :1].contiguous()}, f"{first} is .* in the file"),
        (good | {first: good[first] * torch.nan}, "NaN or infinite"),
        (good | {"extra": torch.zeros(1)}, "extra is .* should be absent"),
    ):
        save_file(wrong, path)
        with pytest.raises(PatchSAEError, match=match):
            load_prompts(tmp_path, plain)
    save_file(good, path)
    for change in ({"rank": 0}, {"rank": "2"}, {"method": "adapter"}, {"rank": 3}):
        card.write_text(json.dumps(said | change))
        with pytest.raises(PatchSAEError):
            load_prompts(tmp_path, plain)
    card.write_text(json.dumps(said))
    other = make()
    other.model.visual.conv1.weight.data += 1
    with pytest.raises(PatchSAEError, match="were not learned on this"):
        load_prompts(tmp_path, other)
    with pytest.raises(PatchSAEError, match="is adapted already"):
        TunedBackbone(load_prompts(tmp_path, plain), WeightConfig())
    with pytest.raises(PatchSAEError, match="is adapted already"):
        adapt(load_prompts(tmp_path, plain), PromptConfig(depth=1))


def test_a_tower_without_that_attention_takes_no_lora():
    with pytest.warns(UserWarning, match="random weights"):
        other = load_backbone("timm:vit_tiny_patch16_224", block=2)
    with pytest.raises(PatchSAEError, match="no attention of PyTorch's own.*method=full"):
        TunedBackbone(other, WeightConfig())


CONFIG = WeightTrainConfig(
    epochs=3, augment=False, batch_size=4, lr=0.01, checkpoint_share=1e9, template="a {}."
)


@pytest.fixture(scope="module")
def shots():
    return Held(tiny_images()).subset(range(24))


@pytest.mark.parametrize("method", METHODS)
def test_training_learns_and_a_killed_run_ends_with_the_same_bits(
    backbone, shots, tmp_path, monkeypatch, method
):
    config = replace(CONFIG, method=method, lr=0.01 if method is Change.LORA else 0.001)
    before = backbone.fingerprint()
    whole = train_prompts(backbone, shots, config, tmp_path / "whole", progress=False)
    assert whole.metrics[-1]["loss"] < whole.metrics[0]["loss"] and backbone.fingerprint() == before
    saved = prompt_training._Run._save

    def save(run):
        saved(run)
        if run.step == 7:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prompt_training._Run, "_save", save)
        with pytest.raises(Killed):
            train_prompts(backbone, shots, config, tmp_path, progress=False)
    again = train_prompts(backbone, shots, config, tmp_path, progress=False)
    files = [(run.folder / "prompts.safetensors").read_bytes() for run in (whole, again)]
    assert files[0] == files[1] and again.metrics == whole.metrics
    assert again.backbone.what == config.learned
    assert again.backbone.fingerprint() == whole.backbone.fingerprint() != before


def test_each_method_has_its_step_size():
    for method in Change:
        assert WeightTrainConfig.usual(method).lr == LR[method]
        assert WeightTrainConfig.usual(method, lr=1.0, seed=4) == WeightTrainConfig(
            method=method, lr=1.0, seed=4
        )
