"""From edited tokens to embeddings when only one token of the last block is read.

CLIP's embedding is a function of the CLS token after the last block, so in that block only one query is
needed. With one query the keys and values of the other tokens need not be made either: for a head with
matrices W_q, W_k, W_v and normalised tokens n_t,

    q·k_t = (W_q n_0 + b_q) · W_k n_t + const = u · n_t + const,   u = W_kᵀ (W_q n_0 + b_q)
    Σ_t p_t v_t = W_v (Σ_t p_t n_t) + b_v

so that a token costs two products with [heads, d] instead of two with [d, d]. The constant leaves the
softmax unchanged. The result is that of `Backbone.finish` up to the order of float32 sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchsae.clip.backbone import Backbone
from patchsae.clip.towers import OpenClipTower
from patchsae.runs.products import fast_float32

# isort: split
from open_clip.transformer import ResidualAttentionBlock


class Tail:
    """Finish tokens [N, T, d] after a backbone's block to embeddings [N, e], the last block for CLS alone.

    A tower that pools otherwise, or has blocks of another kind, is finished as it is.
    """

    def __init__(self, backbone: Backbone):
        self.backbone, self.tower = backbone, backbone.tower
        self.short = backbone.block < backbone.n_blocks and reads_one_token(self.tower)

    @torch.no_grad()
    @fast_float32()
    def __call__(self, tokens: Tensor) -> Tensor:
        if not self.short:
            return self.backbone.finish(tokens)
        last = self.backbone.n_blocks - 1
        if self.backbone.block < last:
            blocks = self.backbone.block, last
            tokens = self.backbone.in_parts(lambda part: self.tower.run(part, *blocks), tokens)
        tokens = self.tower.enter(tokens, last)
        cls = _cls_after(self.tower.blocks[last], tokens)[:, None]
        return OpenClipTower.pool(self.tower, cls)  # a tower with prompts would look for them here


def reads_one_token(tower: OpenClipTower) -> bool:
    """Tell whether a tower is pooled from its first token after a block of open_clip's plain kind."""
    visual, last = tower.visual, tower.blocks[-1]
    plain = type(last) is ResidualAttentionBlock and last.attn._qkv_same_embed_dim
    return plain and getattr(visual, "attn_pool", None) is None and visual.pool_type == "tok"


def _cls_after(block: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
    """Return what a block makes of the first token: tokens [N, T, d] to [N, d]."""
    attention, (n, _, d) = block.attn, tokens.shape
    heads = attention.num_heads
    W_q, W_k, W_v = (W.unflatten(0, (heads, -1)) for W in attention.in_proj_weight.chunk(3))  # [h, d/h, d]
    b_q, _, b_v = attention.in_proj_bias.chunk(3)
    normed = block.ln_1(tokens)  # [N, T, d]
    q = (normed[:, 0] @ attention.in_proj_weight[:d].T + b_q).view(n, heads, -1)  # [N, h, d/h]
    u = torch.einsum("nhk,hkd->nhd", q, W_k) * q.shape[-1] ** -0.5
    share = (u @ normed.mT).softmax(-1)  # [N, h, T]
    mixed = torch.einsum("nhd,hkd->nhk", share @ normed, W_v).flatten(1) + b_v  # [N, d]
    x = tokens[:, 0] + block.ls_1(attention.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
