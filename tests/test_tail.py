"""The last block for one query against the whole model, and towers it does not fit."""

import pytest
import torch
from test_prompts import learned, make
from tiny import tiny_backbone

from patchsae.clip.backbone import load_backbone
from patchsae.clip.tail import Tail
from patchsae.runs.stage import project_root


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_short_way_gives_what_finish_gives(block):
    backbone = tiny_backbone().at_block(block)
    tokens = torch.randn(5, backbone.n_tokens, backbone.d_model)
    tail = Tail(backbone)
    assert tail.short == (block < 2)
    with torch.no_grad():
        torch.testing.assert_close(tail(tokens), backbone.finish(tokens), rtol=1e-5, atol=1e-5)


def test_the_small_clip_and_a_tower_that_pools_otherwise():
    backbone = load_backbone(str(project_root() / "artefacts" / "small_clip"), block=9)
    tokens = torch.randn(2, backbone.n_tokens, backbone.d_model) * 5
    with torch.no_grad():
        assert Tail(backbone).short
        torch.testing.assert_close(Tail(backbone)(tokens), backbone.finish(tokens), rtol=1e-4, atol=1e-5)
    siglip = load_backbone("ViT-B-16-SigLIP", block=11)
    tokens = torch.randn(1, siglip.n_tokens, siglip.d_model)
    with torch.no_grad():
        assert not Tail(siglip).short and Tail(siglip)(tokens).equal(siglip.finish(tokens))


@pytest.mark.parametrize("method", ["maple", "vpt", "coop"])
@pytest.mark.parametrize("block", [2, 3])
def test_learned_tokens_enter_the_last_block_too(method, block):
    adapted = learned(make(text={"layers": 4}), method=method, depth=4).at_block(block)
    tokens = torch.randn(3, adapted.n_tokens, adapted.d_model)
    tail = Tail(adapted)
    with torch.no_grad():
        assert tail.short
        torch.testing.assert_close(tail(tokens), adapted.finish(tokens), rtol=1e-5, atol=1e-5)
