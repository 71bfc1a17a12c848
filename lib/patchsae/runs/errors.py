"""The one error a user is meant to read."""

from enum import StrEnum


class PatchSAEError(ValueError):
    """Tell in one sentence what was wrong with the input and what to do about it."""


def choose(config: object, name: str, kind: type[StrEnum]) -> None:
    """Turn a field of a frozen dataclass into a member of an enumeration, or say which there are."""
    try:
        object.__setattr__(config, name, kind(getattr(config, name)))
    except ValueError:
        raise PatchSAEError(
            f"{name}='{getattr(config, name)}' is unknown; choose one of {', '.join(kind)}."
        ) from None
