"""What all adapted models have in common: the plain CLIP they came from, and classes in their own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchsae.adaptation.prompt_text import PackedTexts, TextTower
from patchsae.clip.backbone import Backbone, zero_shot_weights


class Learned(Protocol):
    """What a configuration says of prompts."""

    template: str
    """Prompt that plain CLIP reads where no word is learned."""

    def text(self, classname: str) -> str:
        """Return the prompt of a class, with places for the learned words where there are any."""


class Adapted(Backbone):
    """Be a backbone in which something was learned for a data set.

    `residual`, `finish`, `fingerprint` and the rest are a Backbone's; `class_weights` replaces
    `zero_shot_weights`.
    """

    what: Learned
    """The configuration of what was learned."""
    learned: nn.Module
    """What was learned, under the names that files give it."""
    text_tower: TextTower | None
    """The opened text tower, None where it is CLIP's own and reads the data set's template."""
    _plain: tuple[Backbone]  # in a tuple, so that its weights do not count twice

    @property
    def plain(self) -> Backbone:
        """Return the backbone before adaptation, cut at the same block."""
        return self._plain[0].at_block(self.block)

    @property
    def tokens_of(self) -> str:
        """Name whose tokens `residual` returns: plain CLIP's where nothing in its image tower changed."""
        plain = self.plain
        return plain.fingerprint() if self.tower is plain.tower else self.fingerprint()

    def class_embeddings(self, texts: PackedTexts) -> Tensor:
        """Return the embeddings [C, e], not normalised, of `pack_classes`."""
        return self.text_tower.encode(texts, ())

    def pack_classes(self, classnames: Sequence[str]) -> PackedTexts:
        """Pack the prompts of classes, for `class_embeddings`."""
        return self.text_tower.pack([self.what.text(name) for name in classnames])

    @torch.no_grad()
    def class_weights(self, classnames: Sequence[str]) -> Tensor:
        """Return one unit text vector per class, [n_classes, e] float32.

        By the learned words or text tower where the method learns any, by the configuration's template and
        CLIP's own text tower where it does not. Equal names stay separate rows.
        Raises PatchSAEError for an empty list.
        """
        if self.text_tower is None or isinstance(classnames, str) or not len(classnames):
            return zero_shot_weights(self, classnames, self.what.template)
        return F.normalize(self.class_embeddings(self.pack_classes(classnames)).float(), dim=-1)

    def settle(self) -> None:
        """End training: what was learned changes no more."""
        self.learned.requires_grad_(False)
