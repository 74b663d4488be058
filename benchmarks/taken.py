"""A command of phoneready as a process of its own, and what the system says that it took."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Taken:
    """What a process took.

    Attributes:
        seconds: Wall time.
        cpu_seconds: Of all threads.
        peak_rss_bytes: Most memory that it had at once, mapped files included.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def run_phoneready(name: str, words: Sequence[str], *, shown: bool = False, **environment: str) -> Taken:
    """Run a command; one that fails ends this process, too.

    Args:
        name: Of what it does, for the error.
        words: Behind `phoneready`.
        shown: Whether what it prints goes to stdout.
        environment: Variables that differ from this process's.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "phoneready", *words],
        env=os.environ | environment,
        stdout=None if shown else subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name} failed")
    return Taken(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
