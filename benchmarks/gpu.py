"""Check and measure everything that runs on a GPU, and write benchmarks/gpu-CARD.json (`make gpu`).

    python benchmarks/gpu.py                    # all parts, under eight minutes on an H100
    python benchmarks/gpu.py --only step pass   # some of them; the others of an earlier file stay

Competitors take turns on the same batches, and only ratios within one run mean anything. A part that
fails is written down with its reason, and the exit status is 1; packages not installed are named as absent.
What is compared is said in peers.py. "TF32" is a setting for other packages' float32 products, which lose
13 bits of every factor; ours finds the same active latents in every setting and computes them in float32.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import bench_atlas
import numpy as np
import peers
import torch
from measure import Row, row, say
from workload import Problem, Weights, Workload, make_workload

from patchsae.clip.backbone import load_backbone
from patchsae.images.sets import Batch, ImageSet, short_hash
from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import git_commit, write_json
from patchsae.sae.model import SAEConfig
from patchsae.training.trainer import TrainConfig, train_sae

HERE = Path(__file__).resolve().parent
FLOAT32, BF16, AUTO, _ = peers.OURS
SIZES = (4_096, 16_384)  # tokens of a step: the paper's, and enough to fill a large card
L0S = (50, 150)
WIDE = Problem(49_152, 0, batches=2)
SETTINGS = {"float32": "highest", "TF32": "high"}  # of torch.set_float32_matmul_precision
ROUNDS, IMAGES, NETWORK_IMAGES = 12, 64, 8_192
KERNEL_TESTS = ("tests/test_sparse_gpu.py",)


def on_card(workload: Workload) -> Workload:
    """Copy a workload to the GPU."""
    weights = Weights(*(tensor.cuda() for tensor in workload.weights))
    return Workload(weights, workload.batches.cuda(), workload.dead.cuda())


def clear() -> None:
    """Give back what earlier competitors held, and forget their peak."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of `run`, the card's work included."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def setting(problem: Problem) -> peers.Setting:
    return peers.Setting(problem.tokens, round(problem.l0))


def kernels() -> dict[str, Any]:
    """Run the tests of the Triton kernels, golden arrays of the released code among them."""
    options = ["-q", "--noconftest", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *KERNEL_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    say(done.stdout[-1500:])
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    if done.returncode:
        failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
        raise PatchSAEError(f"the kernels' tests failed: {'; '.join(failed)[:2000] or done.stderr[-2000:]}")
    return {"tests": {word: int(number) for number, word in counts}}


def step() -> dict[str, Any]:
    """Time one optimiser step of everybody, and the most memory that two steps take."""
    rows: list[Row] = []
    for tokens in SIZES:
        for l0 in L0S:
            rows += _step(replace(WIDE, l0=l0, tokens=tokens))
    return {"rows": rows, "memory": _memory(replace(WIDE, l0=L0S[-1], tokens=SIZES[0]))}


def _step(problem: Problem) -> list[Row]:
    title = f"training step, {problem.d_sae:,} latents, L0 {problem.l0}, {problem.tokens:,} tokens"
    say(title)
    workload, mine = on_card(make_workload(problem)), [FLOAT32, BF16]
    contest = {name: (competitor(name, workload, problem), "float32") for name in mine}
    for name in (*peers.rivals(), *(() if peers.REFERENCE in peers.missing() else (peers.REFERENCE,))):
        try:
            theirs = competitor(name, workload, problem)
        except Exception as error:  # another package's: it is left out, and the log says why
            say(f"  {name} cannot take a step here: {type(error).__name__}: {str(error)[:300]}")
            continue
        contest |= {f"{peers.label(name)}, {kind}": (theirs, kind) for kind in SETTINGS}
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    for turn in range(-3, ROUNDS):
        for name, (one, kind) in contest.items():
            torch.set_float32_matmul_precision(SETTINGS[kind])
            x = workload.batches[turn % len(workload.batches)]
            spent = timed(partial(one.step, x))
            seconds[name] += [spent] if turn >= 0 else []
    torch.set_float32_matmul_precision("highest")
    found = contest[BF16][0].l0
    if abs(found / problem.l0 - 1) > 0.1:
        raise PatchSAEError(f"{title}: measured L0 is {found:.1f}: another case.")
    rows = []
    for name, figures in sorted(seconds.items(), key=lambda item: median(item[1])):
        say(f"  {problem.tokens / median(figures):12,.0f} tokens/s  {name}")
    for name in mine:
        for other in (other for other in seconds if other not in mine):
            ratios = [b / a for a, b in zip(seconds[name], seconds[other], strict=True)]
            own, theirs = (problem.tokens / median(seconds[key]) for key in (name, other))
            rows.append(row(f"{title}: {name}", own, theirs, other, "tokens/s", ratios, None))
    del contest, workload
    clear()
    return rows


def competitor(name: str, workload: Workload, problem: Problem) -> peers.Competitor:
    """Build a competitor on the card and take its first step, which compiles what it compiles."""
    one = peers.make(name, workload.weights, setting(problem))
    one.step(workload.batches[0])
    return one


def _memory(problem: Problem) -> dict[str, float]:
    found = {}
    workload = on_card(make_workload(problem))
    for name in (FLOAT32, BF16, *peers.rivals()):
        clear()
        before = torch.cuda.memory_allocated()
        try:
            one = competitor(name, workload, problem)
        except Exception:  # said above
            continue
        one.step(workload.batches[1])  # Adam's moments exist from the second step on
        found[peers.label(name)] = (torch.cuda.max_memory_allocated() - before) / 1e6
        say(f"  {found[peers.label(name)]:8,.0f} MB  {name}")
        del one
    return found


def aggregation() -> dict[str, Any]:
    """Time the aggregation pass over images on the card against the released code's two dense passes."""
    problem = replace(bench_atlas.PROBLEM, tokens=IMAGES * bench_atlas.TOKENS)
    workload = on_card(make_workload(problem))
    names = (bench_atlas.FLOAT32, bench_atlas.BF16, bench_atlas.RELEASED, bench_atlas.LEAN)
    rng = np.random.default_rng(0)
    images = IMAGES * (ROUNDS + 2)
    competitors = {name: bench_atlas.make(name, workload.weights, images) for name in names}
    for one in competitors.values():
        one.sae.cuda()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, ROUNDS):
        x = workload.batches[turn % 2].view(IMAGES, bench_atlas.TOKENS, -1)
        labels = rng.integers(0, bench_atlas.CLASSES, IMAGES)
        for name, one in competitors.items():
            spent = timed(partial(one.add, x, labels, np.arange(IMAGES) + IMAGES * (turn + 2)))
            seconds[name] += [spent] if turn >= 0 else []
    bench_atlas._agree(competitors)
    rows = []
    for name in names:
        say(f"  {IMAGES / median(seconds[name]):10,.0f} images/s  {name}")
    for name in names[:2]:
        for other in names[2:]:
            own, theirs = (IMAGES / median(seconds[key]) for key in (name, other))
            ratios = [b / a for a, b in zip(seconds[name], seconds[other], strict=True)]
            title = f"aggregation, {problem.d_sae:,} latents, L0 {problem.l0}: {name}"
            rows.append(row(title, own, theirs, other, "images/s", ratios, None))
    return {"rows": rows}


def nccl() -> dict[str, Any]:
    """Take steps in as many processes as there are cards, which talk through NCCL."""
    cards = torch.cuda.device_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cards}"]
    command += [str(HERE / "rank_steps.py"), "768", "49152", "16384", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PatchSAEError(f"torchrun with {cards} processes failed: {done.stderr[-2000:]}")
    speed = float(done.stdout.split()[-1])
    say(f"  {speed:,.0f} tokens/s with {cards} process(es)")
    return {"processes": cards, "tokens_per_second": speed}


class Noise(ImageSet):
    """Random pictures, so that training reads what it reads from photographs, without a disk."""

    def __init__(self, size: int, count: int = 512):
        self.pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        self.labels, self.classnames = np.zeros(NETWORK_IMAGES, np.int64), ("noise",)
        self.name, self.split = "noise", "train"

    def load(self, indices) -> Batch:
        indices = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        images = self.pixels[indices % len(self.pixels)]
        return Batch(images, torch.zeros(len(indices), dtype=torch.int64), indices)

    def fingerprint(self) -> str:
        return short_hash(f"noise of {tuple(self.pixels.shape)}")


def training() -> dict[str, Any]:
    """Train by the paper's recipe and in its shape: ViT-B/16's tokens made on the card, 49,152 latents."""
    found = {}
    for kind in ("float32", "bfloat16"):
        clear()
        torch.manual_seed(0)
        clip = load_backbone("ViT-B-16-quickgelu", block=11, device="cuda", dtype=kind)
        images = Noise(clip.image_size)
        config = TrainConfig(images=NETWORK_IMAGES, bias_tokens=20_000, token_batch=SIZES[0])
        x = clip.normalize(images.pixels[:64])
        with torch.no_grad():
            clip.residual(x)
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(4):
                clip.residual(x)
            torch.cuda.synchronize()
        tower = 4 * 64 / (time.perf_counter() - started)
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            trained = train_sae(images, clip, SAEConfig(clip.d_model, 64), config, folder, progress=False)
            seconds = time.perf_counter() - started
        rows = trained.metrics[1:]
        found[kind] = {
            "images": NETWORK_IMAGES, "seconds": seconds, "images_per_second": NETWORK_IMAGES / seconds,
            "tokens_per_second": NETWORK_IMAGES * clip.n_tokens / seconds, "tower_images_per_second": tower,
            "l0": rows[-1]["l0"], "fvu": rows[-1]["fvu"],
            "peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6,
        }  # fmt: skip
        say(f"  {kind}: " + json.dumps(found[kind]))
    return found


PARTS = {"kernels": kernels, "step": step, "pass": aggregation, "nccl": nccl, "training": training}


def machine() -> dict[str, Any]:
    """Describe card, driver and settings."""
    card = torch.cuda.get_device_properties(0)
    import triton

    return {
        "gpu": card.name, "cards": torch.cuda.device_count(),
        "memory_gb": round(card.total_memory / 1e9, 1), "multiprocessors": card.multi_processor_count,
        "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), "cores": os.cpu_count(), "absent": peers.missing(),
        "commit": os.environ.get("PATCHSAE_COMMIT") or git_commit(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> int:
    """Run the parts that are asked for and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of gpu-CARD.json")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no GPU here; the kernels' tests run in Triton's interpreter with "
              "`make test`.", file=sys.stderr)  # fmt: skip
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia ", "")).strip(
        "-"
    )
    path = given.out / f"gpu-{name}.json"
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    for part in given.only:
        say(f"== {part}")
        started = time.perf_counter()
        try:
            found = PARTS[part]()
        except Exception as error:  # one part must not cost the others: a card is on loan
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        clear()
        whole["parts"][part] = found | {"seconds": round(time.perf_counter() - started, 1)}
        whole["machine"] = machine()
        write_json(path, whole)
        say(f"== {part}: {whole['parts'][part]['seconds']} s")
    print(path)
    return int(any("failed" in whole["parts"][part] for part in given.only))


if __name__ == "__main__":
    sys.exit(main())
