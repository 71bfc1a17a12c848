"""The end of a command from outside: Ctrl-C, a scheduler, a terminal that closed, a parent that died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies


class Stopped(KeyboardInterrupt):
    """Tell which signal ended a command."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.number


@contextlib.contextmanager
def stoppable(first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Let the signals that end a command raise `Stopped` in the block, so that it tidies up.

    `first` is called as soon as one comes. A second signal ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return

    def stop(number: int, _: object) -> None:
        for other in STOPS:
            signal.signal(other, signal.SIG_DFL)
        first()
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        if before[number] is not signal.SIG_IGN or number == signal.SIGINT:  # nohup ignores the others
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """In a child, before it runs another program: let it end when this process does, even by SIGKILL."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before
            os._exit(1)
