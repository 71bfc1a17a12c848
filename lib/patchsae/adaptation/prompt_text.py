"""CLIP's text tower with learned words, and the prompts of all classes in one pass.

The prompts of a data set differ in the class name alone, and attention in the text tower is causal. So
the words before the name are the same vectors for every class, and nothing after the end-of-text token
matters. `pack` writes the common words once, then each class's own words, and a mask that lets these see
the common words and each other:

    <start> a photo of a | red apple . <end> | cat . <end> | ...

The sums are those of one padded row per class. ImageNet's 1000 rows of 77 tokens become a few thousand
tokens, which is most of what a training step with a small batch costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchsae.clip.backbone import Backbone
from patchsae.runs.errors import PatchSAEError

GROUP = 64  # classes behind one copy of the common words: attention grows with the square of it


class PackedTexts(NamedTuple):
    """Texts of C classes in G rows of L tokens."""

    ids: Tensor
    """Token ids, int64 [G, L]."""
    position: Tensor
    """Where each token stands in its own text, int64 [G, L]."""
    seen: Tensor
    """Whether token i (dimension 1) sees token j (dimension 2), bool [G, L, L]."""
    end: Tensor
    """Where the end-of-text token of each class is among the G·L tokens, int64 [C]."""


def pack(ids: Tensor, end: Tensor, group: int = GROUP) -> PackedTexts:
    """Pack token ids [C, context], whose texts end at `end` [C], behind what they have in common."""
    same = (ids == ids[0]).all(0)
    common = min(int(same.long().cumprod(0).sum()), int(end.min()))
    own = end + 1 - common  # [C], at least 1
    rows = [slice(start, start + group) for start in range(0, len(ids), group)]
    length = common + max(int(own[row].sum()) for row in rows)
    shape = (len(rows), length)
    packed, position = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    owner = torch.full(shape, -1)  # whose word it is; -1 padding, -2 common
    owner[:, :common], packed[:, :common], position[:, :common] = -2, ids[0, :common], torch.arange(common)
    where = torch.empty_like(end)
    for number, row in enumerate(rows):
        at = common
        for klass in range(*row.indices(len(ids))):
            to = at + int(own[klass])
            packed[number, at:to] = ids[klass, common : end[klass] + 1]
            position[number, at:to] = torch.arange(common, int(end[klass]) + 1)
            owner[number, at:to] = klass
            where[klass] = number * length + to - 1
            at = to
    mine = (owner[:, None] == owner[:, :, None]) | (owner[:, None] == -2)
    return PackedTexts(packed, position, mine & (position[:, None] <= position[:, :, None]), where)


class TextTower:
    """Open CLIP's text transformer, so that learned words can enter before any of its blocks.

    Raises PatchSAEError for a text tower that is not CLIP's: causal, read at its end-of-text token.
    """

    def __init__(self, backbone: Backbone):
        self.tokenize, self.name = backbone.tokenize, backbone.name
        # open_clip keeps the tower's parts in the model itself, or in `model.text`
        self.text: nn.Module = getattr(backbone.model, "text", backbone.model)
        self.pool = getattr(self.text, "text_pool_type", getattr(self.text, "pool_type", None))
        self.eos = getattr(self.text, "text_eos_id", getattr(self.text, "eos_id", None))
        causal = getattr(self.text, "attn_mask", None) is not None
        own_token = getattr(self.text, "cls_emb", None) is not None  # CoCa's, which sees every word
        if not causal or own_token or self.pool not in ("argmax", "eos"):
            raise PatchSAEError(
                f"The text tower of {self.name} is not CLIP's (causal, read at its end-of-text token), so "
                "words cannot be learned in it: choose a CLIP such as ViT-B-16-quickgelu, or method=vpt."
            )
        self.blocks = list(self.text.transformer.resblocks)
        self.width, self.context = self.text.transformer.width, self.text.context_length

    def embed(self, ids: Tensor) -> Tensor:
        """Return the vectors [..., width] of token ids, without their positions."""
        return self.text.token_embedding(ids.to(self.text.token_embedding.weight.device))

    def ends(self, ids: Tensor) -> Tensor:
        """Return where each text [N, context] ends, int64 [N]."""
        return ids.argmax(-1) if self.pool == "argmax" else (ids == self.eos).int().argmax(-1)

    def pack(self, texts: Sequence[str]) -> PackedTexts:
        """Tokenize texts and pack them, on the model's device."""
        ids = self.tokenize(texts).cpu()
        device = self.text.token_embedding.weight.device
        return PackedTexts(*(part.to(device) for part in pack(ids, self.ends(ids))))

    def encode(self, texts: PackedTexts, prompts: Sequence[Tensor]) -> Tensor:
        """Return embeddings [C, e], not normalised, of texts with learned words.

        prompts: [n, width] for each of the first blocks; they overwrite the tokens 1 … n before their
            block (before the positions are added, for the first), as facts.md §1.1 says.
        """
        text = self.text
        dtype = text.transformer.get_cast_dtype()
        x = _overwrite(self.embed(texts.ids).to(dtype), prompts[:1])
        x = x + text.positional_embedding.to(dtype)[texts.position]
        mask = torch.zeros_like(texts.seen, dtype=dtype).masked_fill(~texts.seen, -torch.inf)
        heads = self.blocks[0].attn.num_heads
        mask = mask.repeat_interleave(heads, 0) if len(x) > 1 else mask[0]  # [G·heads, L, L]
        swap = not text.transformer.batch_first
        for number, block in enumerate(self.blocks):
            x = _overwrite(x, prompts[number : number + 1]) if number else x
            x = x.transpose(0, 1) if swap else x
            x = block(x, attn_mask=mask)
            x = x.transpose(0, 1) if swap else x
        x = text.ln_final(x.flatten(0, 1)[texts.end])
        head = text.text_projection
        if head is None:
            return x
        return head(x) if isinstance(head, nn.Linear) else x @ head


def _overwrite(x: Tensor, prompt: Sequence[Tensor]) -> Tensor:
    for p in prompt:  # one or none
        rows = p.to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], rows, x[:, 1 + len(p) :]], 1)
    return x
