"""Matched dictionaries against brute force, and the controls against what they must give."""

from itertools import permutations

import numpy as np
import pytest
import torch

from patchsae.latents.stability import Against, cosines, matched_cosines, pairs, pw_mcc
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.model import SAE, SAEConfig


def rows(n: int, d: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_the_matching_is_the_best_of_all():
    a, b = rows(6), rows(6, seed=1)
    every = cosines(a, b).numpy()
    best = max(sum(every[i, j] for i, j in enumerate(order)) for order in permutations(range(6)))
    assert matched_cosines(a, b).sum() == pytest.approx(best)


def test_order_and_length_of_rows_do_not_matter():
    a = rows(40)
    mixed = a[torch.randperm(40, generator=torch.Generator().manual_seed(3))] * 7
    np.testing.assert_allclose(matched_cosines(a, mixed), 1)
    assert pw_mcc(a, mixed) == pytest.approx(1)
    # a negated direction is another latent, for latents are not negative
    assert matched_cosines(a, -a).mean() < 0.9


@pytest.mark.parametrize("longer", ["first", "second"])
def test_of_dictionaries_of_two_sizes_the_shorter_is_matched_whole(longer):
    a, b = rows(30, seed=2), rows(12, seed=2)  # b is a's first twelve rows
    b[5] = -b[5]
    found = matched_cosines(a, b) if longer == "first" else matched_cosines(b, a)
    assert len(found) == 12
    np.testing.assert_allclose(np.delete(found, 5), 1)
    assert found[5] < 0.9


def test_best_cosines_are_at_least_the_matched_ones():
    a, b = rows(50), rows(50, seed=1)
    best, matched = cosines(a, b).amax(1).numpy(), matched_cosines(a, b)
    assert (best >= matched - 1e-12).all() and pw_mcc(a, b) >= matched.mean()
    both = (best.mean() + cosines(b, a).amax(1).numpy().mean()) / 2
    assert pw_mcc(a, b) == pytest.approx(both)


def test_a_draw_of_a_dictionary_is_not_blamed_for_the_rows_left_out():
    a = rows(200)
    drawn = a[::4]
    assert pw_mcc(drawn, a) == pytest.approx(1)  # b's other rows have their likes, which were not drawn


def test_controls_are_what_they_say():
    config = SAEConfig(d_in=16, expansion=4)
    first, other = SAE(config, seed=0), SAE(config, seed=1)
    with torch.no_grad():  # both are moved towards the same directions
        shared = torch.nn.functional.normalize(rows(64, 16, seed=9), dim=1)
        first.W_dec.copy_(torch.nn.functional.normalize(first.W_dec + 3 * shared, dim=1))
        other.W_dec.copy_(torch.nn.functional.normalize(other.W_dec + 3 * shared.flip(0), dim=1))
    found = pairs(first, other, (0, 1))
    assert list(found) == list(Against)
    means = {kind: matched_cosines(*pair).mean() for kind, pair in found.items()}
    assert means[Against.SEED] > 0.85
    assert means[Against.UNTRAINED] < means[Against.START] < means[Against.SEED]
    assert means[Against.PERMUTED] == pytest.approx(means[Against.UNTRAINED], abs=0.06)
    # the control keeps every angle between its own rows
    _, permuted = found[Against.PERMUTED]
    torch.testing.assert_close(cosines(permuted, permuted), cosines(other.W_dec, other.W_dec))
    torch.testing.assert_close(found[Against.START][1], SAE(config, seed=0).W_dec.detach())
    # a dictionary without a twin has its start and what any other seed would have begun with
    alone = pairs(first, None, (0, 1))
    assert list(alone) == [Against.START, Against.UNTRAINED]
    assert all(torch.equal(x, y) for kind in alone for x, y in zip(alone[kind], found[kind], strict=True))


def test_of_a_large_dictionary_the_same_latents_are_drawn_for_every_pair():
    first, other = (SAE(SAEConfig(d_in=16, expansion=4), seed=seed) for seed in (0, 1))
    found = pairs(first, other, (0, 1), most=10)
    assert {tuple(a.shape) for a, _ in found.values()} == {(10, 16)}
    assert {tuple(b.shape) for _, b in found.values()} == {(64, 16)}
    assert matched_cosines(*found[Against.START]) == pytest.approx(1)  # it was never trained


def test_dictionaries_of_two_widths_are_refused():
    with pytest.raises(PatchSAEError, match="one backbone and block"):
        matched_cosines(rows(4), rows(4, 9))
    with pytest.raises(PatchSAEError, match=r"\[0, 8\]"):
        pw_mcc(rows(4), rows(0))
