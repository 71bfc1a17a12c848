"""The token stream: order, lanes, worker processes and the cache, on a tiny backbone with real scenes."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CONFIG

from patchbook.scenes.embedded import SceneSet
from patchsae.images.files import FolderImages
from patchsae.images.loading import Pixels, read_batches
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.processes import Processes
from patchsae.training import activations
from patchsae.training.stream import StreamConfig, TokenBatch, TokenStream, image_order


@pytest.fixture(scope="module")
def batches(backbone, images) -> list[TokenBatch]:
    return list(TokenStream(images, backbone, CONFIG).batches())


def rows(x: torch.Tensor) -> np.ndarray:
    """Sort tokens, so that sets of them can be compared."""
    return x.numpy()[np.lexsort(x.numpy().T)]


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    first, second = image_order(10, 0, 0, 10), image_order(10, 0, 10, 20)
    assert sorted(first) == sorted(second) == list(range(10))
    assert (first != second).any()
    across = image_order(10, 0, 7, 13)
    assert (across == np.concatenate([first[7:], second[:3]])).all()


def test_no_token_is_lost_or_seen_twice(backbone, images, batches):
    order = image_order(len(images), CONFIG.seed, 0, CONFIG.images)
    with torch.no_grad():
        plain = backbone.residual(backbone.normalize(images.load(order).images))
    seen = torch.cat([batch.x for batch in batches])
    # other images in the same pass of the backbone change the last bits
    np.testing.assert_allclose(rows(seen), rows(plain.flatten(0, 1)), atol=1e-5)
    is_cls = torch.cat([batch.is_cls for batch in batches])
    np.testing.assert_allclose(rows(seen[is_cls]), rows(plain[:, 0]), atol=1e-5)
    assert [batch.tokens for batch in batches[:10]] == [128] * 9 + [24 * 50 - 9 * 128]
    assert [batch.position for batch in batches[9:11]] == [(1, 0), (1, 1)]
    assert batches[-1].position == (4, 0)


def test_a_batch_mixes_many_images(images, batches):
    # tokens of one image share a background; far fewer than 24 images would repeat CLS tokens
    spread = [int(batch.is_cls.sum()) for batch in batches if batch.tokens == 128]
    assert max(spread) < 24 and np.mean(spread) == pytest.approx(128 / 50, rel=0.3)


def test_the_stream_goes_on_at_any_batch(backbone, images, batches):
    for k in (1, 9, 10, 25):
        rest = list(TokenStream(images, backbone, CONFIG).batches(batches[k].position))
        assert len(rest) == len(batches) - k - 1
        assert all(torch.equal(a.x, b.x) for a, b in zip(rest, batches[k + 1 :], strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_lanes_give_any_number_of_processes_the_same_batches(backbone, images, world):
    # 22 images a chunk: uneven lanes; the last chunk has 2 images, so two of four lanes are empty
    config = replace(CONFIG, images=24, chunk_images=22, token_batch=127)
    whole = list(TokenStream(images, backbone, config).batches())
    parts = [
        list(TokenStream(images, backbone, config, Processes(r, world)).batches()) for r in range(world)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    assert sum(batch.tokens for batch in whole) == 24 * 50
    for one, *several in zip(whole, *parts, strict=True):
        assert {part.tokens for part in several} == {one.tokens} == {len(one.x)}
        assert {part.position for part in several} == {one.position}
        assert (rows(torch.cat([part.x for part in several])) == rows(one.x)).all()
        assert sum(part.is_cls.sum() for part in several) == one.is_cls.sum()
    if world == 4:
        assert any(part.x.shape == (0, 32) for part in parts[3])  # it takes part all the same


def test_workers_do_not_change_the_stream_and_leave_with_it(backbone, images, batches):
    state = torch.get_rng_state()
    stream = TokenStream(images, backbone, replace(CONFIG, workers=2)).batches()
    for expected in batches[:15]:
        assert torch.equal(next(stream).x, expected.x)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone


@pytest.mark.parametrize(("tokens", "per_image"), [("cls", 1), ("patches", 49), ("all", 50)])
def test_token_choice(backbone, images, tokens, per_image):
    config = StreamConfig(images=8, chunk_images=8, tokens=tokens)
    stream = TokenStream(images, backbone, config)
    assert sum(len(batch.x) for batch in stream.batches()) == 8 * per_image
    assert stream.first(3).shape == (3, per_image, 32)


def test_first_images_are_those_the_stream_begins_with(backbone, images):
    stream = TokenStream(images, backbone, CONFIG)
    order = image_order(len(images), CONFIG.seed, 0, 7)
    with torch.no_grad():
        plain = backbone.residual(backbone.normalize(images.load(order).images))
    torch.testing.assert_close(stream.first(7), plain)
    assert len(stream.first(10**6)) == len(images)  # each once
    assert len(TokenStream(images, backbone, replace(CONFIG, images=5)).first(10**6)) == 5


def test_a_cache_is_made_once_and_then_stands_for_the_backbone(
    backbone, images, batches, tmp_path, monkeypatch
):
    monkeypatch.setattr(activations, "SHARD_IMAGES", 16)
    cached = replace(CONFIG, cache=str(tmp_path))
    first = list(TokenStream(images, backbone, cached).batches())
    for batch, plain in zip(first, batches, strict=True):
        torch.testing.assert_close(batch.x, plain.x, rtol=2e-3, atol=2e-3)
        assert torch.equal(batch.is_cls, plain.is_cls)
    (folder,) = tmp_path.glob("activations-*")
    assert len(list(folder.glob("*.safetensors"))) == 3

    def refuse(*args):
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(backbone, "residual", refuse)
    again = TokenStream(images, backbone, cached)
    assert all(torch.equal(a.x, b.x) for a, b in zip(again.batches(), first, strict=True))
    other = TokenStream(images, backbone, replace(cached, seed=1))
    assert sum(len(batch.x) for batch in other.batches()) == 96 * 50
    monkeypatch.undo()


def test_a_damaged_shard_is_made_anew(backbone, images, tmp_path):
    cached = replace(CONFIG, cache=str(tmp_path))
    first = list(TokenStream(images, backbone, cached).batches())
    stream = TokenStream(images, backbone, cached)
    (shard,) = tmp_path.glob("activations-*/*.safetensors")
    whole = shard.read_bytes()
    activations._opened.cache_clear()
    shard.unlink()
    with pytest.raises(
        PatchSAEError, match=r"000000.safetensors' is damaged .*; delete it, then run again"
    ):
        next(stream.batches())
    shard.write_bytes(whole[:-1000])
    again = TokenStream(images, backbone, cached)
    assert shard.read_bytes() == whole
    assert torch.equal(next(again.batches()).x, first[0].x)


def test_what_a_cache_cannot_hold_is_refused(backbone, images, tmp_path, monkeypatch):
    config = replace(CONFIG, cache=str(tmp_path))
    block = backbone.model.visual.transformer.resblocks[0]
    with torch.no_grad():
        block.mlp.c_proj.bias += 1e5
    try:
        with pytest.raises(PatchSAEError, match=r"reaches 1e\+05, more than float16 holds.*cache=''"):
            TokenStream(images, backbone, config)
    finally:
        with torch.no_grad():
            block.mlp.c_proj.bias -= 1e5
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PatchSAEError, match=r"takes 0.000128 GB and 1e-06 GB are free"):
        TokenStream(images, backbone, config)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_sentence(tmp_path, workers):
    for i in range(4):
        folder = tmp_path / "set" / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"no image")
    read = read_batches(Pixels(FolderImages(tmp_path / "set", 16)), [[0, 1], [2, 3]], workers)
    assert next(read).shape == (2, 3, 16, 16)
    with pytest.raises(PatchSAEError, match=r"^cannot read image '.*2.png' \(.*\); replace") as error:
        next(read)
    assert "\n" not in str(error.value)
    assert not multiprocessing.active_children()


class Lost(SceneSet):
    """An image set whose decoding takes the worker with it, as a lack of memory does."""

    def load(self, indices):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported(images):
    lost = Lost("tiny", "train", range(3), (0,), 2)
    with pytest.raises(PatchSAEError, match=r"that reads 'tiny' died .*workers=1, or for 0") as error:
        list(read_batches(Pixels(lost), [[0]], 1))
    assert "\n" not in str(error.value)


def test_bad_input_is_named(backbone, images):
    with pytest.raises(PatchSAEError, match="tokens='pixels'.*all, cls, patches"):
        StreamConfig(tokens="pixels")
    for name in ("chunk_images", "lanes", "images"):
        with pytest.raises(PatchSAEError, match=f"{name}=0 must be positive"):
            StreamConfig(**{name: 0})
    with pytest.raises(PatchSAEError, match="seed=-1 must be 0 or more"):
        StreamConfig(seed=-1)
    with pytest.raises(PatchSAEError, match="token_batch=4 is less than lanes=8"):
        StreamConfig(token_batch=4)
    with pytest.raises(PatchSAEError, match="empty"):
        TokenStream(images.subset([]), backbone, CONFIG)
    with pytest.raises(PatchSAEError, match="lanes=4 cannot be dealt evenly to 3 processes"):
        TokenStream(images, backbone, CONFIG, Processes(0, 3))
    broken = torch.nn.Parameter(torch.full((32,), torch.nan), requires_grad=False)
    block = backbone.model.visual.transformer.resblocks[0]
    kept, block.ln_1.bias = block.ln_1.bias, broken
    try:
        with pytest.raises(PatchSAEError, match="tiny after block 1 has NaN .* on 'tiny'"):
            next(TokenStream(images, backbone, CONFIG).batches())
    finally:
        block.ln_1.bias = kept
