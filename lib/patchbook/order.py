"""Which chapter reads what which other leaves in `results`, for the build and for sweeps on a cluster."""

from __future__ import annotations

from collections.abc import Collection

READS: dict[str, tuple[str, ...]] = {
    "01_training": (),
    "02_statistics": ("01_training",),
    "03_localization": ("01_training", "02_statistics"),
    "04_masking": ("01_training",),
    "05_adaptation": ("01_training", "02_statistics", "04_masking"),
    "06_appendix": ("01_training",),
    "07_explorer": ("01_training", "02_statistics"),
}
"""Each chapter's readings; one that is not here reads all before it. Every chapter also works alone."""

TRAINS = "01_training"  # trains the autoencoder that the others read, where none is shipped


def readings(chapters: list[str], shipped: bool, executed: Collection[str] = ()) -> dict[str, set[str]]:
    """Return for each chapter those of `chapters` that it has to wait for.

    shipped: the autoencoder comes with the repository, so that nobody waits for its training.
    executed: chapters whose results lie there from before; only a chapter that is not in READS waits for
    them too.
    """
    before = {name: READS.get(name, tuple(chapters[:at])) for at, name in enumerate(chapters)}
    shipped_with = {TRAINS} if shipped else set()
    return {
        name: (set(read) & set(chapters)) - shipped_with - (set(executed) if name in READS else set())
        for name, read in before.items()
    }
