"""A whole masking sweep against rerunning the model for every mask, the released scheme.

Full-size random ViT-B/16 with a 49,152-latent SAE of realistic sparsity on its tokens: ten sizes, on and
off, three rankings. The released way is written afresh from facts.md §4.8: for every mask the whole model
runs again with a hook that encodes densely, masks, decodes. All its masks cost the same, so some of them
are timed, and its figure is images · masks per second.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import torch
from measure import Row, row, say
from torch import Tensor
from workload import firing_probabilities

from patchsae.clip.backbone import Backbone, load_backbone, zero_shot_logits
from patchsae.masking.masked_tokens import Mode
from patchsae.masking.rankings import CLASS, DATASET, Ranking
from patchsae.masking.sweep import Masker, MaskingConfig
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, SAEConfig

MODEL, BLOCK, EXPANSION, L0 = "ViT-B-16-quickgelu", 11, 64, 146
CLASSES, BATCH = 1000, 16
IMAGES, ROUNDS, TIMED_MASKS = (
    128,
    4,
    2,
)  # of the released way's masks, TIMED_MASKS per round on BATCH images
GOAL = 20.0
RELEASED, PLAIN = "the whole model for every mask", "one plain forward pass"


@torch.no_grad()
def realistic_sae(x: Tensor, seed: int = 0) -> SAE:
    """Make an SAE whose latents fire on tokens x [N, d] as those of a trained one: about L0 per token."""
    sae = SAE(SAEConfig(x.shape[1], EXPANSION), seed)
    sae.b_dec.copy_(x.mean(0))
    draw = torch.Generator().manual_seed(seed)
    probability = firing_probabilities(sae.d_sae, L0, draw)
    z = sae.pre_activations(x)
    threshold = z.mean(0) + z.std(0) * torch.special.ndtri(1 - probability).float()
    sae.b_enc.sub_(threshold)
    return sae


def random_rankings(d_sae: int) -> list[Ranking]:
    """Return three rankings: one per class, two for all images."""
    rng = np.random.default_rng(0)
    per_class = rng.permuted(np.tile(np.arange(d_sae, dtype=np.int32), (CLASSES, 1)), axis=1)
    rows = {CLASS: per_class.astype(np.int64), DATASET: per_class[:1], "random 0": per_class[1:2]}
    return [Ranking(name, order.astype(np.int64), name) for name, order in rows.items()]


@torch.no_grad()
def rerun(sae: SAE, backbone: Backbone, pixels: Tensor, on: Tensor) -> Tensor:
    """Embed images with the model run whole; on [B, S] are the latents kept."""

    def hook(module, inputs, output):
        return sae.decode(sae.encode(output) * on[:, None])

    block = backbone.model.visual.transformer.resblocks[backbone.block - 1]
    handle = block.register_forward_hook(hook)
    try:
        return backbone.model.encode_image(pixels)
    finally:
        handle.remove()


def run() -> list[Row]:
    """Time both in turns, and a plain forward pass as the limit."""
    torch.manual_seed(0)
    backbone = load_backbone(MODEL, block=BLOCK)
    size = backbone.image_size
    images = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)
    labels = torch.arange(IMAGES) % CLASSES
    text = torch.nn.functional.normalize(torch.randn(CLASSES, backbone.embed_dim), dim=-1)
    with torch.no_grad():
        sample = backbone.residual(backbone.normalize(images[:8])).flatten(0, 1)
    sae = realistic_sae(sample)
    l0 = (sae.encode(sample) > 0).sum(-1).float().mean().item()
    ranked = random_rankings(sae.d_sae)
    masker = Masker(sae, backbone, text, ranked, MaskingConfig(mode=Mode.REPLACE))
    masks = len(ranked) * 2 * len(masker.sizes)
    say(f"masking, {sae.d_sae:,} latents, L0 {l0:.0f}, {masks} masks of {IMAGES} images")
    _agree(masker, sae, backbone, images[:2], labels[:2], text, ranked)
    ours, theirs, plain = [], [], []
    per_round = IMAGES // ROUNDS
    for turn in range(ROUNDS):
        mine = slice(turn * per_round, (turn + 1) * per_round)
        started = time.perf_counter()
        for first in range(mine.start, mine.stop, BATCH):
            masker.logits(images[first : first + BATCH], labels[first : first + BATCH])
        ours.append((time.perf_counter() - started) / per_round)
        batch = images[mine][:BATCH]
        pixels = backbone.normalize(batch)
        started = time.perf_counter()
        with torch.no_grad():
            backbone.model.encode_image(pixels)
        plain.append((time.perf_counter() - started) / len(batch))
        started = time.perf_counter()
        for number in range(TIMED_MASKS):
            on = torch.zeros(len(batch), sae.d_sae)
            on[:, : 10 ** (1 + number)] = 1
            zero_shot_logits(backbone, rerun(sae, backbone, pixels, on), text)
        theirs.append((time.perf_counter() - started) / len(batch) / TIMED_MASKS)
    own, other, limit = (median(times) for times in (ours, theirs, plain))
    say(
        f"  {1000 * own:.0f} ms an image for {masks} masks, {1000 * other:.0f} ms for one of the released "
        f"scheme, {1000 * limit:.0f} ms for a plain forward pass"
    )
    title = f"masking sweep, {masks} masks, {sae.d_sae:,} latents"
    ratios = [masks * b / a for a, b in zip(ours, theirs, strict=True)]
    rows = [row(title, masks / own, 1 / other, RELEASED, "images · masks/s", ratios, GOAL)]
    ratios = [b / a for a, b in zip(ours, plain, strict=True)]
    rows.append(row(f"{title}, speed limit", 1 / own, 1 / limit, PLAIN, "images/s", ratios, None))
    return rows


def _agree(masker, sae, backbone, images, labels, text, ranked) -> None:
    """Refuse to compare ways that do not give the same logits."""
    _, masked = masker.logits(images, labels)
    pixels = backbone.normalize(images)
    for g, ranking in enumerate(ranked):
        for j in (2, 5, len(masker.sizes) - 1):
            order = torch.from_numpy(ranking.order)[labels if len(ranking.order) > 1 else labels * 0]
            on = torch.zeros(len(images), sae.d_sae).scatter_(1, order[:, : masker.sizes[j]], 1.0)
            for switch, mask in enumerate((on, 1 - on)):
                expected = zero_shot_logits(backbone, rerun(sae, backbone, pixels, mask), text)
                gap = (masked[:, g, switch, j] - expected).abs().max().item()
                if gap > 1e-4:
                    raise PatchSAEError(f"logits differ by {gap:.1e} from those of the whole model.")
