"""Words for what the scenes show, and scenes of which it is known: what the explorer names latents by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from patchbook.chapters.factors import Factor, levels, plan_scenes, shown
from patchbook.scenes.catalogue import concepts
from patchbook.scenes.pictograms import Layout, paint
from patchsae.explorer.names import Vocabulary
from patchsae.images.sets import Batch, ImageSet, short_hash

# of what the captions speak that the small CLIP was trained on; none tells place, size or ground
TEXTS = {
    Factor.OBJECT: "a picture of a {}",
    Factor.STYLE: "a {} of a thing",
    Factor.COLOUR: "a picture of a {} thing",
    Factor.WORD: 'a picture with the word "{}"',
}
KIND = "{}: a thing"  # captions begin so with what kind of thing there is
ANY = "any word"


class KnownScenes(ImageSet):
    """Scenes of the test split by a plan, all of one class: their content is asked of `shown`."""

    name, split, classnames = "known scenes", "test", ("scene",)

    def __init__(self, plan: Layout, size: int, device: str | torch.device = "cpu"):
        self.plan, self.size, self.device = plan, size, device
        self.labels = np.zeros(len(plan.concepts), np.int64)

    def load(self, indices: Sequence[int]) -> Batch:
        indices = np.asarray(indices, dtype=np.int64)
        part = Layout(*(field[indices] for field in self.plan))
        images = paint(part, self.split, self.size, self.device).images
        return Batch(images, torch.from_numpy(self.labels[indices]), torch.from_numpy(indices))

    def fingerprint(self) -> str:
        return short_hash([self.name, self.size, *(np.asarray(field).tolist() for field in self.plan)])


def scene_vocabulary(
    scenes: int, size: int, seed: int = 0, device: str | torch.device = "cpu"
) -> Vocabulary:
    """Return what captions can say as words, and test scenes that are known to show it or not."""
    plan = plan_scenes(scenes, f"names/{seed}")
    known, shows = levels(), shown(plan)
    words, texts, columns = [], [], []
    for column, (name, number) in enumerate(zip(known.names, known.factor, strict=True)):
        factor = tuple(Factor)[number]
        if factor in TEXTS and name != ANY:
            words.append(f'the word "{name}"' if factor is Factor.WORD else name)
            texts.append(TEXTS[factor].format(name))
            columns.append(shows[:, column])
    objects = shows[:, known.factor == list(Factor).index(Factor.OBJECT)]
    of = np.array([concept.subgroup.replace("-", " ") for concept in concepts()])
    for kind in np.unique(of):
        words.append(f"{kind} (kind)")
        texts.append(KIND.format(kind))
        columns.append(objects[:, of == kind].any(1))
    images = KnownScenes(plan, size, device)
    return Vocabulary(tuple(words), tuple(texts), images, np.stack(columns, 1))
