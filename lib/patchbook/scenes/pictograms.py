"""The embedded image sets: pictograms composed into scenes on the fly.

Every scene is a pure function of (split, seed, index): its parameters come from a counter-based hash,
so any batch, in any order, on any device, shows the same scene. Object masks come with it and are used
for scoring only, never in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from patchbook.scenes.catalogue import concepts, trained_mask
from patchbook.scenes.sprites import STYLES, photos, sprites, words
from patchsae.images.sets import short_hash
from patchsae.runs.errors import PatchSAEError

SLOTS = 4  # objects at most
WORD = SLOTS  # the mask value of a written word is WORD + 1
SPLITS = ("train", "test")
STYLE_WORDS = ("flat picture", "glossy picture", "line drawing", "black silhouette")
SILHOUETTE = len(STYLES)  # a fourth look, made from Twemoji's outline and never trained on
# a tinted object keeps its light and dark in shades of one colour; share of red, green, blue
TINTS = {
    "red": (1.0, 0.25, 0.2),
    "yellow": (1.0, 0.85, 0.15),
    "green": (0.25, 0.8, 0.3),
    "blue": (0.25, 0.45, 1.0),
    "purple": (0.7, 0.3, 0.85),
    "grey": (0.7, 0.7, 0.7),
}

# what can stand behind the objects, and the share of scenes that have it
GROUNDS = {"photo": 0.45, "gradient": 0.2, "flat": 0.15, "noise": 0.2}


@dataclass(frozen=True)
class SceneConfig:
    """What scenes look like."""

    size: int = 112
    """Side of the square image, px."""
    objects: tuple[float, ...] = (0.4, 0.25, 0.2, 0.15)
    """Probability of 1, 2, 3, 4 objects."""
    styles: tuple[float, ...] = (0.42, 0.33, 0.25)
    """Probability of each style for each object (OpenMoji, Twemoji, sketch[, silhouette])."""
    pairs: str = "trained"
    """Which (concept, style) pairs appear: 'trained', 'untrained', 'novel' or 'all'."""
    scale: tuple[float, float] = (0.55, 0.95)
    """Side of a single object as a share of the image; several objects are scaled down."""
    rotation: float = 20.0
    """Largest rotation either way, degrees."""
    word_rate: float = 0.12
    """Share of scenes that carry a written concept name."""
    tint: float = 0.0
    """Share of objects that are drawn in shades of one colour of TINTS."""


class Scenes(NamedTuple):
    """What a batch of scenes shows."""

    images: torch.Tensor  # [B, 3, S, S] uint8
    masks: torch.Tensor  # [B, S, S] uint8; 0 background, i + 1 object i, WORD + 1 written word
    concepts: np.ndarray  # [B, SLOTS] int64, -1 where there is no object; slot 0 is the label
    styles: np.ndarray  # [B, SLOTS] int64
    word: np.ndarray  # [B] int64, the concept whose name is written, or -1
    tints: np.ndarray  # [B, SLOTS] int64, position in TINTS, -1 for the drawing's own colours


class Content(NamedTuple):
    """What a plan shows, known before anything is drawn; the fields are those of `Scenes`."""

    concepts: np.ndarray
    styles: np.ndarray
    word: np.ndarray
    tints: np.ndarray


def uniforms(key: str, indices: np.ndarray, n: int) -> np.ndarray:
    """Draw n numbers in [0, 1) for each index, depending on (key, index) alone: float64 [B, n]."""
    salt = np.uint64(int(short_hash(key), 16))
    counter = np.asarray(indices, dtype=np.uint64)[:, None] * np.uint64(n)
    z = (counter + np.arange(n, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15) + salt
    # splitmix64's finaliser: full avalanche, so neighbouring counters are unrelated
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


@lru_cache
def written_words() -> tuple[int, ...]:
    """Return the concepts whose name is written in some scenes: one word of 3 to 6 letters, trained."""
    trained = trained_mask().any(0)
    return tuple(
        i
        for i, concept in enumerate(concepts())
        if trained[i] and concept.name.isalpha() and 3 <= len(concept.name) <= 6
    )


@lru_cache
def _allowed(pairs: str) -> tuple[np.ndarray, ...]:
    """Concepts that may appear in each style, the silhouette last."""
    trained = trained_mask()
    novel = ~trained.any(0)
    allowed = {
        "trained": trained,
        "untrained": ~trained & ~novel,
        "novel": np.broadcast_to(novel, trained.shape),
        "all": np.ones_like(trained),
    }
    if pairs not in allowed:
        raise PatchSAEError(f"pairs='{pairs}' is unknown; choose one of {', '.join(allowed)}.")
    rows = [np.flatnonzero(row) for row in allowed[pairs]]
    return (*rows, np.arange(trained.shape[1]))


class Textures:
    """Everything that is sampled when a scene is drawn, on one device."""

    def __init__(self, split: str, device: str | torch.device):
        if split not in SPLITS:
            raise PatchSAEError(f"split='{split}' is unknown; choose 'train' or 'test'.")
        codes = [concept.code for concept in concepts()]
        rgba = torch.from_numpy(np.array(sprites(codes))).to(device)
        silhouette = torch.zeros_like(rgba[1:2])
        silhouette[..., 3] = rgba[1:2, ..., 3]
        plates = torch.from_numpy(np.array(words([concepts()[i].name.upper() for i in written_words()])))
        levels = [torch.cat([rgba, silhouette]).flatten(0, 1), plates.to(device)]
        texture = torch.cat(levels).permute(0, 3, 1, 2).contiguous()
        self.word_offset = (len(STYLES) + 1) * len(codes)
        # halved copies, so that a small object is not aliased
        self.levels = [texture]
        for _ in range(2):
            self.levels.append(_halve(self.levels[-1]))
        self.photos = torch.from_numpy(np.array(photos(split))).to(device).permute(0, 3, 1, 2)
        self.noise = _noise(split).to(device)


def _halve(texture: torch.Tensor) -> torch.Tensor:
    halves = [F.avg_pool2d(part.float(), 2).round().byte() for part in texture.split(256)]
    return torch.cat(halves)


def _noise(split: str, n: int = 24, side: int = 96) -> torch.Tensor:
    """Smooth and rough random textures in 0..1, different in each split: [n, 1, side, side]."""
    fields = []
    for octave in (4, 8, 16, 48):
        values = uniforms(f"noise/{split}/{octave}", np.arange(n), octave * octave)
        field = torch.from_numpy(values).float().view(n, 1, octave, octave)
        fields.append(F.interpolate(field, size=(side, side), mode="bicubic", align_corners=False))
    weights = torch.from_numpy(uniforms(f"noise/{split}/weights", np.arange(n), 4)).float() ** 2
    weights = (weights / weights.sum(1, keepdim=True)).view(n, 4, 1, 1, 1)
    field = (torch.stack(fields, 1) * weights).sum(1)
    low, high = field.amin((2, 3), keepdim=True), field.amax((2, 3), keepdim=True)
    return (field - low) / (high - low)


_TEXTURES: dict[tuple[str, str], Textures] = {}


def textures(split: str, device: str | torch.device = "cpu") -> Textures:
    """Return the textures of a split, uploaded once per device."""
    key = (split, str(device))
    if key not in _TEXTURES:
        _TEXTURES[key] = Textures(split, device)
    return _TEXTURES[key]


def _pick(u: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    edges = np.cumsum(np.asarray(weights, dtype=np.float64)) / np.sum(weights)
    return np.minimum(np.searchsorted(edges, u, side="right"), len(weights) - 1)


class Layout(NamedTuple):
    """What stands where in a batch of scenes; replace a field to change one factor of them."""

    concepts: np.ndarray  # [B, SLOTS]
    styles: np.ndarray  # [B, SLOTS]
    word: np.ndarray  # [B] position in written_words(), or -1
    centre: np.ndarray  # [B, SLOTS + 1, 2] in -1..1
    scale: np.ndarray  # [B, SLOTS + 1] share of the side
    angle: np.ndarray  # [B, SLOTS + 1] radians
    flip: np.ndarray  # [B, SLOTS + 1] +1 or -1
    gain: np.ndarray  # [B, SLOTS + 1] brightness
    ground: np.ndarray  # [B, 16] uniforms for the background
    tint: np.ndarray  # [B, SLOTS] position in TINTS, or -1


def layout(
    key: str,
    indices: np.ndarray,
    config: SceneConfig,
    fixed: tuple[np.ndarray, np.ndarray] | None = None,
) -> Layout:
    """Decide what stands where; `fixed` = (concept [B], style [B]) decides the first object."""
    indices = np.asarray(indices, dtype=np.int64)
    n, per = len(indices), 10
    u = uniforms(key, indices, (SLOTS + 1) * per + 24)
    objects, rest = u[:, : (SLOTS + 1) * per].reshape(n, SLOTS + 1, per), u[:, (SLOTS + 1) * per :]
    count = 1 + _pick(rest[:, 0], config.objects)
    chosen = np.full((n, SLOTS), -1)
    style = _pick(objects[:, :SLOTS, 0], config.styles)
    for s, options in enumerate(_allowed(config.pairs)):
        here = style == s
        if here.any():
            position = (objects[:, :SLOTS, 1] * len(options)).astype(np.int64)
            chosen[here] = options[position[here]]
    if fixed is not None:
        chosen[:, 0], style[:, 0] = fixed
    chosen[np.arange(SLOTS) >= count[:, None]] = -1
    low, high = config.scale
    scale = low + (high - low) * objects[..., 2]
    shrink = np.array([1.0, 0.62, 0.54, 0.5])[count - 1]
    scale = scale * shrink[:, None]
    # one object: anywhere that keeps most of it inside; several: one to a quadrant, jittered
    free = (2 * objects[..., 3:5] - 1) * np.maximum(1.08 - scale, 0.1)[..., None]
    quadrant = np.argsort(rest[:, 1:5], axis=1)
    corner = np.stack([quadrant % 2, quadrant // 2], -1) - 0.5
    opposite = np.stack([-corner[:, 0], corner[:, 0]], 1)  # two objects share no side
    corner[:, :2] = np.where((count == 2)[:, None, None], opposite, corner[:, :2])
    spread = corner + (objects[:, :SLOTS, 3:5] - 0.5) * 0.36
    centre = free.copy()
    several = count > 1
    centre[several, :SLOTS] = spread[several]
    angle = np.deg2rad(config.rotation) * (2 * objects[..., 5] - 1)
    flip = np.where(objects[..., 6] < 0.5, 1.0, -1.0)
    gain = 0.8 + 0.4 * objects[..., 7]
    written = np.full(n, -1)
    options = written_words()
    names = (rest[:, 6] * len(options)).astype(np.int64)
    # half of the words name the first object where that name can be written
    position = {concept: i for i, concept in enumerate(options)}
    own = np.array([position.get(int(c), -1) for c in chosen[:, 0]])
    names = np.where((rest[:, 7] < 0.5) & (own >= 0), own, names)
    has_word = rest[:, 5] < config.word_rate
    written[has_word] = names[has_word]
    flip[:, WORD], angle[:, WORD] = 1.0, 0.4 * angle[:, WORD]
    scale[:, WORD] = 0.55 + 0.35 * objects[:, WORD, 2]
    centre[:, WORD, 0] = (2 * objects[:, WORD, 3] - 1) * np.maximum(1 - scale[:, WORD], 0)
    # near the upper or lower edge, where it hides little of the object it may name
    side = np.where(objects[:, WORD, 8] < 0.5, 1.0, -1.0)
    centre[:, WORD, 1] = side * (0.55 + 0.3 * objects[:, WORD, 4])
    tint = np.full((n, SLOTS), -1)
    if config.tint:
        # one number says both whether and which
        share = objects[:, :SLOTS, 9] / config.tint
        tint = np.where((share < 1) & (chosen >= 0), (share * len(TINTS)).astype(np.int64), -1)
    return Layout(chosen, style, written, centre, scale, angle, flip, gain, rest[:, 8:24], tint)


def content(plan: Layout) -> Content:
    """Tell what a plan shows."""
    word = np.array([written_words()[i] if i >= 0 else -1 for i in plan.word], dtype=np.int64)
    return Content(plan.concepts, plan.styles, word, plan.tint)


def _affine(centre: np.ndarray, scale: np.ndarray, angle: np.ndarray, flip: np.ndarray) -> torch.Tensor:
    """Map canvas coordinates to texture coordinates: float32 [B, 2, 3]."""
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    rows = np.stack([np.stack([flip * cos, flip * sin], -1), np.stack([-sin, cos], -1)], -2)
    shift = -(rows @ centre[..., None])
    return torch.from_numpy(np.concatenate([rows, shift], -1).astype(np.float32))


def _sample(
    levels: list[torch.Tensor],
    which: torch.Tensor,
    theta: torch.Tensor,
    pixels: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Sample textures `which` [B] into canvases float32 [B, C, S, S] in 0..255."""
    out = torch.empty(len(which), levels[0].shape[1], size, size, device=which.device)
    # the level whose texels are nearest to one per pixel
    ratio = (levels[0].shape[-1] / pixels.clamp(min=1)).log2()
    level = ratio.round().clamp(0, len(levels) - 1).long()
    for i, texture in enumerate(levels):
        here = (level == i).nonzero().flatten()
        if len(here):
            grid = F.affine_grid(theta[here], [len(here), 1, size, size], align_corners=False)
            out[here] = F.grid_sample(texture[which[here]].float(), grid, align_corners=False)
    return out


def _colour(drawn: torch.Tensor, tint: np.ndarray) -> None:
    """Give premultiplied drawings [B, 4, S, S] shades of one colour each, in place; -1 leaves them."""
    here = np.flatnonzero(tint >= 0)
    if len(here):
        rows = torch.from_numpy(here).to(drawn.device)
        colours = drawn.new_tensor(list(TINTS.values()))[torch.from_numpy(tint[here]).to(drawn.device)]
        weights = drawn.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        light = (drawn[rows, :3] * weights).sum(1, keepdim=True)
        drawn[rows, :3] = light * colours[:, :, None, None]


def ground_kind(ground: np.ndarray) -> np.ndarray:
    """Tell which of GROUNDS each background is, by its uniforms [B, 16]: int64 [B]."""
    return _pick(ground[:, 0], tuple(GROUNDS.values()))


def _background(g: np.ndarray, split: str, size: int, device) -> torch.Tensor:
    """Draw photo, gradient, flat and noise backgrounds: float32 [B, 3, S, S] in 0..255."""
    n, source = len(g), textures(split, device)
    kind = ground_kind(g)
    colours = torch.from_numpy(g[:, 1:7].astype(np.float32)).view(n, 2, 3, 1, 1).to(device) * 255
    line = torch.linspace(-1, 1, size, device=device)
    turn = torch.from_numpy((g[:, 7] * 2 * np.pi).astype(np.float32)).view(n, 1, 1).to(device)
    ramp = (turn.cos() * line.view(1, 1, -1) + turn.sin() * line.view(1, -1, 1)) * 0.35 + 0.5
    weight = ramp.clamp(0, 1)[:, None].clone()
    weight[torch.from_numpy(kind == 2).to(device)] = 0
    zoom = 0.3 + 0.7 * g[:, 8]
    shift = (2 * g[:, 9:11] - 1) * (1 - zoom)[:, None]
    flip = np.where(g[:, 11] < 0.5, 1.0, -1.0)
    zero = np.zeros(n)
    # a window of the photo: texture = zoom * canvas + shift
    theta = _affine(-shift / zoom[:, None] * np.stack([flip, flip**2], -1), 1 / zoom, zero, flip)
    theta = theta.to(device)
    for code, bank in ((3, source.noise), (0, source.photos)):
        here = np.flatnonzero(kind == code)
        if not len(here):
            continue
        rows = torch.from_numpy(here).to(device)
        which = torch.from_numpy((g[here, 12] * len(bank)).astype(np.int64)).to(device)
        pixels = torch.full((len(here),), float(bank.shape[-1]), device=device)
        drawn = _sample([bank], which, theta[rows], pixels, size)
        if code == 3:
            weight[rows] = drawn
        else:
            contrast = torch.from_numpy((0.5 + 0.5 * g[here, 13]).astype(np.float32))
            bright = torch.from_numpy((80 * (g[here, 14] - 0.5)).astype(np.float32))
            contrast, bright = (
                contrast.view(-1, 1, 1, 1).to(device),
                bright.view(-1, 1, 1, 1).to(device),
            )
            photo = (drawn - 128) * contrast + 128 + bright
    canvas = colours[:, 0] * (1 - weight) + colours[:, 1] * weight
    here = np.flatnonzero(kind == 0)
    if len(here):
        canvas[torch.from_numpy(here).to(device)] = photo.clamp(0, 255)
    return canvas


@torch.no_grad()
def render(
    split: str,
    seed: int,
    indices: Sequence[int],
    config: SceneConfig | None = None,
    fixed: tuple[np.ndarray, np.ndarray] | None = None,
    device: str | torch.device = "cpu",
) -> Scenes:
    """Draw scenes; the same (split, seed, index, config) gives the same scene in any batch.

    Parameters
    ----------
    indices : int [B], the scenes wanted
    fixed : (concept [B], style [B]) of the first object; without it they are drawn too
    """
    config = config or SceneConfig()
    indices = np.asarray(indices, dtype=np.int64)
    key = f"{split}/{seed}"
    return paint(layout(key, indices, config, fixed), split, config.size, device)


@torch.no_grad()
def paint(plan: Layout, split: str, size: int, device: str | torch.device = "cpu") -> Scenes:
    """Draw what a plan says, with the split's photos and textures."""
    n, source = len(plan.concepts), textures(split, device)
    canvas = _background(plan.ground, split, size, device)
    masks = torch.zeros(n, size, size, dtype=torch.uint8, device=device)
    per_style = len(concepts())
    # slot 0 is the label and is drawn over its neighbours; a written word over everything
    for slot in (*range(SLOTS - 1, -1, -1), WORD):
        present = plan.word >= 0 if slot == WORD else plan.concepts[:, slot] >= 0
        here = np.flatnonzero(present)
        if not len(here):
            continue
        if slot == WORD:
            which = source.word_offset + plan.word[here]
        else:
            which = plan.styles[here, slot] * per_style + plan.concepts[here, slot]
        parts = (plan.centre, plan.scale, plan.angle, plan.flip)
        theta = _affine(*(part[here, slot] for part in parts)).to(device)
        pixels = torch.from_numpy(plan.scale[here, slot] * size).float().to(device)
        drawn = _sample(source.levels, torch.from_numpy(which).to(device), theta, pixels, size)
        gain = torch.from_numpy(plan.gain[here, slot].astype(np.float32)).view(-1, 1, 1, 1).to(device)
        rows, alpha = torch.from_numpy(here).to(device), drawn[:, 3:] / 255
        if slot != WORD:
            _colour(drawn, plan.tint[here, slot])
        canvas[rows] = canvas[rows] * (1 - alpha) + drawn[:, :3] * gain
        masks[rows] = masks[rows].masked_fill(alpha[:, 0] >= 0.5, slot + 1)
    images = canvas.round().clamp(0, 255).byte()
    return Scenes(images, masks, *content(plan))
