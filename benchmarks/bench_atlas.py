"""The one aggregation pass against the two passes of the released code, the backbone excluded.

    python benchmarks/bench_atlas.py --peak ours 16      # MB that one batch of 16 images takes

The released way is written afresh from facts.md §4.5 and §4.7: dense latents [images, tokens, latents] of a
batch; one pass for means, frequencies and reference images, a second one for the class counts. It gets the
latents by running the whole autoencoder with every hook point kept, so it reconstructs too; the same with
the encoder alone is measured beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from measure import Row, forget_peak, resident, row, say, with_matrix_units
from torch import Tensor
from workload import Problem, Weights, make_workload

from patchsae.latents.accumulator import Accumulator
from patchsae.runs.errors import PatchSAEError
from patchsae.sae.cpu import has_bf16_units
from patchsae.sae.model import SAE, SAEConfig
from patchsae.sae.step import latent_lists

TOKENS, CLASSES, TAU, K = 197, 1000, 0.2, 10
BATCH = 16
PROBLEM = Problem(49_152, 146, tokens=BATCH * TOKENS, batches=2)
SIZES, ROUNDS = (32, 64, 128, 256), 5
RELEASED, LEAN = "the released code's two passes", "two dense passes, encoder alone"
FLOAT32, BF16 = "ours, float32", "ours, bf16 candidates"
GOALS = {FLOAT32: 5.0, BF16: 20.0}
MEMORY_LIMIT = 100.0  # MB that a batch may take beyond the result


class TwoPasses:
    """The released scheme; what a batch adds lies in the attributes."""

    def __init__(self, sae: SAE, whole: bool):
        self.sae, self.whole = sae, whole
        zeros = sae.W_dec.new_zeros
        self.total, self.active = zeros(sae.d_sae), zeros(sae.d_sae)
        self.value, self.index = zeros(K, sae.d_sae), zeros(K, sae.d_sae)
        self.count = np.zeros((CLASSES, sae.d_sae))

    @torch.no_grad()
    def add(self, x: Tensor, labels: np.ndarray, indices: np.ndarray) -> None:
        """Add images x [B, T, d]."""
        self._features(x, torch.from_numpy(indices).to(x.device))
        self._classes(x, labels)

    def _latents(self, x: Tensor) -> Tensor:
        if not self.whole:
            return self.sae.encode(x)
        kept = {"pre": self.sae.pre_activations(x)}
        kept["post"] = kept["pre"].relu()
        kept["out"] = self.sae.decode(kept["post"])
        kept["error"] = self.sae.error(kept["out"], x)
        return kept["post"]

    def _features(self, x: Tensor, indices: Tensor) -> None:
        mean = self._latents(x).mean(1)  # [B, S]
        self.total += mean.sum(0)
        self.active += (mean > 0).sum(0)
        value = torch.cat([self.value, mean])
        index = torch.cat([self.index, indices[:, None].expand_as(mean).float()])
        self.value, place = value.topk(K, dim=0)
        self.index = index.gather(0, place)

    def _classes(self, x: Tensor, labels: np.ndarray) -> None:
        over = (self._latents(x) > TAU).sum(1).cpu().numpy()
        for label, counts in zip(labels, over, strict=True):
            self.count[label] += counts


class OnePass:
    """Ours, with or without bf16 candidates."""

    def __init__(self, sae: SAE, bf16: bool, images: int):
        self.sae, self.bf16 = sae, bf16
        kind = (np.arange(TOKENS) > 0).astype(np.int8)
        self.sums = Accumulator(sae.d_sae, CLASSES, images, kind, TAU, K, m=10)

    def add(self, x: Tensor, labels: np.ndarray, indices: np.ndarray) -> None:
        """Add images x [B, T, d]."""
        lists = latent_lists(self.sae, x.flatten(0, 1), self.bf16)
        self.sums.update(lists, labels, indices)


def run() -> list[Row]:
    """Measure speed in turns, growth over four numbers of images, and the memory of one batch."""
    names = [FLOAT32, BF16] if has_bf16_units() else [FLOAT32]
    rows = speed(names, [RELEASED, LEAN])
    rows.append(growth(names[-1]))
    peaks = {name: _peak_elsewhere(name, BATCH) for name in (*names, RELEASED)}
    for name in names:
        title = f"aggregation, transient memory of {BATCH} images: {name}"
        ratio = peaks[RELEASED] / peaks[name]
        goal = peaks[RELEASED] / MEMORY_LIMIT  # reached where ours stays below the limit
        rows.append(row(title, peaks[name], peaks[RELEASED], RELEASED, "MB", [ratio], goal, ratio))
    return rows


def make(name: str, weights: Weights, images: int) -> TwoPasses | OnePass:
    """Return a competitor by name."""
    d_sae, d_in = weights.rows.shape
    sae = SAE(SAEConfig(d_in, d_sae / d_in))
    for parameter, value in zip(
        (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec),
        (weights.rows, weights.rows, weights.b_enc, weights.b_dec),
        strict=True,
    ):
        parameter.data = value
    return (
        TwoPasses(sae, name == RELEASED) if name in (RELEASED, LEAN) else OnePass(sae, name == BF16, images)
    )


def speed(mine: list[str], others: list[str]) -> list[Row]:
    """Compare images per second, one batch each per round."""
    names = [*mine, *others]
    say(f"aggregation, {PROBLEM.d_sae:,} latents, {BATCH} images of {TOKENS} tokens")
    workload, rng = make_workload(PROBLEM), np.random.default_rng(0)
    images = BATCH * (ROUNDS + 1)
    competitors = {name: make(name, workload.weights, images) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + 1):
        x = workload.batches[turn % 2].view(BATCH, TOKENS, -1)
        labels, indices = rng.integers(0, CLASSES, BATCH), np.arange(BATCH) + BATCH * turn
        for name, competitor in competitors.items():
            time.sleep(0.05)  # OpenMP's threads go on spinning for some 10 ms, at the next one's expense
            started = time.perf_counter()
            competitor.add(x, labels, indices)
            seconds[name].append(time.perf_counter() - started)
    _agree(competitors)
    times = {name: figures[1:] for name, figures in seconds.items()}
    rows = []
    for name in names:
        say(f"  {BATCH / median(times[name]):8.1f} images/s  {name}")
    for name in mine:
        for other in others:
            own, theirs = (BATCH / median(times[key]) for key in (name, other))
            ratios = [b / a for a, b in zip(times[name], times[other], strict=True)]
            title = f"aggregation, {PROBLEM.d_sae:,} latents, L0 {PROBLEM.l0}: {name}"
            goal = GOALS[name] if other == RELEASED else None
            goal = with_matrix_units(goal) if name == BF16 else goal
            rows.append(row(title, own, theirs, other, "images/s", ratios, goal))
    return rows


def _agree(competitors: dict[str, TwoPasses | OnePass]) -> None:
    theirs = competitors[RELEASED].count.sum(0)
    for name, ours in competitors.items():
        if isinstance(ours, OnePass):
            counted = ours.sums.class_count.sum((0, 2))
            # a token whose activation is τ to the last bit may fall on either side
            if np.abs(counted - theirs).sum() > 1e-4 * theirs.sum():
                raise PatchSAEError(f"{name} counts other tokens than {RELEASED}.")


def growth(name: str) -> Row:
    """Measure seconds over four numbers of images, and draw them beside results.json."""
    workload = make_workload(PROBLEM)
    seconds = []
    for images in SIZES:
        competitor, started = make(name, workload.weights, images), time.perf_counter()
        for turn in range(images // BATCH):
            x = workload.batches[turn % 2].view(BATCH, TOKENS, -1)
            competitor.add(x, np.zeros(BATCH, int), np.arange(BATCH) + BATCH * turn)
        seconds.append(time.perf_counter() - started)
        say(f"  {images} images: {seconds[-1]:.2f} s")
    _draw(seconds, name)
    per_image = [s / n for s, n in zip(seconds, SIZES, strict=True)]
    title = f"aggregation, seconds per image at {SIZES[-1]} images against {SIZES[0]}: {name}"
    ratios = [per_image[0] / cost for cost in per_image]
    return row(title, per_image[-1], per_image[0], "the same, fewer images", "s", ratios, None, ratios[-1])


def _draw(seconds: list[float], name: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(SIZES, seconds, "o-")
    axes.set(xlabel="images", ylabel="time (s)", xlim=(0, None), ylim=(0, None), title=f"One pass, {name}")
    figure.savefig(Path(__file__).with_name("atlas_growth.png"), dpi=120)


def peak(name: str, images: int) -> float:
    """Measure in this process what adding one batch takes beyond weights and result: in MB."""
    small = Problem(512, 20, tokens=2 * TOKENS, batches=1)
    trial = make_workload(small)  # compilation and thread pools come before the zero point
    make(name, trial.weights, 2).add(trial.batches[0].view(2, TOKENS, -1), np.zeros(2, int), np.arange(2))
    problem = Problem(PROBLEM.d_sae, PROBLEM.l0, tokens=images * TOKENS, batches=1)
    workload = make_workload(problem)
    competitor = make(name, workload.weights, images)
    if isinstance(competitor, OnePass):
        for array in vars(competitor.sums).values():
            if isinstance(array, np.ndarray):
                array.setflags(write=True)
                array += array.dtype.type(0)  # the result's pages are resident before, whatever is written
    else:
        competitor.count += 0
    before = forget_peak()
    competitor.add(workload.batches[0].view(images, TOKENS, -1), np.zeros(images, int), np.arange(images))
    return resident("VmHWM") - before


def _peak_elsewhere(name: str, images: int) -> float:
    command = [sys.executable, __file__, "--peak", name, str(images)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PatchSAEError(f"memory of {name} failed: {done.stderr.strip()[-2000:]}")
    say(f"  {float(done.stdout.split()[-1]):8.0f} MB  {name}, {images} images")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak", nargs=2, metavar=("COMPETITOR", "IMAGES"), required=True)
    competitor_name, image_count = parser.parse_args().peak
    print(peak(competitor_name, int(image_count)))
