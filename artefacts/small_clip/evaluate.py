"""Zero-shot accuracy of the small CLIP on held-out single-object scenes."""

from __future__ import annotations

import sys

import numpy as np
import torch

from patchbook.scenes.catalogue import concepts, trained_mask
from patchbook.scenes.pictograms import STYLE_WORDS, SceneConfig, render
from patchbook.scenes.sprites import STYLES

SINGLE = SceneConfig(objects=(1.0,), word_rate=0.0)
SEED = 2_000  # test scenes of the card; the datasets of the book use other seeds


@torch.no_grad()
def concept_text(model, tokenizer, style: int) -> torch.Tensor:
    """Embed the prompt of every concept in one style's words: float32 [n_concepts, e], unit rows."""
    prompts = [f"a {STYLE_WORDS[style]} of a {concept.name}" for concept in concepts()]
    rows = [
        model.encode_text(tokenizer(prompts[i : i + 128]), normalize=True)
        for i in range(0, len(prompts), 128)
    ]
    return torch.cat(rows).float()


@torch.no_grad()
def image_embeddings(model, images: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Embed uint8 images [N, 3, S, S]: float32 [N, e], unit rows."""
    rows = []
    for part in images.split(64):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.device.type == "cuda"):
            rows.append(model.encode_image((part.float() / 255 - mean) / std, normalize=True).float())
    return torch.cat(rows)


def pairs(kind: str, style: int, n: int) -> np.ndarray:
    """List n concepts for a style, cycling over all pairs of a kind: 'trained', 'untrained', 'novel'."""
    trained = trained_mask()
    novel = ~trained.any(0)
    pool = {"trained": trained[style], "untrained": ~trained[style] & ~novel, "novel": novel}[kind]
    return np.resize(np.flatnonzero(pool), n)


def accuracy(
    model,
    tokenizer,
    mean: float,
    std: float,
    n: int = 2048,
    kinds=("trained",),
    split: str = "test",
) -> dict:
    """Measure top-1 per domain on n single-object scenes.

    Returns
    -------
    {style: {kind: {"concept", "subgroup", "n", "chance", "majority"}}}; 'concept' is over all trained
    concepts (for 'novel': over the novel ones), 'subgroup' over Unicode subgroups of the best concept.
    """
    device = next(model.parameters()).device
    trained_concepts = np.flatnonzero(trained_mask().any(0))
    names = [concept.subgroup for concept in concepts()]
    subgroup = np.unique(names, return_inverse=True)[1]
    result: dict = {}
    for style, domain in enumerate(STYLES):
        text = concept_text(model, tokenizer, style).to(device)
        for kind in kinds:
            labels = pairs(kind, style, n)
            among = np.unique(labels) if kind == "novel" else trained_concepts
            where = np.arange(n) + 100_000 * style
            parts = [
                render(
                    split, SEED, where[i : i + 128], SINGLE,
                    (labels[i : i + 128], np.full(len(labels[i : i + 128]), style)), device,
                ).images
                for i in range(0, n, 128)
            ]  # fmt: skip
            embeddings = torch.cat([image_embeddings(model, part, mean, std) for part in parts])
            best = among[(embeddings @ text[among].T).argmax(1).cpu().numpy()]
            shares = np.bincount(subgroup[among]) / len(among)
            result.setdefault(domain, {})[kind] = {
                "concept": float((best == labels).mean()),
                "subgroup": float((subgroup[best] == subgroup[labels]).mean()),
                "n": n,
                "chance": 1 / len(among),
                "majority": float(shares.max()),
            }
    return result


def summary(result: dict) -> str:
    """One line a person can read while the model trains."""
    parts = [
        f"{domain} {kind} {row['concept']:.3f}/{row['subgroup']:.3f}"
        for domain, kinds in result.items()
        for kind, row in kinds.items()
    ]
    return " · ".join(parts)


if __name__ == "__main__":
    from train import build, load_weights

    clip, tokens, config = build()
    load_weights(clip, sys.argv[1])
    print(summary(accuracy(clip.eval(), tokens, config["mean"], config["std"], int(sys.argv[2]))))
