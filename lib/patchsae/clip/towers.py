"""Image towers opened between their blocks: what differs from one kind of vision transformer to the next.

open_clip's own VisionTransformer has CLS and patches; timm's may have registers (DINOv2), neither CLS nor
registers (SigLIP), or turn queries and keys by their place in every block (EVA, DINOv3).
"""

import numpy as np
from torch import Tensor, nn

from patchsae.runs import compat  # noqa: F401  (must come before open_clip and timm)

# isort: split
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from patchsae.runs.errors import PatchSAEError


class OpenClipTower:
    """Open open_clip's own VisionTransformer between its blocks."""

    def __init__(self, visual: VisionTransformer):
        self.visual = visual
        self.blocks = list(visual.transformer.resblocks)
        self.batch_first = visual.transformer.batch_first
        self.d_model = visual.transformer.width
        self.image_size, self.grid = tuple(visual.image_size), tuple(visual.grid_size)
        self.token_kind = np.array(["cls"] + ["patch"] * (self.grid[0] * self.grid[1]))

    def embed(self, images: Tensor) -> Tensor:
        """Turn images [B, 3, H, W] into the tokens [B, T, d] that enter the first block."""
        return self.visual._embeds(images)

    def run(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        """Send tokens [B, T, d] through blocks start+1 … stop."""
        if not self.batch_first:  # the layout decides the kernels, and the kernels the last bit
            tokens = tokens.transpose(0, 1).contiguous()
        for block in self.blocks[start:stop]:
            tokens = block(tokens)
        return tokens if self.batch_first else tokens.transpose(0, 1)

    def enter(self, tokens: Tensor, block: int) -> Tensor:
        """Return tokens [B, T, d] as block number `block` + 1 gets them."""
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """Turn the tokens [B, T, d] after the last block into embeddings [B, e]."""
        pooled, _ = self.visual._pool(tokens)
        return pooled if self.visual.proj is None else pooled @ self.visual.proj


class TimmTower(OpenClipTower):
    """Open a timm VisionTransformer (SigLIP, DINOv2 and relatives) between its blocks.

    visual: holds the model as `trunk`, its `image_size`, and in `head` what comes after it.
    """

    def __init__(self, visual: TimmModel):
        self.visual, self.trunk = visual, visual.trunk
        self.blocks, self.batch_first = list(self.trunk.blocks), True
        self.d_model, patches = self.trunk.embed_dim, self.trunk.patch_embed
        self.image_size, self.grid = tuple(visual.image_size), tuple(patches.grid_size)
        kinds = ["cls"] * (self.trunk.cls_token is not None)
        kinds += ["register"] * (self.trunk.num_prefix_tokens - len(kinds))
        self.token_kind = np.array(kinds + ["patch"] * (self.grid[0] * self.grid[1]))

    def embed(self, images: Tensor) -> Tensor:
        trunk = self.trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def pool(self, tokens: Tensor) -> Tensor:
        return self.visual.head(self.trunk.forward_head(self.trunk.norm(tokens)))


class EvaTower(TimmTower):
    """Open a timm Eva (EVA-02, DINOv3), whose blocks are told where each patch lies."""

    def embed(self, images: Tensor) -> Tensor:
        return self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(images))[0])

    def run(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        places, own = self._places(tokens), getattr(self.trunk, "rope_mixed", False)
        for number in range(start, stop):
            rope = places[number] if own and places is not None else places
            tokens = self.blocks[number](tokens, rope=rope)
        return tokens

    def _places(self, tokens: Tensor) -> Tensor | None:
        # asked of the model itself, which does not let go of them otherwise; they depend on the grid alone
        rows, columns = self.grid
        flat = (1, rows, columns) if self.trunk.dynamic_img_size else (1, rows * columns)
        return self.trunk._pos_embed(tokens.new_zeros(*flat, self.d_model))[1]


def tower_of(model: nn.Module, name: str) -> OpenClipTower:
    """Return the tower class for `model.visual`, open.

    Raises PatchSAEError for one that has no stream of tokens, or sends it another way than those known.
    """
    if isinstance(model.visual, VisionTransformer):
        return OpenClipTower(model.visual)
    kind = type(getattr(model.visual, "trunk", model.visual))
    for known, tower in ((TimmVisionTransformer, TimmTower), (Eva, EvaTower)):
        # Relatives that override the forward pass do not run these modules in this order.
        if issubclass(kind, known) and kind.forward_features is known.forward_features:
            return tower(model.visual)
    raise PatchSAEError(
        f"The image tower of {name} is a {kind.__name__}, which has no stream of tokens to cut: "
        "choose a vision transformer, such as ViT-B-16-quickgelu or ViT-B-16-SigLIP."
    )
