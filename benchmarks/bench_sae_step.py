"""One training step of the sparse autoencoder against other packages, in tokens per second and megabytes.

    python benchmarks/bench_sae_step.py --quick    # tiny sizes, installed peers only; writes nothing

All competitors of a case live in one process and take turns, one step each per round, so that a change in
the machine's speed hits all alike. Figures are medians over the rounds; the first ones are discarded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import peers
import torch
from measure import Row, forget_peak, resident, row, say, with_matrix_units
from workload import FULL, QUICK, Problem, Workload, load_workload, make_workload, save_workload

from patchsae.runs.errors import PatchSAEError
from patchsae.sae.cpu import has_bf16_units

Seconds = dict[str, list[float]]  # competitor -> one figure per round

FLOAT32, BF16, AUTO, DENSE = peers.OURS
GOALS = {  # (latents, L0, competitor) -> how many times the best other package's speed
    (12_288, 50, FLOAT32): 4.8,
    (12_288, 50, BF16): 10.0,
    (49_152, 150, FLOAT32): 5.0,
    (49_152, 150, BF16): 12.0,
}
GHOST_GOAL, DENSITY_GOAL, MEMORY_GOAL = 2.5, 1.0, 2.22
PAUSE = 0.05  # s: OpenMP's threads go on spinning for some 10 ms after a step, at the next one's expense
REFERENCE_L0 = 150  # TopK's backward pass holds tokens · L0 · d_in floats: gigabytes beyond


def run(quick: bool = False) -> list[Row]:
    """Measure every case and return the rows for results.json."""
    check_setup(quick)
    verify([*ours(), *peers.rivals(), *reference()])
    plan, rows = (QUICK if quick else FULL), []
    for problem, rounds in ((plan.narrow, plan.narrow_rounds), (plan.wide, plan.wide_rounds)):
        for l0 in plan.speed_l0:
            share_too = problem is plan.wide and l0 == plan.memory_l0
            rows += speed(replace(problem, l0=l0), rounds, share_too)
    rows += ghost(replace(plan.narrow, l0=plan.ghost_l0, dead_share=0.5), plan.narrow_rounds)
    for l0 in plan.density_l0:
        rows += density(replace(plan.narrow, l0=l0), plan.density_rounds)
    return rows + memory(replace(plan.wide, l0=plan.memory_l0))


def check_setup(quick: bool) -> None:
    """Warn of an allocator that slows everybody, refuse a comparison that lacks a competitor."""
    if "GLIBC_TUNABLES" not in os.environ:
        print(
            "warning: GLIBC_TUNABLES is not set, so page faults slow every step 1.5-2x: use `make bench`.",
            file=sys.stderr,
        )
    if (absent := peers.missing()) and not quick:
        raise PatchSAEError(f"{', '.join(absent)} not installed; `make bench` installs what is compared.")


def verify(names: list[str]) -> None:
    """Check on a small problem that competitors compute the latents and the loss their adapters promise.

    Raises
    ------
    PatchSAEError : one does not, so its speed would mean nothing.
    """
    problem = Problem(128, 6, d_in=16, tokens=64)
    workload = make_workload(problem)
    (rows, b_enc, b_dec), x, facts = workload.weights, workload.batches[0], setting(workload, problem)
    for name in names:
        competitor = peers.make(name, workload.weights, facts)
        latents, l1 = ((x - b_dec) @ rows.T + b_enc).relu(), facts.l1
        if name == peers.REFERENCE:
            latents, l1 = latents * (latents >= latents.topk(facts.l0).values[:, -1:]), 0.0
        x_hat = latents @ rows + b_dec
        loss = competitor.error(x_hat - x, x) + l1 * latents.sum(-1).mean()
        with torch.no_grad():
            found = competitor.codes(x)
        found = (*found, torch.tensor(competitor.step(x)))
        if not all(map(partial(torch.allclose, rtol=1e-4, atol=1e-4), found, (latents, x_hat, loss))):
            raise PatchSAEError(f"{name} computes other latents or another loss than its adapter promises.")


def speed(problem: Problem, rounds: int, share_too: bool) -> list[Row]:
    """Compare the sparse step with every other package at one size and sparsity."""
    workload, mine = make_workload(problem), ours()
    names = [*mine, *peers.rivals(), *(reference() if problem.l0 <= REFERENCE_L0 else ())]
    title = f"training step, {problem.d_sae:,} latents, L0 {problem.l0}"
    contest = Contest(title, names, workload, problem)
    seconds = contest.rounds(rounds)
    best = min(peers.rivals(), key=lambda name: median(seconds[name]))
    goals = {name: goal_of(name, GOALS.get((problem.d_sae, problem.l0, name))) for name in mine}
    rows = [contest.compare(seconds, name, best, goals[name]) for name in mine]
    if any(goals.values()):  # the other packages one by one where a goal is set, to keep the table short
        others = [name for name in names if name not in (*mine, best)]
        rows += [contest.compare(seconds, name, other, None) for name in mine for other in others]
    return rows + (contest.shares(seconds, rounds) if share_too else [])


def ghost(problem: Problem, rounds: int) -> list[Row]:
    """Compare steps with ghost gradients for half the latents; only the released code has them too."""
    workload = make_workload(problem)
    title = f"training step with ghost gradients, {problem.d_sae:,} latents, half dead, L0 {problem.l0}"
    contest = Contest(title, [*ours(), peers.RELEASED], workload, problem)
    seconds = contest.rounds(rounds)
    return [contest.compare(seconds, name, peers.RELEASED, goal_of(name, GHOST_GOAL)) for name in ours()]


def goal_of(name: str, goal: float | None) -> float | None:
    """Return the goal of one of our ways: of bf16 candidates only where the processor has matrix units."""
    return with_matrix_units(goal) if name == BF16 else goal


def density(problem: Problem, rounds: int) -> list[Row]:
    """Compare the automatic choice with our own dense step."""
    workload = make_workload(problem)
    title = f"automatic choice, {problem.d_sae:,} latents, L0 {problem.l0}"
    contest = Contest(title, [AUTO, DENSE], workload, problem)
    return [contest.compare(contest.rounds(rounds, discarded=2), AUTO, DENSE, DENSITY_GOAL)]


def memory(problem: Problem) -> list[Row]:
    """Compare the peak of resident memory above the data, each competitor in a process of its own."""
    title = f"peak memory, {problem.d_sae:,} latents, L0 {problem.l0}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.safetensors"
        save_workload(path, make_workload(problem))
        peaks = {name: _peak_elsewhere(title, name, path, problem) for name in [*ours(), *peers.rivals()]}
    best = min(peers.rivals(), key=peaks.__getitem__)
    rows = []
    for name in ours():
        ratio = peaks[best] / peaks[name]
        figures = (peaks[name], peaks[best], peers.label(best), "MB", [ratio], MEMORY_GOAL, ratio)
        rows.append(row(f"{title}: {name}", *figures))
    return rows


class Contest:
    """Competitors that start from the same weights and take turns on the same batches."""

    def __init__(self, title: str, names: list[str], workload: Workload, problem: Problem):
        gc.collect()  # models of the case before are held by cycles, a gigabyte each
        say(f"{title}: {len(names)} competitors")
        self.title, self.workload, self.problem = title, workload, problem
        facts = setting(workload, problem)
        self.competitors = {name: peers.make(name, workload.weights, facts) for name in names}
        self.phases: dict[str, dict[str, float]] = {}  # seconds before the rounds that count

    def rounds(self, count: int, discarded: int = 1) -> Seconds:
        """Time `count` rounds after the discarded ones.

        Raises
        ------
        PatchSAEError : two competitors with one objective disagree on the loss of the first batch.
        """
        names = list(self.competitors)
        seconds: Seconds = {name: [] for name in names}
        for turn in range(-discarded, count):
            x = self.workload.batches[turn % len(self.workload.batches)]
            if turn == 0:
                self.phases = {name: dict(_phases(self.competitors[name])) for name in names}
            names = [*names[1:], names[0]]  # nobody always takes its turn after a greedy one
            losses = {}
            for name in names:
                time.sleep(PAUSE)
                started = time.perf_counter()
                losses[name] = self.competitors[name].step(x)
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - started)
            if turn == -discarded:
                self._agree(losses)
        self._report(seconds)
        return seconds

    def _agree(self, losses: dict[str, float]) -> None:
        same = {n: v for n, v in losses.items() if self.competitors[n].error is peers.mean_over_norm}
        if max(same.values()) > 1.001 * min(same.values()):
            raise PatchSAEError(f"{self.title}: one objective, but losses {same}.")

    def compare(self, seconds: Seconds, name: str, other: str, goal: float | None) -> Row:
        """Return one row: tokens per second of `name` against `other`."""
        own, theirs = (self.problem.tokens / median(seconds[key]) for key in (name, other))
        by_round = [b / a for a, b in zip(seconds[name], seconds[other], strict=True)]
        title = f"{self.title}: {name}"
        return row(title, own, theirs, peers.label(other), "tokens/s", by_round, goal)

    def shares(self, seconds: Seconds, count: int) -> list[Row]:
        """Return the share of a step that the encoder's product takes: ours against the plain dense step's.

        No sparsity of the latents saves that part, so a larger share is a step nearer to its floor.
        """
        plain, x, alone = self.competitors[peers.PLAIN], self.workload.batches[0], []
        for turn in range(count + 1):
            started = time.perf_counter()
            plain.product(x)
            alone += [time.perf_counter() - started] if turn else []
        dense = median(alone) / median(seconds[peers.PLAIN])
        rows = []
        for name in ours():
            spent = {
                phase: total - self.phases[name].get(phase, 0.0)
                for phase, total in _phases(self.competitors[name]).items()
            }
            say("  " + ", ".join(f"{phase} {total / count:.3f} s" for phase, total in spent.items()))
            share = spent.get("encoder", 0.0) / sum(seconds[name])
            title = f"{self.title}, share of the encoder's product: {name}"
            rows.append(row(title, share, dense, peers.PLAIN, "of the step", [share / dense], None))
        return rows

    def _report(self, seconds: Seconds) -> None:
        for name, figures in sorted(seconds.items(), key=lambda item: median(item[1])):
            speed = self.problem.tokens / median(figures)
            say(f"  {speed:10,.0f} tokens/s  {peers.label(name)}")
        measured = [c.l0 for c in self.competitors.values() if isinstance(c, peers.Ours)]
        say(f"  measured L0 {median(measured):.1f}")
        if abs(median(measured) / self.problem.l0 - 1) > 0.1:
            raise PatchSAEError(f"{self.title}: measured L0 is {median(measured):.1f}: another case.")


def ours() -> list[str]:
    """Return our ways of taking the sparse step on this machine."""
    return [FLOAT32, BF16] if has_bf16_units() else [FLOAT32]


def reference() -> list[str]:
    """Return the TopK package, if it is installed."""
    return [] if peers.REFERENCE in peers.missing() else [peers.REFERENCE]


def setting(workload: Workload, problem: Problem) -> peers.Setting:
    """Return what competitors need to know of a problem."""
    dead = workload.dead if problem.dead_share else None
    return peers.Setting(problem.tokens, round(problem.l0), dead=dead)


def peak(name: str, path: Path, problem: Problem, steps: int = 2) -> float:
    """Measure in this process how far steps raise resident memory above that before the model: in MB."""
    # imports, compilation and thread pools cost memory whatever the size: they come before the zero point
    small = Problem(128, 6, d_in=16, tokens=64)
    trial = make_workload(small)
    peers.make(name, trial.weights, setting(trial, small)).step(trial.batches[0])
    workload = load_workload(path)
    before = forget_peak()
    competitor = peers.make(name, workload.weights, setting(workload, problem))
    for turn in range(steps):  # Adam's moments exist from the second on
        competitor.step(workload.batches[turn % len(workload.batches)])
    return resident("VmHWM") - before


def _peak_elsewhere(title: str, name: str, path: Path, problem: Problem) -> float:
    command = [sys.executable, __file__, "--peak", name, str(path), json.dumps(vars(problem))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PatchSAEError(f"{title}: {name} failed: {done.stderr.strip()[-2000:]}")
    megabytes = float(done.stdout.split()[-1])
    say(f"{title}: {megabytes:8,.0f} MB  {peers.label(name)}")
    return megabytes


def _phases(competitor: peers.Competitor) -> dict[str, float]:
    return competitor.stepper.seconds if isinstance(competitor, peers.Ours) else {}


def _command_line() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--peak", nargs=3, metavar=("COMPETITOR", "WORKLOAD", "PROBLEM"), help="(internal)")
    given = parser.parse_args()
    if given.peak:
        name, path, problem = given.peak
        print(peak(name, Path(path), Problem(**json.loads(problem))))
        return
    for result in run(given.quick):
        print(json.dumps(result))


if __name__ == "__main__":
    _command_line()
