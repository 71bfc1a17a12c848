"""When to save: the clock of every long run."""

from __future__ import annotations

import time
from collections.abc import Callable


class Cadence:
    """Save so often that saving takes at most a share of the time.

    Parameters
    ----------
    share : of the time since the last save, that the next may take; the first save tells what one costs
    """

    def __init__(self, share: float):
        self.share, self.cost, self.saved_at = share, 0.0, time.monotonic()

    def save(self, save: Callable[[], object]) -> bool:
        """Call `save` if it is time to; return whether it was."""
        began = time.monotonic()
        if (began - self.saved_at) * self.share < self.cost:
            return False
        save()
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - began
        return True
