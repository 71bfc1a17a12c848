"""Prompt-based adaptation: learned tokens beside those of a frozen CLIP (MaPLe, CoOp and VPT).

    text    <start> p₁ p₂ of a cat . <end>        p in front of block 1, again in front of blocks 2 … depth
                    │  │  Linear, one per depth
    image   <cls> patch patch … patch v₁ v₂       v likewise, at the end of the patches

MaPLe learns p and the Linears; CoOp learns p alone, in front of block 1; VPT learns v alone, at every
depth. CoOp is shallow, as its authors made it: it is not MaPLe's text side, which is as deep as its image
side, so MaPLe has more than CoOp and the image tokens. No weight of CLIP changes, and none is copied: the
adapted backbone holds the same model, its tower adds the tokens, and everything that works on a `Backbone`
works on it. Architecture: facts.md §1.1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor, nn

from patchsae.adaptation.adapted import Adapted
from patchsae.adaptation.prompt_text import PackedTexts, TextTower
from patchsae.clip.backbone import Backbone
from patchsae.clip.towers import OpenClipTower
from patchsae.runs.errors import PatchSAEError, choose

SPREAD = 0.02  # standard deviation of prompts that start at random


class Method(StrEnum):
    """Where tokens are learned."""

    MAPLE = "maple"  # text, and from it image: every depth
    COOP = "coop"  # text alone, in front of the first block whatever the depth
    VPT = "vpt"  # image alone, every depth


@dataclass(frozen=True)
class PromptConfig:
    """Which tokens are learned; the defaults are MaPLe's (facts.md §1.1)."""

    method: Method = Method.MAPLE
    """Where tokens are learned."""
    depth: int = 9
    """Blocks in front of which there are learned tokens, the first included; 0 is plain CLIP."""
    n_ctx: int = 2
    """Learned tokens per depth."""
    context: str = "a photo of a"
    """Words before the class name; the first n_ctx start the learned ones. '' starts them at random."""
    template: str = "a photo of a {}."
    """Prompt where no word is learned (vpt, or depth 0): the data set's own."""

    def __post_init__(self):
        choose(self, "method", Method)
        if self.depth < 0 or self.n_ctx < 1:
            raise PatchSAEError(
                f"depth={self.depth} and n_ctx={self.n_ctx} must be at least 0 and 1 (0 is plain CLIP)."
            )

    @property
    def text_depth(self) -> int:
        """Blocks of the text tower with learned words."""
        return {Method.MAPLE: self.depth, Method.COOP: min(self.depth, 1), Method.VPT: 0}[self.method]

    @property
    def image_depth(self) -> int:
        """Blocks of the image tower with learned tokens."""
        return 0 if self.method is Method.COOP else self.depth

    def text(self, classname: str) -> str:
        """Return the prompt of a class; its first n_ctx words are only places for the learned ones."""
        words = self.context or " ".join(["X"] * self.n_ctx)
        return f"{words} {classname.replace('_', ' ')}."


class Prompts(nn.Module):
    """Hold the learned tokens, under the names that MaPLe's checkpoints use.

    text_width, image_width: of the two towers. start: [n_ctx, text_width], the first learned words;
    by default random. seed: decides everything that starts at random.
    """

    def __init__(
        self,
        config: PromptConfig,
        text_width: int,
        image_width: int,
        *,
        start: Tensor | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.config = config
        n, depth = config.n_ctx, config.depth
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if config.text_depth:
                self.ctx = _random(n, text_width) if start is None else nn.Parameter(start.float().clone())
            if config.method is Method.MAPLE and depth:
                self.proj = nn.Linear(text_width, image_width)
                deep = range(depth - 1)
                self.compound_prompts_text = nn.ParameterList(_random(n, text_width) for _ in deep)
                one = nn.Linear(text_width, image_width)
                self.compound_prompt_projections = nn.ModuleList(copy.deepcopy(one) for _ in deep)
            if config.method is Method.VPT:
                self.image = nn.ParameterList(_random(n, image_width) for _ in range(depth))
        self.requires_grad_(False)  # training turns it on

    def text_prompts(self) -> list[Tensor]:
        """Return the learned words [n_ctx, text width], first to last depth."""
        if not self.config.text_depth:
            return []
        deep = self.compound_prompts_text if self.config.method is Method.MAPLE else ()
        return [self.ctx, *deep]

    def image_prompts(self) -> list[Tensor]:
        """Return the learned tokens [n_ctx, image width], first to last depth."""
        if not self.config.image_depth:
            return []
        if self.config.method is Method.VPT:
            return list(self.image)
        couplings = [self.proj, *self.compound_prompt_projections]
        return [linear(p) for linear, p in zip(couplings, self.text_prompts(), strict=True)]


def _random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).normal_(std=SPREAD))


class PromptedTower(OpenClipTower):
    """Open an image tower that gets learned tokens after its patches."""

    def __init__(self, tower: OpenClipTower, prompts: Prompts):
        super().__init__(tower.visual)
        self.prompts, self.n_ctx = prompts, prompts.config.n_ctx
        self.token_kind = np.append(self.token_kind, ["prompt"] * self.n_ctx)

    def embed(self, images: Tensor) -> Tensor:
        tokens = super().embed(images)
        # after the positional embedding, before ln_pre: which norms each token by itself
        return self._append(tokens, self.visual.ln_pre(self.prompts.image_prompts()[0].to(tokens.dtype)))

    def run(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        prompts = self.prompts.image_prompts()
        for block in range(start, stop):
            tokens = super().run(self.enter(tokens, block, prompts), block, block + 1)
        return tokens

    def enter(self, tokens: Tensor, block: int, prompts: Sequence[Tensor] | None = None) -> Tensor:
        prompts = self.prompts.image_prompts() if prompts is None else prompts
        if 0 < block < len(prompts):
            return self._append(tokens[:, : -self.n_ctx], prompts[block])
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        return super().pool(tokens[:, : -self.n_ctx])

    def _append(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        return torch.cat([tokens, prompt.to(tokens.dtype).expand(len(tokens), -1, -1)], 1)


class AdaptedBackbone(Adapted):
    """Be a backbone with learned tokens, which shares all weights of the plain one.

    `encode_text` stays the plain text tower.
    Raises PatchSAEError for towers that cannot take the prompts (see `fitting_text_tower`).
    """

    def __init__(self, plain: Backbone, prompts: Prompts):
        config = prompts.config
        text = fitting_text_tower(plain, config)
        super().__init__(
            plain.model,
            plain.block,
            name=f"{plain.name}+{config.method}",
            tokenizer=lambda: plain.tokenize,
            config={"clip": plain._config, "prompts": asdict(config)},
            tower=PromptedTower(plain.tower, prompts) if config.image_depth else plain.tower,
        )
        self.prompts, self.text_tower = prompts.to(self.device).eval(), text
        self._plain = (plain,)

    @property
    def learned(self) -> Prompts:
        """Return the learned tokens."""
        return self.prompts

    @property
    def what(self) -> PromptConfig:
        """Return which tokens were learned."""
        return self.prompts.config

    def class_embeddings(self, texts: PackedTexts) -> Tensor:
        return self.text_tower.encode(texts, self.prompts.text_prompts())


def adapt(plain: Backbone, config: PromptConfig, seed: int = 0) -> AdaptedBackbone:
    """Return a backbone with prompts as they are before training.

    Raises PatchSAEError as `fitting_text_tower`, and if the context has fewer tokens than n_ctx.
    """
    text, start = fitting_text_tower(plain, config), None
    if text and config.context:
        ids = plain.tokenize(config.context)
        words = int(text.ends(ids)) - 1
        if words < config.n_ctx:
            raise PatchSAEError(
                f"context='{config.context}' has {words} tokens, fewer than n_ctx={config.n_ctx}: give "
                "more words, or context='' to start at random."
            )
        start = text.embed(ids)[0, 1 : 1 + config.n_ctx].float().cpu()
    return AdaptedBackbone(plain, blank_prompts(plain, config, start, seed))


def blank_prompts(
    plain: Backbone, config: PromptConfig, start: Tensor | None = None, seed: int = 0
) -> Prompts:
    """Return prompts of the widths that a backbone's towers have. Raises as `fitting_text_tower`."""
    text = fitting_text_tower(plain, config)
    return Prompts(config, text.width if text else 0, plain.d_model, start=start, seed=seed)


def fitting_text_tower(plain: Backbone, config: PromptConfig) -> TextTower | None:
    """Return the opened text tower, or None where no word is learned.

    Raises PatchSAEError for a backbone that has prompts already, a depth that exceeds either tower's
    blocks, an image tower that is not open_clip's VisionTransformer, a text tower that is not CLIP's,
    and more learned words than its context holds.
    """
    if isinstance(plain, Adapted):
        raise PatchSAEError(f"{plain.name} is adapted already: adapt the plain backbone.")
    if config.image_depth and type(plain.tower) is not OpenClipTower:
        raise PatchSAEError(
            f"The image tower of {plain.name} is not open_clip's own VisionTransformer, so tokens cannot "
            "be learned in it: choose a CLIP such as ViT-B-16-quickgelu, or method=coop."
        )
    text = TextTower(plain) if config.text_depth else None
    for name, depth, blocks in (
        ("image", config.image_depth, plain.n_blocks),
        ("text", config.text_depth, len(text.blocks) if text else 0),
    ):
        if depth > blocks:
            raise PatchSAEError(
                f"depth={config.depth} is more than the {blocks} blocks of {plain.name}'s {name} tower: "
                "use a smaller one."
            )
    if text and config.n_ctx > text.context - 3:  # start, a word, end
        raise PatchSAEError(
            f"n_ctx={config.n_ctx} leaves no room for a class name in the {text.context} tokens of "
            f"{plain.name}: use fewer."
        )
    return text
