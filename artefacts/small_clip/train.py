"""Train the small CLIP of the book on captioned pictogram scenes (`make clip`).

The model is open_clip's own; only the order of the arithmetic differs while training: attention written
out (2.6x faster in bfloat16 on a CPU than the fused kernel's backward) and captions cropped to their
length (exact, because the text tower is causal). A test compares both forwards.

Most images are seen at 56 px (7x7 patches), which is cheaper, the last at 112 px (14x14): "The small CLIP"
in book/data_card.md.
The run can be stopped and started again at any time; it goes on from its last checkpoint. Under torchrun
every process draws a batch of its own and gradients are averaged, so N processes take N times the batch.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

import patchsae.runs.compat  # noqa: F401  (before open_clip)

# isort: split
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer

from patchbook.scenes.captions import captions
from patchbook.scenes.catalogue import concepts, trained_mask
from patchbook.scenes.pictograms import Layout, SceneConfig, content, layout, paint, render
from patchsae.runs.processes import Processes, join, local_device
from patchsae.runs.stage import project_root, write_atomic, write_json

sys.path.insert(0, str(Path(__file__).parent))
from evaluate import accuracy, summary

HERE = Path(__file__).parent
SPEAKING = 11  # block after which patches are read, where the book's autoencoders stand
SAYING, SILENT = 0.12, 0.3  # guessed shares of patches that show one object alone, and that show none


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one image size."""

    images: int
    """Images seen in this phase."""
    size: int
    """Side of the rendered scene, px."""
    keep: float
    """Share of patches that are not dropped."""
    objects: tuple[float, ...]
    """Probability of 1, 2, 3, 4 objects in a scene."""
    scale: tuple[float, float] = SceneConfig.scale
    """Side of a single object as a share of the image; above 1 it is cropped."""
    tint: float = 0.0
    """Share of objects drawn in shades of one colour, which their captions may name."""
    batch: int | None = None
    """Images per step, if not the recipe's."""
    mosaics: int = 0
    """Images per step that are put together from four scenes of half their side, for the patches alone."""
    mosaic_objects: tuple[float, ...] = (0.7, 0.3, 0.0, 0.0)
    """Probability of 1, 2, 3, 4 objects in a quarter of a mosaic."""
    mosaic_keep: float = 0.6
    """Share of a mosaic's patches that are not dropped."""
    mosaic_scale: tuple[float, float] = (0.55, 1.2)
    """Side of a single object as a share of its quarter of the mosaic."""
    patches: tuple[float, float] = (0.0, 0.0)
    """Weight of the loss that makes patches speak: of whole scenes, of mosaics."""
    unsaid: float = 0.0
    """Weight of the share of the patches' variance that is not in what they say, and of its crowding."""
    restart: float | None = None
    """Step size that a new cycle begins with here, in units of the recipe's; None goes on as before."""
    decay_from: float = 0.4
    """Share of that cycle after which the step size falls linearly to 0; 1 keeps it."""


# At 56 px a patch covers twice the share of an object that it covers at 112 px; objects that are partly
# outside show the patches what they will see later.
ZOOMED = (0.5, 1.5)
EASY, MIXED, HARD = (0.85, 0.15, 0.0, 0.0), (0.6, 0.2, 0.12, 0.08), (0.45, 0.25, 0.18, 0.12)
SPEAK = Phase(
    80_000, 112, 0.5, MIXED, tint=0.2, batch=64, mosaics=32, patches=(0.5, 1.0), restart=0.8
)  # fmt: skip
# Weights 0, 1 and 4 of what is unsaid, 90 steps each on the model of SPEAK, without a loss of crowding: the
# concepts' share of object patches' variance .42, .46, .53; largest principal direction .46, .14, .10.
# After 620 steps at weight 4 the share was .67 and that direction .55, so crowding became a loss, too.
PLAIN = replace(SPEAK, images=140_800, unsaid=4.0)
# What a GPU can add, tried in eight minutes of an H200 and not shipped: 25 times as many images of the
# last kind. The loss of tiles falls from 1.36 to .34, what is unsaid from .145 to .081; of the pairs
# never shown 74 % are named, not 41 %; some latent tells 99 % of concepts, not 56 %. But so do the
# stream's own dimensions (92 %, not 33 %) and an untrained SAE (73 %, not 12 %): little is left for an
# autoencoder to do.
LONG = replace(PLAIN, images=1_529_856, batch=1_024, mosaics=256, decay_from=1.0)
LONGER = replace(PLAIN, images=1_990_656, batch=2_048, mosaics=512, decay_from=0.1)
CPU = (
    Phase(160_000, 56, 1.0, EASY),
    Phase(155_000, 56, 1.0, MIXED),
    Phase(135_000, 56, 1.0, MIXED, ZOOMED),
    Phase(30_000, 112, 0.5, MIXED),
    Phase(30_000, 112, 0.5, HARD),
    SPEAK,
    PLAIN,
)
RECIPES = {
    "gpu": (*CPU, LONG, LONGER),
    "cpu": CPU,
    "tiny": (
        Phase(64, 56, 1.0, EASY),
        Phase(32, 112, 0.5, HARD),
        replace(PLAIN, images=32, batch=16, mosaics=4),
    ),
}


@dataclass(frozen=True)
class Recipe:
    """How the small CLIP is trained."""

    seed: int = 0
    """Seed of weights, scenes and captions."""
    phases: tuple[Phase, ...] = RECIPES["cpu"]
    """What is seen, in order."""
    batch: int = 256
    """Images per step."""
    muon_lr: float = 8e-3
    """Step size for the matrices of the blocks, in units of AdamW's."""
    adamw_lr: float = 2e-3
    """Step size for everything else."""
    weight_decay: float = 0.02
    """Decoupled weight decay of matrices."""
    concept_head: float = 1.0
    """Weight of the auxiliary concept classifier, which gets the image tower moving."""
    warmup: float = 0.01
    """Share of the work with rising step size."""
    decay_from: float = 0.45
    """Share of the work after which the step size falls linearly to 0."""


def build() -> tuple[CLIP, SimpleTokenizer, dict]:
    """Make the model and tokenizer that open_clip_config.json describes; return them and mean, std."""
    config = json.loads((HERE / "open_clip_config.json").read_text())
    clip = CLIP(**config["model_cfg"])
    tokenizer = SimpleTokenizer(
        bpe_path=str(HERE / "bpe_simple_vocab.txt.gz"), context_length=clip.context_length
    )
    pre = config["preprocess_cfg"]
    return clip, tokenizer, {"mean": pre["mean"][0], "std": pre["std"][0]}


def load_weights(clip: CLIP, path: str | Path) -> None:
    """Read fp16 safetensors into the model."""
    clip.load_state_dict({k: v.float() for k, v in load_file(path).items()})


def attend(attention: nn.MultiheadAttention, x: torch.Tensor, mask: torch.Tensor | None):
    batch, tokens, width = x.shape
    heads = attention.num_heads
    qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    if x.is_cuda:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=mask is not None)
    else:
        scores = (q * (width // heads) ** -0.5) @ k.transpose(-1, -2)  # [B, H, T, T]
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(-1).to(v.dtype) @ v
    mixed = mixed.transpose(1, 2).reshape(batch, tokens, width)
    return F.linear(mixed, attention.out_proj.weight, attention.out_proj.bias)


def run_blocks(blocks, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    for block in blocks:
        x = x + attend(block.attn, block.ln_1(x), mask)
        x = x + block.mlp(block.ln_2(x))
    return x


class Image(NamedTuple):
    """What the image tower says of a batch."""

    embedding: torch.Tensor  # [B, e], what encode_image gives
    patches: torch.Tensor  # [B, P, e], the head's reading of each patch after SPEAKING blocks
    stream: torch.Tensor  # [B, P, width], those patches before the head reads them


def image_tower(clip: CLIP, images: torch.Tensor, keep: torch.Tensor | None = None) -> Image:
    """Compute encode_image at any size; `keep` [B, k] lists the patches that are not dropped."""
    visual = clip.visual
    patches = visual.conv1(images)
    side = patches.shape[-1]
    x = patches.flatten(2).transpose(1, 2)
    cls, grid = visual.positional_embedding[:1], visual.positional_embedding[1:]
    full = int(len(grid) ** 0.5)
    if side != full:
        grid = grid.T.view(1, -1, full, full)
        grid = F.interpolate(grid, size=(side, side), mode="bilinear", antialias=True)
        grid = grid.flatten(2).squeeze(0).T
    x = x + grid
    if keep is not None:
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
    first = (visual.class_embedding + cls).expand(len(x), 1, -1).to(x.dtype)
    x = visual.ln_pre(torch.cat([first, x], 1))
    blocks = visual.transformer.resblocks
    x = run_blocks(blocks[:SPEAKING], x)
    stream = x[:, 1:]
    patches = visual.ln_post(stream) @ visual.proj
    x = run_blocks(blocks[SPEAKING:], x)
    return Image(visual.ln_post(x[:, 0]) @ visual.proj, patches, stream)


def text_tower(clip: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Compute encode_text in parts of similar length, each cropped to its longest caption."""
    end = tokens.argmax(-1)
    order = end.argsort()
    rows = []
    parts = 1 if tokens.is_cuda else min(4, len(order))  # a GPU waits for launches rather than for padding
    for part in order.tensor_split(parts):
        length = int(end[part].max()) + 1
        x = clip.token_embedding(tokens[part, :length]) + clip.positional_embedding[:length]
        x = run_blocks(clip.transformer.resblocks, x, clip.attn_mask[:length, :length])
        x = clip.ln_final(x)[torch.arange(len(x)), end[part]]
        rows.append(x @ clip.text_projection)
    return torch.cat(rows)[order.argsort()]


def smooth_positions(clip: CLIP) -> None:
    """Start the 14x14 position embedding as an enlarged 7x7 one, which is what training sees first."""
    table = clip.visual.positional_embedding.data
    side = int((len(table) - 1) ** 0.5)
    coarse = table[1:].T.view(1, -1, side, side)[..., : side // 2, : side // 2]
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    table[1:] = fine.flatten(2).squeeze(0).T


class Said(NamedTuple):
    """What patches were found to say."""

    loss: torch.Tensor
    share: torch.Tensor  # [B, P, SLOTS + 1], of the caption's nouns and, last, nothing; no gradient


def patch_loss(
    patches: torch.Tensor, names: torch.Tensor, nothing: torch.Tensor, shown: torch.Tensor
) -> Said:
    """Make patches speak: a caption's nouns are each said by some patches, other nouns by none.

    Token-wise alignment of image and text as in FILIP and PACL, with what a caption says and nothing else:
    no mask, no place. Of an image's patches (1) those most like a noun of its caption say that noun, (2)
    the least like any of its nouns say "nothing", (3) none says a noun of other captions (the partial
    labels of weakly supervised segmentation). How many patches (1) and (2) are is a fixed guess.

    Parameters
    ----------
    patches : unit rows [B, P, e]
    names : unit rows [C, e], the text of every noun of the batch
    nothing : [e], the direction of what shows no noun, times the scale
    shown : [B, SLOTS], rows of `names`, -1 where there is no more object
    """
    batch, count = patches.shape[:2]
    logits = torch.cat([patches @ names.T, patches @ nothing[:, None]], -1).float()  # [B, P, C + 1]
    said = logits.log_softmax(-1)
    present = shown >= 0
    number = present.sum(1)  # [B]
    own = said.gather(2, shown.clamp(min=0)[:, None].expand(-1, count, -1))  # [B, P, SLOTS]
    own = own.masked_fill(~present[:, None], -1e4)
    silent = said[..., -1]  # [B, P]
    nearest = own.sort(1, descending=True).values
    # one object covers a sixth of its image or so, four of them a sixteenth each
    share = (count * SAYING / number.sqrt()).round().clamp(min=1)
    first = torch.arange(count, device=own.device)[None] < share[:, None]  # [B, P]
    speak = -(nearest * first[..., None]).sum(1) / share[:, None]
    speak = (speak * present).sum(1) / number
    likeness = own.max(-1).values - silent
    least = likeness.topk(max(1, round(count * SILENT)), largest=False).indices
    hush = -silent.gather(1, least).mean(1)
    allowed = torch.cat([own, silent[..., None]], -1)
    loss = (speak + hush - allowed.logsumexp(-1).mean(1)).mean()
    return Said(loss, allowed.detach().softmax(-1))


def unsaid(stream: torch.Tensor, meaning: torch.Tensor, silent: torch.Tensor) -> torch.Tensor:
    """Return the share of the patches' variance that is not in what they say.

    What is left over is style, place and light, which CLIP's loss never asks of a patch and an
    autoencoder of patches would spend its latents on. Two shares, averaged: of patches that say a noun,
    what no linear map of the noun's text gives back; and of patches that say nothing, all of it, beside
    what the map gives back of the first. That some patches speak and some do not counts in neither, or
    patches would say this louder and nothing else. The map is the least squares one of this batch, so it
    needs no gradient of its own.

    Parameters
    ----------
    stream : [N, width], patches after SPEAKING blocks
    meaning : [N, e], the texts of the nouns that each patch says, mixed by how much it says them
    silent : [N], how much a patch says nothing, in [0, 1]
    """
    x = stream.float()

    def centred(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = (weight / weight.sum())[:, None]
        return (values - (weight * values).sum(0)) * weight.sqrt()

    spoken, quiet = centred(x, 1 - silent), centred(x, silent).square().sum()
    m = centred(meaning.float(), 1 - silent)
    with torch.no_grad():
        gram = (m.T @ m).double()
        gram.diagonal().add_(1e-3 * gram.diagonal().mean())
        back = torch.linalg.solve(gram, (m.T @ spoken).double()).float()
    rest, whole = (spoken - m @ back).square().sum(), spoken.square().sum()
    return (rest / whole + quiet / (quiet + whole - rest)) / 2


def crowded(stream: torch.Tensor) -> torch.Tensor:
    """Return how much of the patches' variance lies in few directions: ‖C‖ / tr C of their covariance.

    1 for one direction, 1 / √width where all have the same. Without it the cheapest way to leave little
    unsaid is one loud direction, such as that something is said.
    """
    x = stream.float() - stream.float().mean(0)
    covariance = x.T @ x
    return covariance.square().sum().sqrt() / covariance.diagonal().sum()


class Head(nn.Linear):
    """What is trained beside CLIP and thrown away: a concept classifier, and how patches say nothing."""

    def __init__(self, width: int, classes: int):
        super().__init__(width, classes)
        self.nothing = nn.Parameter(torch.randn(width) / width**0.5)
        self.scale = nn.Parameter(torch.tensor(np.log(20.0), dtype=torch.float32))


class Batch(NamedTuple):
    """One step's pictures and texts, on the model's device."""

    images: torch.Tensor  # [B, 3, S, S], normalised
    keep: torch.Tensor | None  # [B, k] patches that are not dropped
    shown: torch.Tensor  # [B, SLOTS] concepts, -1 where there is no more object
    mosaics: torch.Tensor | None  # [M, 3, S, S]
    mosaic_keep: torch.Tensor | None  # [M, 4 k], tile by tile
    tiles: torch.Tensor | None  # [4 M, SLOTS] concepts of each tile
    texts: torch.Tensor  # [B + C, context]: captions, then the nouns of everything shown
    nouns: torch.Tensor  # [C] concepts


def losses(clip: CLIP, head: Head, batch: Batch, weights: tuple[float, float]) -> dict[str, torch.Tensor]:
    """Return the contrastive loss, the concept head's loss and its accuracy, and the patches' losses."""
    with torch.autocast(batch.images.device.type, torch.bfloat16):
        seen = image_tower(clip, batch.images, batch.keep)
        text = text_tower(clip, batch.texts)
    image, text = F.normalize(seen.embedding.float(), dim=-1), F.normalize(text.float(), dim=-1)
    text, names = text[: len(image)], text[len(image) :]
    logits = clip.logit_scale.exp() * image @ text.T
    # two scenes of the same main concept are no negatives of each other
    shown = batch.shown
    same = shown[:, :1] == shown[:, 0]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    target = torch.arange(len(image), device=image.device)
    guess = head(image * 12)
    present = shown >= 0
    share = torch.zeros_like(guess).scatter_add_(1, shown.clamp(min=0), present.float())
    share = share / share.sum(1, keepdim=True)
    parts = {
        "contrastive": (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2,
        "head": F.cross_entropy(guess, share),
        "acc": (guess.argmax(1) == shown[:, 0]).float().mean(),
    }
    whole, tiled = weights
    spoken = []
    if whole:
        parts["patches"], *said = _speech(head, seen.patches, names, batch.nouns, shown)
        spoken.append((seen.stream.flatten(0, 1), *said))
    if tiled:
        with torch.autocast(batch.images.device.type, torch.bfloat16):
            seen = image_tower(clip, batch.mosaics, batch.mosaic_keep)
        patches = seen.patches.reshape(len(batch.tiles), -1, seen.patches.shape[-1])
        parts["tiles"], *said = _speech(head, patches, names, batch.nouns, batch.tiles)
        spoken.append((seen.stream.flatten(0, 1), *said))
    if spoken:
        stream, *said = (torch.cat(part) for part in zip(*spoken, strict=True))
        parts["unsaid"], parts["crowded"] = unsaid(stream, *said), crowded(stream)
    return parts


def _speech(head: Head, patches, names, nouns, shown) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the patches' loss, and of every patch the text of its nouns [N, e] and its silence [N]."""
    rows = torch.searchsorted(nouns, shown.clamp(min=0)).masked_fill(shown < 0, -1)
    low = torch.bfloat16  # the product with every noun is most of this loss's work
    patches = F.normalize(patches.float(), dim=-1).to(low) * head.scale.exp().to(low)
    found = patch_loss(patches, names.to(low), F.normalize(head.nothing, dim=0).to(low), rows)
    with torch.no_grad():
        own, silent = found.share[..., :-1], found.share[..., -1]
        own = own / own.sum(-1, keepdim=True).clamp(min=1e-12)
        meaning = own @ names[rows.clamp(min=0)]  # [B, P, e]
    return found.loss, meaning.flatten(0, 1), silent.flatten()


def mosaic(images: torch.Tensor) -> torch.Tensor:
    """Put four scenes into one: [4 M, 3, S, S] to [M, 3, 2 S, 2 S]."""
    side = images.shape[-1]
    return images.view(-1, 2, 2, 3, side, side).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 2 * side, 2 * side)


def mosaic_patches(order: torch.Tensor, side: int) -> torch.Tensor:
    """Turn patches of tiles [M, 4, k], of side x side each, into patches of mosaics [M, 4 k]."""
    row, column = torch.tensor([0, 0, side, side]), torch.tensor([0, side, 0, side])
    inside = (order // side + row[:, None]) * 2 * side + order % side + column[:, None]
    return inside.flatten(1)


class Plan(NamedTuple):
    """One step before anything is drawn: what no GPU is needed for, so that other processes can make it."""

    scenes: Layout
    keep: torch.Tensor | None  # as in Batch, and so below
    quarters: Layout | None  # four to a mosaic
    mosaic_keep: torch.Tensor | None
    texts: torch.Tensor
    nouns: np.ndarray


def plan_batch(recipe: Recipe, phase: Phase, seen: int, tokenizer) -> Plan:
    """Plan the step that begins at image number `seen`, the same in a run that was resumed."""
    where, key = np.arange(seen, seen + (phase.batch or recipe.batch)), f"train/{recipe.seed}"
    config = SceneConfig(size=phase.size, objects=phase.objects, scale=phase.scale, tint=phase.tint)
    scenes = layout(key, where, config)
    said = captions(f"clip/{recipe.seed}", where, content(scenes))
    side = phase.size // 8
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + seen)
    keep = quarters = mosaic_keep = None
    if phase.keep < 1:
        order = torch.rand(len(where), side**2, generator=draw).argsort(1)
        keep = order[:, : round(side**2 * phase.keep)]
    shown = [scenes.concepts]
    if phase.mosaics:
        small = replace(
            config, size=phase.size // 2, objects=phase.mosaic_objects, scale=phase.mosaic_scale
        )
        # scenes of their own, beyond any that a phase shows whole
        start = 2**40 + 4 * phase.mosaics * (seen // len(where))
        quarters = layout(key, np.arange(start, start + 4 * phase.mosaics), small)
        shown.append(quarters.concepts)
        order = torch.rand(phase.mosaics, 4, (side // 2) ** 2, generator=draw).argsort(2)
        order = order[..., : round((side // 2) ** 2 * phase.mosaic_keep)]
        mosaic_keep = mosaic_patches(order, side // 2)
    nouns = np.unique(np.concatenate(shown)) if any(phase.patches) else np.array([], np.int64)
    nouns = nouns[nouns >= 0]
    texts = tokenizer(said + [f"a picture of a {concepts()[c].name}" for c in nouns])
    return Plan(scenes, keep, quarters, mosaic_keep, texts, nouns)


def draw_batch(plan: Plan, phase: Phase, normal: dict, device: str) -> Batch:
    """Draw a planned step."""

    def moved(values: torch.Tensor | np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else torch.as_tensor(values).to(device)

    images = _pixels(paint(plan.scenes, "train", phase.size, device).images, normal)
    mosaics = tiles = None
    if plan.quarters is not None:
        drawn = paint(plan.quarters, "train", phase.size // 2, device)
        mosaics, tiles = _pixels(mosaic(drawn.images), normal), moved(drawn.concepts)
    return Batch(
        images, moved(plan.keep), moved(plan.scenes.concepts), mosaics, moved(plan.mosaic_keep), tiles,
        moved(plan.texts), moved(plan.nouns),
    )  # fmt: skip


class Plans(Dataset):
    """The plans of the steps that begin at the image numbers `starts`, for process `rank`."""

    def __init__(self, recipe: Recipe, starts: list[int], rank: int, tokenizer):
        self.recipe, self.starts, self.rank, self.tokenizer = recipe, starts, rank, tokenizer

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Plan:
        seen = self.starts[number]
        phase = phase_at(self.recipe.phases, seen)
        own = seen + self.rank * (phase.batch or self.recipe.batch)
        return plan_batch(self.recipe, phase, own, self.tokenizer)


def steps_from(recipe: Recipe, seen: int, world: int) -> list[int]:
    """List the image numbers at which the steps of `world` processes begin, from `seen` to the end."""
    starts = []
    while (phase := phase_at(recipe.phases, seen)) is not None:
        starts.append(seen)
        seen += world * (phase.batch or recipe.batch)
    return starts


def _pixels(images: torch.Tensor, normal: dict) -> torch.Tensor:
    return (images.float() / 255 - normal["mean"]) / normal["std"]


def phase_at(phases: tuple[Phase, ...], seen: int) -> Phase | None:
    """Return the phase that image number `seen` belongs to, None after the last."""
    for phase in phases:
        if seen < phase.images:
            return phase
        seen -= phase.images
    return None


def cycle_at(phases: tuple[Phase, ...], seen: int) -> tuple[tuple[Phase, ...], int]:
    """Return the phases that share one rise and fall of the step size with image `seen`, and the images
    seen of them."""
    starts = [i for i, phase in enumerate(phases) if i == 0 or phase.restart is not None]
    for start, stop in zip(starts, [*starts[1:], len(phases)], strict=True):
        cycle = phases[start:stop]
        length = sum(phase.images for phase in cycle)
        if seen < length or stop == len(phases):
            return cycle, seen
        seen -= length
    raise AssertionError("the last cycle returns")


def progress_at(phases: tuple[Phase, ...], seen: int) -> float:
    """Return the share of a cycle's work done, counting patches rather than images."""
    work = [phase.images * phase.size**2 * phase.keep for phase in phases]
    done = 0.0
    for phase, cost in zip(phases, work, strict=True):
        part = min(seen, phase.images)
        done += cost * part / phase.images
        seen -= part
    return done / sum(work)


def rate_at(recipe: Recipe, seen: int) -> float:
    """Return the step size at image number `seen`, in units of the recipe's."""
    cycle, here = cycle_at(recipe.phases, seen)
    progress, first = progress_at(cycle, here), cycle[0]
    height, decay_from = 1.0, recipe.decay_from
    if first.restart is not None:
        height, decay_from = first.restart, first.decay_from
    if progress < recipe.warmup:
        return height * progress / recipe.warmup
    return height * min(1.0, max(0.0, (1 - progress) / max(1 - decay_from, 1e-9)))


def optimisers(clip: CLIP, head: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    inside = {p for t in (clip.visual.transformer, clip.transformer) for p in t.parameters() if p.ndim == 2}
    matrices = [p for p in clip.parameters() if p in inside]
    rest = [p for p in (*clip.parameters(), *head.parameters()) if p not in inside]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.muon_lr,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def save(path: Path, state: dict) -> None:
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def export(clip: CLIP, path: Path) -> None:
    """Write fp16 weights in open_clip's local-dir layout."""
    weights = {k: v.half().contiguous().cpu() for k, v in clip.state_dict().items()}
    write_atomic(path, lambda temporary: save_file(weights, str(temporary)))


def train(
    recipe: Recipe,
    run: Path,
    device: str,
    minutes: float | None,
    every: float = 120.0,
    evaluations: int = 12,
    start_from: Path | None = None,
    workers: int = 0,
) -> CLIP:
    """Train to the end of the last phase, or for `minutes`, leaving checkpoint and curve in `run`.

    A checkpoint is written `every` so many seconds, and accuracy measured `evaluations` times. With
    `start_from`, a folder that `publish` wrote, only the last phase is run, on that model. `workers`
    processes plan steps ahead.
    """
    processes = join(device)
    torch.manual_seed(recipe.seed)
    clip, tokenizer, normal = build()
    smooth_positions(clip)
    if start_from is not None:
        restore_stream(clip, start_from)
    head = Head(clip.text_projection.shape[1], len(concepts()))
    clip.to(device), head.to(device)
    steppers = optimisers(clip, head, recipe)
    base_rates = [group["lr"] for opt in steppers for group in opt.param_groups]
    seen, rows, spent, step = 0, [], 0.0, 0
    if start_from is not None:
        seen = sum(phase.images for phase in recipe.phases[:-1])
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        clip.load_state_dict(state["clip"]), head.load_state_dict(state["head"])
        for opt, saved in zip(steppers, state["steppers"], strict=True):
            opt.load_state_dict(saved)
        seen, rows, spent = state["seen"], state["rows"], state["seconds"]
        print(f"resumed after {seen:,} images", flush=True)
    total = sum(phase.images for phase in recipe.phases)
    start, saved_at, evaluated = time.time() - spent, time.time(), seen
    recent: list[dict[str, float]] = []

    def keep_state() -> None:
        save(checkpoint, {
            "clip": clip.state_dict(), "head": head.state_dict(), "seen": seen, "rows": rows,
            "steppers": [opt.state_dict() for opt in steppers], "seconds": time.time() - start,
            "world": processes.world,
        })  # fmt: skip

    plans = Plans(recipe, steps_from(recipe, seen, processes.world), processes.rank, tokenizer)
    ahead = {"prefetch_factor": 4} if workers else {}
    # one process's plans are made in the order of its steps, by whichever worker is next
    for plan in DataLoader(
        plans, batch_size=None, collate_fn=lambda plan: plan, num_workers=workers, **ahead
    ):
        if processes.agree(minutes is not None and time.time() - start > minutes * 60 + spent):
            break
        phase = phase_at(recipe.phases, seen)
        batch = draw_batch(plan, phase, normal, device)
        parts = losses(clip, head, batch, phase.patches)
        whole, tiled = phase.patches
        weights = {
            "contrastive": 1.0, "head": recipe.concept_head, "patches": whole, "tiles": tiled,
            "unsaid": phase.unsaid, "crowded": phase.unsaid,
        }  # fmt: skip
        sum(weight * parts[name] for name, weight in weights.items() if name in parts).backward()
        average(processes, [*clip.parameters(), *head.parameters()])
        torch.nn.utils.clip_grad_norm_([*clip.parameters(), *head.parameters()], 1.0)
        factor = rate_at(recipe, seen)
        for group, base in zip([g for o in steppers for g in o.param_groups], base_rates, strict=True):
            group["lr"] = base * factor
        for opt in steppers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        clip.logit_scale.data.clamp_(0, np.log(100))
        seen, step = seen + len(batch.images) * processes.world, step + 1
        if step % 10 == 0 or not recent:
            recent.append({name: value.item() for name, value in parts.items()})
        if not processes.first:
            continue
        if step % 40 == 0:
            mean = means(recent[-4:])
            print(
                f"{seen:,} {time.time() - start:.0f}s {phase.size}px lr {factor:.3f} "
                + " ".join(f"{name} {value:.3f}" for name, value in mean.items()),
                flush=True,
            )
        if time.time() - saved_at > every:
            saved_at = time.time()
            keep_state()
        if evaluations and seen - evaluated >= total // evaluations:
            evaluated = seen
            rows.append(curve_row(clip, tokenizer, normal, seen, time.time() - start, recent))
            print(f"  {seen:,}: " + json.dumps(rows[-1]), flush=True)
    if processes.first:
        keep_state()
        write_curve(run / "curve.csv", rows)
    return clip


def average(processes: Processes, parameters: list[nn.Parameter]) -> None:
    """Average gradients over the processes."""
    if processes.world == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    processes.sum(flat).div_(processes.world)
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in rows[-1]}


def curve_row(clip, tokenizer, normal, seen, seconds, recent) -> dict:
    clip.eval()
    result = accuracy(clip, tokenizer, normal["mean"], normal["std"], n=512)
    clip.train()
    mean = means(recent[-8:])
    row = {
        "images": seen,
        "seconds": round(seconds),
        "contrastive": mean["contrastive"],
        "concept_head": mean["head"],
        "patches": mean.get("tiles", math.nan),
        "unsaid": mean.get("unsaid", math.nan),
    }
    for domain, kinds in result.items():
        row[f"{domain}_concept"] = kinds["trained"]["concept"]
        row[f"{domain}_subgroup"] = kinds["trained"]["subgroup"]
    return {k: round(float(v), 4) for k, v in row.items()}


def write_curve(path: Path, rows: list[dict]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            columns = dict.fromkeys(name for row in rows for name in row)  # losses came one after the other
            writer = csv.DictWriter(file, columns or ["images"], restval=math.nan)
            writer.writeheader()
            writer.writerows(rows)

    write_atomic(path, write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipe", choices=RECIPES, default="cpu", help="cpu is what is shipped; gpu goes on for longer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder",
        type=Path,
        default=project_root() / "results" / "small_clip",
        help="folder for the checkpoint",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers", type=int, help="processes that plan steps ahead; by default none without a GPU"
    )
    parser.add_argument("--minutes", type=float, help="stop after this long; start again to go on")
    parser.add_argument("--muon-lr", type=float, default=Recipe.muon_lr)
    parser.add_argument(
        "--from-model", type=Path, help="folder of a published model: run the last phase on it"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where weights, card and curve go")
    args = parser.parse_args()
    recipe = Recipe(seed=args.seed, phases=RECIPES[args.recipe], muon_lr=args.muon_lr)
    workers = args.workers
    if workers is None:
        workers = max(1, (os.cpu_count() or 2) - 2) if args.device.startswith("cuda") else 0
    device = local_device(args.device)
    clip = train(recipe, args.folder, device, args.minutes, start_from=args.from_model, workers=workers)
    if not join(args.device).first:
        return
    publish(clip, recipe, args.folder, args.out, args.from_model)


@torch.no_grad()
def rescale_stream(clip: CLIP, images: torch.Tensor, block: int = 11) -> float:
    """Divide the image tower's residual stream by a constant, leaving the function as it is.

    Muon grows the stream to norms near 1,000. Everything that writes into it (ln_pre, attention and MLP
    outputs) is scaled so that tokens after `block` deviate from their mean by sqrt(width), the order of
    OpenAI's CLIP, for which thresholds and penalties of the paper were chosen. Every reader of the stream
    is a LayerNorm, so the embeddings change by its epsilon only. Returns the factor.
    """
    visual, found = clip.visual, []
    hook = visual.transformer.resblocks[block - 1].register_forward_hook(lambda *a: found.append(a[2]))
    clip.encode_image(images)
    hook.remove()
    x = found[0]
    factor = float(x.shape[-1] ** 0.5 / (x - x.mean((0, 1))).norm(dim=-1).mean())
    scale_stream(clip, factor)
    return factor


@torch.no_grad()
def scale_stream(clip: CLIP, factor: float) -> None:
    """Multiply everything that writes into the image tower's residual stream."""
    writers = [clip.visual.ln_pre]
    for layer in clip.visual.transformer.resblocks:
        writers += [layer.attn.out_proj, layer.mlp.c_proj]
    for module in writers:
        module.weight.mul_(factor)
        module.bias.mul_(factor)


def restore_stream(clip: CLIP, folder: Path) -> None:
    """Load a published model with the residual stream it was trained with, for which step sizes fit."""
    load_weights(clip, folder / "open_clip_model.safetensors")
    card = json.loads((folder / "card.json").read_text("utf-8"))
    scale_stream(clip, 1 / card["stream_rescaled_by"])


def publish(
    clip: CLIP, recipe: Recipe, run: Path, out: Path, before: Path | None = None, scenes: int = 2048
) -> None:
    """Write fp16 weights, their measured accuracy (the card) and the learning curve.

    `before` is the folder of the published model that the run began with: card and curve are carried on.
    """
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    past = Past() if before is None else read_past(before)
    clip.cpu().eval()
    _, _, normal = build()
    sample = render("train", recipe.seed, range(64)).images
    factor = rescale_stream(clip, (sample.float() / 255 - normal["mean"]) / normal["std"])
    export(clip, out / "open_clip_model.safetensors")
    fresh, tokenizer, normal = build()
    load_weights(fresh, out / "open_clip_model.safetensors")
    kinds = ("trained", "untrained", "novel")
    result = accuracy(fresh.eval(), tokenizer, normal["mean"], normal["std"], scenes, kinds)
    print(summary(result), flush=True)
    trained = trained_mask()
    # a run on a published model counts images from where the recipe's last phase begins
    seen = state["seen"] - (sum(phase.images for phase in recipe.phases[:-1]) if before else 0)
    rows = [
        row
        | {
            "images": past.images + row["images"] - state["seen"] + seen,
            "seconds": past.seconds + row["seconds"],
        }
        for row in state["rows"]
    ]
    write_curve(out / "curve.csv", [*past.rows, *rows])
    phases = 1 if before else len(recipe.phases)
    history = {"phases": phases, "images": seen, "processes": state["world"]}
    write_json(out / "card.json", {
        "zero_shot_top1": {d: r["trained"]["concept"] for d, r in result.items()},
        "accuracy": result,
        "images_seen": past.images + seen,
        "seconds": past.seconds + round(state["seconds"]),
        "seed": recipe.seed,
        "recipe": asdict(recipe),
        "history": [*past.history, history],
        "stream_rescaled_by": factor,
        "concepts": {"all": trained.shape[1], "trained": int(trained.any(0).sum())},
        "parameters": sum(p.numel() for p in fresh.parameters()),
        "torch": torch.__version__,
    })  # fmt: skip


class Past(NamedTuple):
    """What a published model had seen."""

    rows: list[dict] = []
    images: int = 0
    seconds: int = 0
    history: list = []


def read_past(folder: Path) -> Past:
    """Read card and curve of a published model."""
    card = json.loads((folder / "card.json").read_text("utf-8"))
    with open(folder / "curve.csv", newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    history = card.get("history", [])
    return Past(
        rows, card["images_seen"], card["seconds"], history if isinstance(history, list) else [history]
    )


if __name__ == "__main__":
    main()
