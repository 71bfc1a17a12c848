"""The one error a user is meant to read."""


class PatchSAEError(ValueError):
    """Tell in one sentence what was wrong with the input and what to do about it."""
