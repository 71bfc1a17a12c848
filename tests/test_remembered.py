"""A memory of tokens gives the tokens that the tower would, and asks the tower once."""

import pytest
import torch
from tiny import tiny_backbone

from patchsae.adaptation.prompts import PromptConfig, adapt
from patchsae.clip.remembered import Remembered


@pytest.fixture
def counted(monkeypatch):
    """Return a backbone with a memory, and a list of how many images its tower was asked for."""
    backbone, asked = tiny_backbone(), []
    backbone.remember(Remembered(10_000_000))
    whole = type(backbone).in_parts
    monkeypatch.setattr(
        type(backbone),
        "in_parts",
        lambda self, run, batch: (asked.append(len(batch)), whole(self, run, batch))[1],
    )
    return backbone, asked


def images(backbone, count=4, seed=0):
    shape = (count, 3, backbone.image_size, backbone.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_what_was_seen_is_not_asked_again(counted):
    backbone, asked = counted
    x = images(backbone)
    plain = tiny_backbone().residual(x)
    asked.clear()
    first, again, part = backbone.residual(x), backbone.residual(x), backbone.residual(x[[2, 0]])
    assert asked == [4]
    assert torch.equal(first, plain) and torch.equal(again, plain) and torch.equal(part, plain[[2, 0]])
    again.zero_()  # what is given is the asker's own
    assert torch.equal(backbone.residual(x), plain)


@torch.no_grad()
def test_a_batch_with_anything_new_is_computed_whole(counted):
    backbone, asked = counted
    x, other = images(backbone), images(backbone, seed=1)
    backbone.residual(x)
    mixed = torch.cat([x[:1], other[:1]])
    assert torch.equal(backbone.residual(mixed), tiny_backbone().residual(mixed))
    assert asked[:2] == [4, 2]


@torch.no_grad()
def test_another_block_and_another_model_share_nothing_but_the_room(counted):
    backbone, asked = counted
    x = images(backbone)
    backbone.residual(x)
    earlier = backbone.at_block(backbone.block - 1)
    assert torch.equal(earlier.residual(x), tiny_backbone().at_block(backbone.block - 1).residual(x))
    adapted = adapt(tiny_backbone(), PromptConfig(depth=1), seed=0)
    before = adapted.residual(x)
    adapted.remember(backbone._shared["memory"])
    assert (
        torch.equal(adapted.residual(x), before) and adapted.residual(x).shape != backbone.residual(x).shape
    )


@torch.no_grad()
def test_a_model_with_other_words_alone_has_the_tokens_of_plain_clip(counted):
    backbone, asked = counted
    x = images(backbone)
    coop = adapt(backbone, PromptConfig(method="coop", depth=1), seed=0)
    coop.remember(backbone._shared["memory"])
    seen = backbone.residual(x)
    asked.clear()
    assert torch.equal(coop.residual(x), seen) and not asked
    assert coop.fingerprint() != backbone.fingerprint()
    earlier = coop.at_block(backbone.block - 1)
    assert not torch.equal(earlier.residual(x), seen) and asked


def test_where_gradients_are_taken_nothing_is_remembered(counted):
    backbone, asked = counted
    x = images(backbone, 1)
    backbone.residual(x), backbone.residual(x)
    assert len(asked) == 2


@torch.no_grad()
def test_the_longest_unasked_go_first_and_the_limit_holds(counted):
    backbone, asked = counted
    x = images(backbone, 6)
    row = backbone.residual(x[:1]).nbytes
    memory = Remembered(3 * row)
    backbone.remember(memory)
    for at in (0, 1, 2, 0, 3):  # 1 is now the longest unasked
        backbone.residual(x[at : at + 1])
    asked.clear()
    backbone.residual(x[:1]), backbone.residual(x[3:4])
    assert asked == [] and memory.held == 3 * row
    backbone.residual(x[1:2])
    assert asked == [1]
    small = Remembered(row - 1)
    backbone.remember(small)
    backbone.residual(x[:1])
    assert small.held == 0
