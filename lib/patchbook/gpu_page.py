"""The book's page on what was measured on GPUs, made from the files that `make gpu` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import write_atomic

FILES = "benchmarks/gpu-*.json"  # one for each card; parts of the repository

HOW = """\
`make gpu` measures all of this on your card and writes a file of its own, which this page shows at the
next `make book`. Everybody starts from the same weights, sees the same tokens and takes turns; a step is
forward, backward, the constraints on the decoder and Adam. *float32* and *TF32* are settings of torch for
products of the other packages: TF32 is faster, and drops 13 of the 23 bits of every factor. Ours finds the
same active latents in each way, those that a product in full precision finds, and computes them in float32.
"""


def write_page(root: Path, page: Path) -> Path:
    """Write the page from the files of this clone.

    Raises
    ------
    PatchSAEError : a file is damaged.
    """
    sections = []
    for path in sorted(root.glob(FILES)):
        try:
            sections.append(_card(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise PatchSAEError(
                f"{path} cannot be read ({type(error).__name__}): restore it, or run `make gpu`."
            ) from error
    text = "\n".join(["# Measured on GPUs", "", HOW, *(sections or ["No card was measured yet.", ""])])
    return write_atomic(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _card(found: dict[str, Any]) -> str:
    machine, parts = found["machine"], found["parts"]
    lines = [
        f"## {machine['gpu']}",
        "",
        f"{machine['cards']} card, {machine['memory_gb']:.0f} GB, torch {machine['torch']}, Triton "
        f"{machine['triton']}, {machine['date']}.",
        "",
    ]
    writers = {
        "step": _step, "pass": _pass, "training": _training, "nccl": _nccl, "kernels": _kernels,
    }  # fmt: skip
    for name, write in writers.items():
        part = parts.get(name)
        if part is None:
            lines += [f"*{name}* was not measured.", ""]
        elif "failed" in part:
            lines += [f"*{name}* failed: {part['failed']}", ""]
        else:
            lines += [*write(part), ""]
    return "\n".join(lines)


def _step(part: dict[str, Any]) -> list[str]:
    cases: dict[str, dict[str, float]] = {}
    for row in part["rows"]:
        case, ours = row["name"].rsplit(": ", 1)
        speeds = cases.setdefault(case, {})
        speeds[ours], speeds[row["other_name"]] = row["ours"], row["best_other"]
    packages = {
        case: {k: v for k, v in speeds.items() if "ours" not in k} for case, speeds in cases.items()
    }
    exact = [_ratio(speeds, packages[case], "float32") for case, speeds in cases.items()]
    loose = [_ratio(speeds, packages[case], "TF32") for case, speeds in cases.items()]
    size = next(iter(cases)).split(", ", 2)[1]
    lines = [
        "### One training step, thousand tokens a second",
        "",
        f"At {size} the step with bf16 candidates is {min(exact):.1f} to {max(exact):.1f} times as fast as "
        f"the best other ReLU step in float32, and {min(loose):.1f} to {max(loose):.1f} times in TF32.",
        "",
    ]
    lines += _table(["who"] + [case.split(", ", 2)[2] for case in cases], cases)
    memory = sorted(part["memory"].items(), key=lambda item: item[1])
    lines += [
        "",
        "Most memory of two steps: " + ", ".join(f"{k} {v / 1e3:.1f} GB" for k, v in memory) + ".",
    ]
    return lines


def _ratio(speeds: dict[str, float], others: dict[str, float], setting: str) -> float:
    rivals = [v for k, v in others.items() if k.endswith(setting) and "another objective" not in k]
    return speeds["ours, bf16 candidates"] / max(rivals)


def _table(header: list[str], cases: dict[str, dict[str, float]]) -> list[str]:
    names = sorted({name for speeds in cases.values() for name in speeds}, key=lambda n: -_mean(n, cases))
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * len(cases)]
    for name in names:
        cells = " | ".join(f"{s[name] / 1e3:,.0f}" if name in s else "" for s in cases.values())
        lines.append(f"| {name} | {cells} |")
    return lines


def _mean(name: str, cases: dict[str, dict[str, float]]) -> float:
    return sum(speeds.get(name, 0.0) for speeds in cases.values())


def _pass(part: dict[str, Any]) -> list[str]:
    speeds = {}
    for row in part["rows"]:
        speeds[row["name"].rsplit(": ", 1)[1]], speeds[row["other_name"]] = row["ours"], row["best_other"]
    lines = ["### The aggregation pass", "", "| who | images a second |", "|---|---:|"]
    lines += [f"| {k} | {v:,.0f} |" for k, v in sorted(speeds.items(), key=lambda item: -item[1])]
    return lines


def _training(part: dict[str, Any]) -> list[str]:
    lines = [
        "### Training in the paper's shape",
        "",
        "ViT-B/16 with random weights on pictures of noise, its tokens made on the card, 49,152 latents, "
        "the first steps of the paper's recipe, in which thousands of latents are still active.",
        "",
        "| tower | images a second | tower alone | L0 | most memory, GB |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in sorted(set(part) - {"seconds"}, reverse=True):
        row = part[kind]
        lines.append(
            f"| {kind} | {row['images_per_second']:,.0f} | {row['tower_images_per_second']:,.0f} | "
            f"{row['l0']:,.0f} | {row['peak_memory_mb'] / 1e3:.1f} |"
        )
    return lines


def _nccl(part: dict[str, Any]) -> list[str]:
    return [
        f"Under torchrun, {part['processes']} process through NCCL: {part['tokens_per_second'] / 1e3:,.0f} "
        "thousand tokens a second at 49,152 latents, the gradients dense."
    ]


def _kernels(part: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{number} {word}" for word, number in part["tests"].items())
    return [f"Tests of the kernels on the card: {counts}. {part.get('note', '')}".strip()]
