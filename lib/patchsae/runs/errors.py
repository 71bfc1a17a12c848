"""The one error a user is meant to read."""

from enum import StrEnum


def printable(text: object) -> str:
    """Return text that every terminal, file and page can hold.

    The name of a file may be bytes that are not UTF-8, which Python keeps as halves of characters.
    """
    text = str(text)
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # halves that stand for no byte
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


class PatchSAEError(ValueError):
    """Tell in one sentence what was wrong with the input and what to do about it."""

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


def brief(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says."""
    first = str(error).strip().partition("\n")[0][:160].rstrip(" .:")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def choose(config: object, name: str, kind: type[StrEnum]) -> None:
    """Turn a field of a frozen dataclass into a member of an enumeration, or say which there are."""
    try:
        object.__setattr__(config, name, kind(getattr(config, name)))
    except ValueError:
        raise PatchSAEError(
            f"{name}='{getattr(config, name)}' is unknown; choose one of {', '.join(kind)}."
        ) from None
