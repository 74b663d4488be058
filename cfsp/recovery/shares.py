"""Whether several processes share out the weights, and how much memory training takes in each of them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import distributed

from cfsp.errors import InputError
from cfsp.forecast import Extent
from cfsp.memory import usable_memory
from cfsp.recovery.settings import MUON, Training, method_of

AUTO, ALWAYS, NEVER = "auto", "always", "never"
SHARDING = (AUTO, ALWAYS, NEVER)
_SHARE = 0.75
"""Of a process's memory, which training may take there before weights are shared out; the rest is for what is not
counted: logits, buckets of gradients, libraries."""
_STATES = 8
"""Tensors as large as the hidden states that a block keeps for the way back."""


def training_bytes(
    settings: Training,
    student: Extent,
    teacher: Extent | None,
    *,
    teacher_itemsize: int = 4,
    shares: int = 1,
) -> int:
    """Bytes that a process holds while it trains: weights, gradients, moments, teacher, and hidden states.

    Args:
        settings: How to train.
        student: The model.
        teacher: The dense model, where the loss reads it.
        teacher_itemsize: Bytes of one of its weights.
        shares: Processes that have all weights between them; 1: each has all.
    """
    method = method_of(settings)
    trained = not (method.adapter or method.through_rounding)
    models = [(student, 4, 2 if trained else 1)]
    models += [(teacher, teacher_itemsize, 1)] if teacher else []
    held = sum(itemsize * model.n_weights for model, itemsize, _ in models)
    if trained:  # gradients and moments: AdamW has two of a weight, Muon one of what it moves
        held += 12 * student.n_weights - (4 * student.block_weights if settings.optimizer == MUON else 0)
    # What is whole for a while, with its gradient: the ends of the model, and a block.
    whole = sum(
        itemsize * kept * (model.n_weights - model.block_weights + model.largest_block)
        for model, itemsize, kept in models
    )
    states = _STATES * len(student.blocks) * student.states_bytes(settings.batch_size * settings.seqlen)
    return held // shares + states + (whole if shares > 1 else 0)


def is_to_be_sharded(
    asked: str,
    settings: Training,
    extents: Callable[[], tuple[Extent, Extent | None]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    processes: int,
) -> bool:
    """Whether the weights are shared out; all processes have the same answer.

    Args:
        asked: A name in SHARDING; "auto" shares out what one process would not have memory for.
        settings: How to train.
        extents: Reads how large the model is, and the teacher where the loss reads one.
        dtype: Of the teacher's weights.
        device: Where this process trains.
        processes: How many there are.

    Raises:
        InputError: An unknown name; or weights that cannot be shared out are to be.
    """
    if asked not in SHARDING:
        raise InputError("unknown", field="shard", value=asked, allowed=", ".join(SHARDING))
    problem = "there is one process alone" if processes == 1 else ""
    if method_of(settings).through_rounding:
        problem = "training through a rounding is not shared out"
    if problem and asked == ALWAYS:
        raise InputError(problem, field="shard", value=asked, allowed=f"{AUTO}, {NEVER}")
    if problem or asked != AUTO:
        return asked == ALWAYS
    student, teacher = extents()
    needed = training_bytes(settings, student, teacher, teacher_itemsize=dtype.itemsize)
    too_large = torch.tensor(float(needed > _SHARE * _memory(device)), device=device)
    distributed.all_reduce(too_large)
    return bool(too_large)


def _memory(device: torch.device) -> int:
    """Bytes that a process may use where it trains, free or not: a killed run that goes on has to decide alike."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return usable_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
