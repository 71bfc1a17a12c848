"""What a scene shows, in words: the captions that the small CLIP is trained on."""

from __future__ import annotations

import numpy as np

from patchbook.scenes.catalogue import concepts
from patchbook.scenes.pictograms import STYLE_WORDS, TINTS, Content, Scenes, uniforms


def captions(key: str, indices: np.ndarray, scenes: Scenes | Content) -> list[str]:
    """Describe scenes in words, varying the wording by (key, index).

    Names, the Unicode subgroup, the style of each object and a written word appear at random, so that
    text and image share more than a class label.
    """
    u = uniforms(f"{key}/captions", np.asarray(indices), 4)
    names = [concept.name for concept in concepts()]
    subgroups = [concept.subgroup.replace("-", " ") for concept in concepts()]
    texts = []
    for row, (form, main_only, word_named, tint_named) in enumerate(u):
        colours = [f"{tuple(TINTS)[t]} " if t >= 0 and tint_named < 0.7 else "" for t in scenes.tints[row]]
        shown = [
            (int(c), int(s), colour)
            for c, s, colour in zip(scenes.concepts[row], scenes.styles[row], colours, strict=True)
            if c >= 0
        ]
        if main_only < 0.1:
            shown = shown[:1]
        if form < 0.45:
            text = " and ".join(f"a {STYLE_WORDS[s]} of a {t}{names[c]}" for c, s, t in shown)
        elif form < 0.65:
            text = "a picture of " + " and ".join(f"a {t}{names[c]}" for c, _, t in shown)
        elif form < 0.9:
            text = ", ".join(f"{t}{names[c]}" for c, _, t in shown)
        else:
            text = ", ".join(f"{subgroups[c]}: {t}{names[c]}" for c, _, t in shown[:2])
        if scenes.word[row] >= 0 and word_named < 0.8:
            text += f' with the word "{names[scenes.word[row]]}"'
        texts.append(text)
    return texts
