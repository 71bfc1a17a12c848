"""The book's page on reliability, made from what the last soak wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import write_atomic

SOAK = "benchmarks/soak.json"  # what `make soak` writes; a part of the repository
COLUMNS = ("tried", "refused", "right", "garbage", "traceback")

THREATS = """\
## What is trusted

* **Trusted**: this repository, the packages of `requirements.lock`, and whoever may write to your account.
  A notebook is a program; run only those that you would run.
* **Not trusted**: pictures, checkpoints and configurations of anybody, names of files and classes,
  parameters and command lines, and a `results/` folder that comes from elsewhere.
* From what is not trusted nothing is executed. Pickles are read by an unpickler that builds tensors,
  containers and numbers, and calls nothing else. The blocks that the explorer's page loads as scripts are
  placed in a page only if they hand over JSON and do no more. Text is shown as text.
* What is not trusted may not take the machine: pictures have a limit of pixels and of proportions before
  they are decoded, and a checkpoint's size is compared with what it claims before memory is taken.
* A finished result is known by the hashes in its manifest. They tell damage, lost files and partial copies;
  they do not tell a forgery, made with its manifest, from a true result. Where that matters, compute it
  again.
* Not covered: a machine with wrong memory, and who may change this repository.
"""


def write_page(root: Path, page: Path) -> Path:
    """Write the page from the last soak of this clone.

    Raises
    ------
    PatchSAEError : the soak's file is missing or damaged.
    """
    path = root / SOAK
    try:
        text = _page(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchSAEError(
            f"{path} cannot be read ({type(error).__name__}): restore it, or run `make soak`."
        ) from error
    return write_atomic(page, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _page(soak: dict[str, Any]) -> str:
    rows, lost = soak["attacks"], sum(row["garbage"] + row["traceback"] for row in soak["attacks"])
    tried = sum(row["tried"] for row in rows)
    lines = [
        "# What was tried to break it",
        "",
        f"The last soak made {tried:,} attacks in {soak['seconds'] / 60:.0f} minutes on {soak['machine']}, "
        f"at commit `{str(soak['commit'])[:12]}`. **{lost}** of them were lost: believed though wrong, or "
        "ended in anything but one sentence that names the file and the remedy.",
        "",
        "| attack | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for row in rows:
        cells = " | ".join(f"{row[column]:,}" for column in COLUMNS)
        lines.append(f"| {row['about']} | {cells} |")
    lines += [
        "",
        "*Refused*: one sentence. *Right*: the right answer came, or the result was made anew; of mutated "
        "pictures and of other projects' checkpoints, which carry no hash, what could be read was whole "
        "and finite. *Garbage*: wrong and believed. *Traceback*: any other end.",
        "",
        *_training(soak["training"]),
        f"To repeat it: `make soak`, which is `{soak['command']}`.",
        "",
        THREATS,
    ]
    return "\n".join(lines)


def _training(found: dict[str, float]) -> list[str]:
    if "memory_mb" not in found:
        return []
    return [
        f"{found['runs']:,} trainings one after the other, for {60 * found['hours']:.0f} minutes: memory "
        f"{found['memory_mb']:.0f} MB, with a slope of {found['memory_mb_per_hour']:+.1f} MB an hour; open "
        f"files {found['files_per_hour']:+.2f} an hour; {found['tokens_per_second']:,.0f} tokens a second, "
        f"with a slope of {found['tokens_per_second_per_hour']:+,.0f} an hour.",
        "",
    ]
