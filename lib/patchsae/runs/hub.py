"""Files of the Hugging Face hub: fetched once, kept where its own library keeps them; and sent there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from patchsae.runs.errors import PatchSAEError, brief

PREFIXES = ("hf:", "hf-hub:")  # ours, and the one that open_clip writes
CARD_PAGE = "README.md"  # where the hub looks for a model card


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


def send(name: str, files: Mapping[str, Path | bytes], message: str, private: bool = False) -> str:
    """Put files into the model repository `organisation/name`, in one commit; return its address.

    The repository is made if there is none. What else it holds stays.

    Parameters
    ----------
    files : content, or the file that has it, by its name there
    private : whether a repository that is made is private

    Raises
    ------
    PatchSAEError : there is no network, no token of an account, or no right to the name.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    try:
        hub.create_repo(name, private=private, exist_ok=True)
        adds = [CommitOperationAdd(where, content) for where, content in files.items()]
        return str(hub.create_commit(name, adds, commit_message=message).repo_url)
    except Exception as error:
        raise PatchSAEError(
            f"'{name}' could not be sent to the Hugging Face hub ({brief(error)}); log in with `hf auth "
            "login`, correct the name, or give a folder to write to instead."
        ) from error


def front_matter(**fields: object) -> str:
    """Return the YAML head of a model card with the given fields, in the hub's form."""
    from huggingface_hub import ModelCardData

    given = {key: value for key, value in fields.items() if value is not None}
    return f"---\n{ModelCardData(**given).to_yaml()}\n---\n"
