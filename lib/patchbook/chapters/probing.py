"""Beyond the paper: how few latents tell a concept, which are absorbed, and which steer the answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchbook.chapters.against_untrained import sample
from patchbook.chapters.opening import Run
from patchbook.chapters.probes import Fisher, Moments, Probes, SceneSubset, open_probes, read
from patchbook.chapters.verdicts_of_models import is_above
from patchbook.report import Beyond, beyond
from patchbook.scenes.catalogue import concepts
from patchbook.scenes.embedded import SceneSet
from patchbook.scenes.pictograms import SLOTS
from patchbook.tables import Table, estimate, percent
from patchsae.clip.backbone import Backbone, zero_shot_logits
from patchsae.clip.tail import Tail
from patchsae.latents.best_latents import random_sae
from patchsae.latents.maps import patch_cover
from patchsae.latents.probing import (
    absorption,
    contrasts,
    image_maxima,
    pick_features,
    probe_auroc,
)
from patchsae.runs.intervals import Interval, bootstrap
from patchsae.sae.model import SAE
from patchsae.sae.step import latent_lists
from patchsae.training.activations import Tokens, token_columns

LEAST = 3  # test scenes of a concept, at least
SIZES = (1, 5)
TRAINED, UNTRAINED, STREAM = "autoencoder", "untrained", "the stream"


class Probed(NamedTuple):
    """What probes, absorption and steering say, of a trained and of an untrained autoencoder."""

    auroc: dict[tuple[str, int | None], np.ndarray]
    """[C] by features and their number; None is all of them."""
    missed: dict[str, np.ndarray]
    """[C] share of tokens on a concept where its latent is silent."""
    absorbed: dict[str, np.ndarray]
    """[C] share where one other latent stands in for it."""
    removed: dict[str, np.ndarray]
    """[N] 1 where a right answer changes without the class's latent."""
    steered: dict[str, np.ndarray]
    """[N] 1 where the answer becomes another class once its latent is added."""
    scenes: int
    """Training scenes."""


class _Seen(NamedTuple):
    features: dict[str, np.ndarray]
    """[N, F] by kind: the largest activation of an image, and its largest and mean token of the stream."""
    there: np.ndarray
    """bool [N, concepts]"""
    directions: Tensor
    """[concepts, d] Fisher's, of training scenes."""
    tokens: dict[str, dict[int, np.ndarray]]
    """Activations [n, S] on patches of each concept's objects."""


def probe(run: Run, images: int, references: int, most: int) -> Probed | None:
    """Ask the chapter's autoencoder and an untrained one about the `most` commonest concepts.

    images: test scenes. references: training scenes. None where contents are not known, or too few alike.
    """
    if not run.has_masks:
        return None
    probes = open_probes(run.backbone, images, references, seed=run.seed)
    return run.keep(
        "probed", Probed | None, lambda: _probe(run, probes, most), [probes.described, probes.scored],
        concepts=most,
    )  # fmt: skip


def _probe(run: Run, probes: Probes, most: int) -> Probed | None:
    backbone = run.backbone
    columns = token_columns(backbone, Tokens.ALL)
    with backbone.remembering(run.store):
        saes = {TRAINED: run.sae, UNTRAINED: random_sae(run.sae, sample(backbone, probes), run.seed)}
        train = _look(saes, backbone, probes.described, columns, {})
        test = _look(saes, backbone, probes.scored, columns, range(len(concepts())))
        told = np.flatnonzero(train.there.any(0) & ~train.there.all(0))
        asked = told[_commonest(test.there[:, told], most)].tolist()
        if not asked:
            return None
        apart = {kind: dict(zip(told.tolist(), contrasts(x, train.there[:, told]), strict=True))
                 for kind, x in train.features.items()}  # fmt: skip
        own = {
            name: {c: int(pick_features(by, 1, rising=True)[0]) for c, by in apart[name].items()}
            for name in saes
        }
        removed, steered = _steer(saes, own, train, backbone, probes, columns, run.seed)
    auroc = {}
    for kind, sizes in {TRAINED: SIZES, UNTRAINED: SIZES, STREAM: (*SIZES, None)}.items():
        for k in sizes:
            kept = {c: np.s_[:] if k is None else pick_features(apart[kind][c], k) for c in asked}
            auroc[kind, k] = np.array([
                probe_auroc(*((of.features[kind][:, kept[c]], of.there[:, c]) for of in (train, test)))
                for c in asked
            ])  # fmt: skip
    missed, absorbed = {}, {}
    for name, sae in saes.items():
        rows = sae.W_dec.detach().float()
        gain = (
            torch.nn.functional.normalize(rows, dim=1)
            @ torch.nn.functional.normalize(train.directions, dim=1).T
        )  # [S, concepts]
        found = [
            absorption(test.tokens[name][c], gain[:, c].cpu().numpy(), own[name][c])
            for c in asked
            if len(test.tokens[name].get(c, ()))
        ]
        missed[name] = np.array([one.missed.mean() for one in found])
        absorbed[name] = np.array([one.absorbed.mean() for one in found])
    return Probed(auroc, missed, absorbed, removed, steered, len(probes.described))


@torch.no_grad()
def _look(
    saes: Mapping[str, SAE], backbone: Backbone, images: SceneSet | SceneSubset, columns: np.ndarray,
    kept: Collection[int],
) -> _Seen:  # fmt: skip
    """Take features of each scene; and of concepts `kept`, what is active on their objects' patches."""
    patches = np.flatnonzero(backbone.token_kind == "patch")
    features = {name: [] for name in (*saes, STREAM)}
    there, tokens = [], {name: {c: [] for c in kept} for name in saes}
    fisher, every = Fisher(backbone.d_model, backbone.device), Moments(backbone.d_model, backbone.device)
    for _, scenes, stream in read(backbone, images, "probing", True):
        x, on = stream[:, columns], stream[:, patches]
        features[STREAM].append(torch.cat([x.amax(1), x.mean(1)], 1).cpu().numpy())
        for name, sae in saes.items():
            lists = latent_lists(sae, x.flatten(0, 1))
            features[name].append(image_maxima(lists, len(x), x.shape[1]))
        row = np.zeros((len(x), len(concepts())), bool)
        for slot in range(SLOTS):
            shown = np.flatnonzero(scenes.concepts[:, slot] >= 0)
            row[shown, scenes.concepts[shown, slot]] = True
            inside = patch_cover(scenes.masks == slot + 1, backbone.grid) >= 0.5  # [B, P]
            for image in shown:
                concept = int(scenes.concepts[image, slot])
                if concept in kept and inside[image].any():
                    for name, sae in saes.items():
                        f = sae.encode(on[image, inside[image].to(on.device)])
                        tokens[name][concept].append(f.cpu().numpy())
        there.append(row)
        every.add(on.flatten(0, 1))
        fisher.add(scenes, on.flatten(0, 1), backbone.grid)
    joined = {name: {c: np.concatenate(f) for c, f in by.items() if f} for name, by in tokens.items()}
    return _Seen(
        {name: np.concatenate(parts) for name, parts in features.items()},
        np.concatenate(there), fisher.directions(every), joined,
    )  # fmt: skip


def _commonest(there: np.ndarray, most: int) -> np.ndarray:
    """Return the concepts of most test scenes, at most so many, with LEAST or more, and not in all."""
    count = np.where(there.all(0), 0, there.sum(0))
    kept = np.argsort(-count, kind="stable")[:most]
    return kept[count[kept] >= LEAST]


@torch.no_grad()
def _steer(
    saes: Mapping[str, SAE], own: Mapping[str, Mapping[int, int]], train: _Seen, backbone: Backbone,
    probes: Probes, columns: np.ndarray, seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # fmt: skip
    """Take the latent of an image's class out of its tokens, and put another class's in."""
    images, finish = probes.scored, Tail(backbone)
    label, concept = images.labels, images.concept_of_label
    known = np.flatnonzero(train.there.any(0)[concept])  # classes that training scenes show
    draw = np.random.default_rng(seed).integers(len(known) - 1, size=len(label))
    other = np.array([np.delete(known, known == own_)[d] for own_, d in zip(label, draw, strict=True)])
    removed, steered = ({name: [] for name in saes} for _ in range(2))

    def answers(tokens: Tensor) -> np.ndarray:
        return zero_shot_logits(backbone, finish(tokens), probes.text).argmax(-1).cpu().numpy()

    for rows, _, tokens in read(backbone, images, "steering", True):
        right = answers(tokens) == label[rows]
        for name, sae in saes.items():
            here, there = ([own[name].get(int(concept[c]), 0) for c in of[rows]] for of in (label, other))
            x = tokens[:, columns]
            at = torch.tensor(here, device=x.device)[:, None, None].expand(-1, x.shape[1], 1)
            less, more = tokens.clone(), tokens.clone()
            less[:, columns] = x - sae.encode(x).gather(2, at) * sae.W_dec[here][:, None]
            strength = [
                train.features[name][train.there[:, concept[c]], latent].mean()
                for c, latent in zip(other[rows], there, strict=True)
            ]
            add = torch.tensor(np.array(strength), dtype=x.dtype, device=x.device)
            more[:, columns] = x + (add[:, None] * sae.W_dec[there])[:, None]
            removed[name].append((answers(less) != label[rows])[right])
            steered[name].append(answers(more) == other[rows])
    both = [
        {name: np.concatenate(parts).astype(float) for name, parts in of.items()}
        for of in (removed, steered)
    ]
    return both[0], both[1]


def probe_table(found: Probed, seed: int) -> Table:
    """Return what few features tell, and what latents do, against an untrained autoencoder."""
    rows: dict[str, dict[str, object]] = {}
    for (kind, k), area in found.auroc.items():
        name = {None: "of all features (largest and mean token)", 1: "of one feature"}.get(
            k, f"of {k} features"
        )
        rows.setdefault(f"AUROC {name}", {})[kind] = estimate(bootstrap(area, seed), 3)
    for title, of in (
        ("patches of a concept where its latent is silent, %", found.missed),
        ("… and one other stands in for it, %", found.absorbed),
        ("right answers that change without the class's latent, %", found.removed),
        ("images that a class's latent steers to that class, %", found.steered),
    ):
        rows[title] = {name: percent(bootstrap(values, seed)) for name, values in of.items()} | {
            STREAM: "–"
        }
    caption = (
        f"{len(found.auroc[TRAINED, 1])} concepts by few features, and what the latent of a concept does; "
        f"features were chosen on {found.scenes:,} training scenes."
    )
    return Table(caption, rows, ("",))


def probe_finding(found: Probed, seed: int) -> Beyond:
    """Judge that one latent tells a concept better than an untrained autoencoder's best one."""
    by = {name: found.auroc[name, 1] for name in (TRAINED, UNTRAINED, STREAM)}
    ahead = bootstrap(by[TRAINED] - by[UNTRAINED], seed)
    whole = bootstrap(found.auroc[STREAM, None], seed)
    steers = {name: percent(bootstrap(values, seed)) for name, values in found.steered.items()}
    return beyond(
        "One latent tells whether a concept is in an image better than an untrained latent does",
        label="probes",
        quantity="area under the ROC curve of the best single latent, trained minus untrained",
        ours=ahead,
        rule="the interval of the difference lies above 0",
        **is_above(
            ahead,
            why=f"One latent reaches an AUROC of {estimate(bootstrap(by[TRAINED], seed))}, one dimension "
            f"of the stream {estimate(bootstrap(by[STREAM], seed))}, all dimensions {estimate(whole)}. "
            f"Added to every token, a class's latent makes the answer its class in {steers[TRAINED]} % of "
            f"images, an untrained one in {steers[UNTRAINED]} %.",
        )._asdict(),
        effect=float(_share(by, whole)),
        effect_name="share of the way from an untrained latent to all dimensions of the stream",
    )


def _share(by: Mapping[str, np.ndarray], whole: Interval) -> float:
    start = by[UNTRAINED].mean()
    return (by[TRAINED].mean() - start) / (whole.value - start) if whole.value > start else np.nan
