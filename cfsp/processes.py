"""Several processes over one text: each runs some of the windows, and what they sum up is summed over all of them.

torch's launcher starts them, on one machine or on several:

    torchrun --standalone --nproc_per_node 2 -m phoneready prune ...

Sums are the same numbers in every process, so every one of them decides alike, as long as their processors compute
alike. Without `joined`, or in a process that was started alone, every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

import torch
from torch import distributed

_PATIENCE = timedelta(days=1)
"""How long processes wait for each other: one of them may write the text while the others do nothing."""
_JOINED = ContextVar("joined", default=False)
"""Whether passes are shared: the group of processes that a trainer makes is its own."""


@contextmanager
def joined() -> Iterator[bool]:
    """Let the processes that a launcher started know each other inside the context; whether this is the first one.

    On GPUs each takes the one of its number on its machine.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group(timeout=_PATIENCE)
    before = _JOINED.set(True)
    try:
        yield number() == 0
        distributed.barrier()
    finally:
        _JOINED.reset(before)
        distributed.destroy_process_group()


@contextmanager
def first_ahead() -> Iterator[None]:
    """The first process runs the body before all others, which then find what it has kept."""
    if number() > 0:
        distributed.barrier()
    yield
    if count() > 1 and number() == 0:
        distributed.barrier()


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _JOINED.get() else 1


def number() -> int:
    """Which of them this one is."""
    return distributed.get_rank() if count() > 1 else 0


def mine(windows: torch.Tensor) -> torch.Tensor:
    """This process's share of windows (nsamples, seqlen); all of them in every process, where there are fewer.

    Either way a mean is what `summed` makes of the sums over `summed` numbers of tokens.
    """
    return windows if len(windows) < count() else windows[number() :: count()]


def summed(total: torch.Tensor) -> torch.Tensor:
    """A sum over this process's windows, of any shape, which becomes that over all processes' in place."""
    if count() > 1:
        distributed.all_reduce(total)
    return total


def number_summed(total: float) -> float:
    """`summed` of a number."""
    return float(summed(torch.tensor(total, dtype=torch.float64))) if count() > 1 else total
