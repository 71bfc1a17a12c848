"""The token stream, the trainer and its resumption, on a tiny backbone with real scenes."""

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP

from patchsae.backbone import Backbone
from patchsae.embedded import SINGLE, SceneSet
from patchsae.errors import PatchSAEError
from patchsae.evaluation import bootstrap, reconstruction, through_sae, zero_shot_predictions, zeroed
from patchsae.sae import SAE, SAEConfig
from patchsae.training import (
    BiasInit,
    Tokens,
    TrainConfig,
    image_order,
    initial_bias,
    token_chunk,
    train_sae,
)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    vision = {"image_size": 112, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    clip = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return Backbone(clip, 1, name="tiny", tokenizer=lambda: tokenizer)


@pytest.fixture(scope="module")
def images() -> SceneSet:
    return SceneSet("tiny", "train", range(0, 40, 2), (0, 1), 4, SINGLE)


CONFIG = TrainConfig(
    images=96, chunk_images=24, image_batch=8, token_batch=128, warmup_steps=5, log_every=1,
    checkpoint_chunks=1, lr=3e-3, dead_window=3,
)  # fmt: skip


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    first, second = image_order(10, 0, 0, 10), image_order(10, 0, 10, 20)
    assert sorted(first) == sorted(second) == list(range(10))
    assert (first != second).any()
    across = image_order(10, 0, 7, 13)
    assert (across == np.concatenate([first[7:], second[:3]])).all()


def test_a_chunk_mixes_the_tokens_of_its_images_and_loses_none(backbone, images):
    chunk = token_chunk(images, backbone, CONFIG, 1)
    order = image_order(len(images), CONFIG.seed, 24, 48)
    with torch.no_grad():
        plain = backbone.residual(backbone.normalize(images.load(order).images))
    assert chunk.x.shape == (24 * backbone.n_tokens, backbone.d_model)
    assert int(chunk.is_cls.sum()) == 24
    sort = lambda x: x[np.lexsort(x.numpy().T)]  # noqa: E731
    torch.testing.assert_close(sort(chunk.x), sort(plain.flatten(0, 1)))
    again = token_chunk(images, backbone, CONFIG, 1)
    assert torch.equal(chunk.x, again.x)


@pytest.mark.parametrize(("tokens", "per_image"), [("cls", 1), ("patches", 49), ("all", 50)])
def test_token_choice(backbone, images, tokens, per_image):
    config = TrainConfig(images=8, chunk_images=8, tokens=tokens)
    assert len(token_chunk(images, backbone, config, 0).x) == 8 * per_image


def test_training_reconstructs_better_and_is_done_once(backbone, images, tmp_path):
    sae_config = SAEConfig(d_in=32, expansion=4, l1=1e-4)
    trained = train_sae(images, backbone, sae_config, CONFIG, tmp_path, progress=False)
    rows = trained.metrics
    assert rows[-1]["tokens"] == 96 * 50 and len(rows) == rows[-1]["step"]
    assert rows[-1]["fvu"] < 0.6 * rows[0]["fvu"]
    norms = trained.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    stamp = (trained.folder / "manifest.json").stat().st_mtime_ns
    again = train_sae(images, backbone, sae_config, CONFIG, tmp_path, progress=False)
    assert (again.folder / "manifest.json").stat().st_mtime_ns == stamp
    assert torch.equal(again.sae.W_enc, trained.sae.W_enc)


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(backbone, images, tmp_path, monkeypatch):
    import patchsae.training as training

    sae_config = SAEConfig(d_in=32, expansion=4, l1=1e-4)
    whole = train_sae(images, backbone, sae_config, CONFIG, tmp_path / "whole", progress=False)
    real = training.token_chunk

    def stop_at_the_third(*args):
        if args[3] == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "token_chunk", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_sae(images, backbone, sae_config, CONFIG, tmp_path / "cut", progress=False)
    monkeypatch.setattr(training, "token_chunk", real)
    assert not list((tmp_path / "cut").glob("*/manifest.json"))
    resumed = train_sae(images, backbone, sae_config, CONFIG, tmp_path / "cut", progress=False)
    for name, weight in whole.sae.named_parameters():
        assert torch.equal(weight, dict(resumed.sae.named_parameters())[name]), name
    drop = ("tokens_per_second",)
    strip = lambda rows: [{k: v for k, v in r.items() if k not in drop} for r in rows]  # noqa: E731
    assert strip(resumed.metrics) == strip(whole.metrics)


def test_bias_starts(backbone, images):
    x = token_chunk(images, backbone, CONFIG, 0).x
    assert torch.equal(initial_bias(x, BiasInit.ZEROS), torch.zeros(32))
    torch.testing.assert_close(initial_bias(x, BiasInit.MEAN), x.mean(0))
    median, mean = initial_bias(x, BiasInit.GEOMETRIC_MEDIAN), x.mean(0)
    assert (x - median).norm(dim=1).sum() < (x - mean).norm(dim=1).sum()


def test_reconstruction_equals_a_direct_computation(backbone, images):
    sae = SAE(SAEConfig(d_in=32, expansion=2), seed=1)
    found = reconstruction(sae, backbone, images.subset(range(20)), batch_size=7)
    with torch.no_grad():
        x = backbone.residual(backbone.normalize(images.load(range(20)).images)).flatten(0, 1)
        f, x_hat = sae.encode(x), sae(x)
    assert found.tokens == len(x)
    assert found.l0 == pytest.approx((f > 0).sum(1).float().mean().item())
    assert found.l1 == pytest.approx(f.sum(1).mean().item(), rel=1e-5)
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert found.fvu == pytest.approx(fvu.item(), rel=1e-4)
    assert found.dead_share == pytest.approx((~(f > 0).any(0)).float().mean().item(), abs=1e-6)
    mse = ((x - x_hat).square().mean(1) / x.norm(dim=1)).mean()
    assert found.mse == pytest.approx(mse.item(), rel=1e-5)


def test_edits_reach_the_prediction(backbone, images):
    text = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    sae = SAE(SAEConfig(d_in=32, expansion=2), seed=1)
    edits = (None, through_sae(sae, backbone), zeroed)
    found = zero_shot_predictions(backbone, images.subset(range(30)), text, edits, 8, progress=None)
    x = backbone.normalize(images.load(range(30)).images)
    with torch.no_grad():
        direct = (torch.nn.functional.normalize(backbone(x), dim=1) @ text.T).argmax(1).numpy()
        tokens = backbone.residual(x)
        swapped = backbone.finish(sae(tokens)) @ text.T
    assert (found[0] == direct).all()
    assert (found[1] == swapped.argmax(1).numpy()).all()
    assert len(set(found[2])) == 1  # nothing of the image is left


def test_bootstrap_covers_the_mean():
    values = (np.random.default_rng(0).random(500) < 0.3).astype(float)
    interval = bootstrap(values)
    assert interval.low < values.mean() == interval.value < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 500), rel=0.2)


def test_bad_input_is_named(backbone, images, tmp_path):
    with pytest.raises(PatchSAEError, match="tokens='pixels'.*all, cls, patches"):
        TrainConfig(tokens="pixels")
    with pytest.raises(PatchSAEError, match="chunk_images=0"):
        TrainConfig(chunk_images=0)
    with pytest.raises(PatchSAEError, match="empty"):
        train_sae(images.subset([]), backbone, SAEConfig(32), CONFIG, tmp_path)
    broken = torch.nn.Parameter(torch.full((32,), torch.nan), requires_grad=False)
    block = backbone.model.visual.transformer.resblocks[0]
    kept, block.ln_1.bias = block.ln_1.bias, broken
    try:
        with pytest.raises(PatchSAEError, match="NaN"):
            token_chunk(images, backbone, CONFIG, 0)
    finally:
        block.ln_1.bias = kept
    assert Tokens("cls") is Tokens.CLS
