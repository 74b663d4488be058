"""Several processes over one text: each runs some of the windows, and sums are over all of them.

torch's launcher starts them, on one machine or on several:

    torchrun --standalone --nproc_per_node 2 -m phoneready prune ...

Sums are the same numbers in every process, so all decide alike if their processors compute alike. Without `joined`, or
in a process that was started alone, every function here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

import torch
from torch import distributed

from cfsp.errors import InputError, PhonereadyError

PATIENCE = timedelta(days=1)
"""How long processes wait for each other: one may write the text while the others do nothing."""
_JOINED = ContextVar("joined", default=False)
"""Whether passes are shared: the group of processes that a trainer makes is its own."""


@contextmanager
def joined(device: str = "auto") -> Iterator[bool]:
    """Connect the processes that a launcher started inside the context; whether this is the first one.

    Raises:
        InputError: Processes would have to share a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    if device == "mps":
        raise InputError("several processes cannot share it", field="device", value=device, allowed="cpu")
    if device != "cpu" and torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > (1 if ":" in device else gpus):
            problem = f"{here} processes want a GPU each"
            raise InputError(problem, field="device", value=device, allowed="cpu, cuda")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(timeout=PATIENCE)
    before = _JOINED.set(True)
    try:
        yield number() == 0
        _wait()
    finally:
        _JOINED.reset(before)
        distributed.destroy_process_group()


@contextmanager
def _ended_as_an_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PhonereadyError("another process has ended, and says why") from error


def _wait() -> None:
    """Until all processes are here."""
    with _ended_as_an_error():
        distributed.barrier()


@contextmanager
def first_ahead() -> Iterator[None]:
    """The first process runs the body before all others, which find what it has kept if they share its disk."""
    if number() > 0:
        _wait()
    yield
    if count() > 1 and number() == 0:
        _wait()


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _JOINED.get() else 1


def number() -> int:
    """Which of them this one is."""
    return distributed.get_rank() if count() > 1 else 0


def mine(windows: torch.Tensor) -> torch.Tensor:
    """This process's share of windows (nsamples, seqlen); all of them in every process, if there are fewer.

    Either way a mean is what `summed` makes of the sums over `summed` numbers of tokens.
    """
    return windows if len(windows) < count() else windows[number() :: count()]


def summed(total: torch.Tensor) -> torch.Tensor:
    """A sum over this process's windows, which becomes that over all processes' in place."""
    if count() > 1:
        with _ended_as_an_error():
            distributed.all_reduce(total)
    return total


def number_summed(total: float) -> float:
    """`summed` of a number."""
    return float(summed(torch.tensor(total, dtype=torch.float64))) if count() > 1 else total


def require_alike(sha256: str, what: str) -> None:
    """Raise InputError if another process has another hash."""
    ours = torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.int64)
    if not torch.equal(summed(ours.clone()), count() * ours):
        raise InputError(f"not all processes have the same {what}")
