"""Signals that end a run as Ctrl-C does, also where Python would drop the interrupt."""

from __future__ import annotations

import signal
import sys


def interrupt(number: int, frame: object) -> None:
    """Handle a signal as Ctrl-C."""
    signal.signal(number, signal.SIG_IGN)  # the second one must not interrupt the cleaning up
    raise KeyboardInterrupt


def raise_again(dropped: sys.UnraisableHookArgs) -> None:
    """Raise an interrupt once more that was raised where Python drops what is raised, as in a callback from C."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt) or not hasattr(signal, "SIGALRM"):
        sys.__unraisablehook__(dropped)
        return
    # A timer's signal ends a wait, too; SIGINT might be ignored, as by what a shell starts in the background.
    signal.signal(signal.SIGALRM, _raise)
    signal.setitimer(signal.ITIMER_REAL, 0.05)


def _raise(number: int, frame: object) -> None:
    raise KeyboardInterrupt
