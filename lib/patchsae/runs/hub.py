"""Files of the Hugging Face hub, fetched once and kept where its own library keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from patchsae.runs.errors import PatchSAEError, brief

PREFIXES = ("hf:", "hf-hub:")  # ours, and the one that open_clip writes


def hub_name(name: str) -> str | None:
    """Return the `organisation/name` that a name with a prefix means; None for one without."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), None)


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Return the folder that holds the files of `organisation/name` that match the patterns.

    Raises
    ------
    PatchSAEError : there is no network, no such name, or no right to it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the library has many, and the remedy is one
        raise PatchSAEError(
            f"'{name}' could not be fetched from the Hugging Face hub ({brief(error)}); "
            "correct the name, or fetch it where there is a network and give the folder."
        ) from error
