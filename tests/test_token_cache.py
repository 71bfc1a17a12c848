"""Caches of several blocks made in one pass, against those made one by one."""

import pytest
import torch

from patchsae.runs.errors import PatchSAEError
from patchsae.training import token_cache
from patchsae.training.activations import Activations, Tokens
from patchsae.training.token_cache import fill, from_cache, parts_of


def files(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.safetensors")}


def test_one_pass_makes_the_caches_that_are_made_one_by_one(backbone, images, tmp_path, monkeypatch):
    for module in (token_cache, "patchsae.training.activations"):
        where = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{where}.SHARD_IMAGES", 16)
    kinds = [(1, Tokens.ALL), (2, Tokens.ALL), (2, Tokens.CLS)]
    wanted = [(backbone.at_block(block), tokens) for block, tokens in kinds]
    few = images.subset(range(40))
    for cut, tokens in wanted:
        Activations(few, cut, tokens, cache=tmp_path / "apart")
    read, load = [], few.load
    monkeypatch.setattr(few, "load", lambda indices: read.extend(indices) or load(indices))
    assert parts_of(few) == 3
    for part in (2, 1):
        fill(few, wanted, tmp_path / "together", part, 3)
    assert not list((tmp_path / "together").glob("*/manifest.json"))  # not before all parts are there
    fill(few, wanted, tmp_path / "together", 0, 3)
    assert len(list((tmp_path / "together").glob("*/manifest.json"))) == 3
    assert files(tmp_path / "together") == files(tmp_path / "apart")
    assert len(files(tmp_path / "apart")) == 9 and sorted(read) == list(range(40))
    fill(few, wanted, tmp_path / "together", 1, 3)
    assert len(read) == 40  # what is there is not made again


def test_values_that_are_no_numbers_are_refused(backbone, images, tmp_path, monkeypatch):
    monkeypatch.setattr(type(backbone), "residuals", lambda *a: {1: torch.full((4, 50, 32), torch.nan)})
    with pytest.raises(PatchSAEError, match="after block 1 has NaN"):
        fill(images.subset(range(4)), [(backbone.at_block(1), Tokens.ALL)], tmp_path, 0, 1)


def test_tokens_from_a_cache_stand_in_for_pixels(backbone, images, tmp_path):
    kept, past = from_cache(images, backbone, tmp_path)
    few, pixels = kept.sample(5, 3), images.sample(5, 3)
    with torch.no_grad():
        direct = backbone.residual(backbone.normalize(pixels.load(range(5)).images))
        read = past.residual(past.normalize(few.load(range(5)).images))
    torch.testing.assert_close(read, direct, rtol=2e-3, atol=2e-3)
    assert (few.labels == pixels.labels).all() and few.fingerprint() != pixels.fingerprint()
    assert past.fingerprint() == backbone.fingerprint() and past.n_tokens == backbone.n_tokens
    assert from_cache(images, backbone, "") == (images, backbone)
