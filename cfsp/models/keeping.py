"""How a model's weights are kept: in memory as float32 or in 16 bits, or in files; as asked, or as there is room.

Whatever is kept in fewer bytes is float32 in memory for as long as something computes with it (`cfsp.models.paging`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from cfsp.errors import InputError
from cfsp.memory import free_memory
from cfsp.models.weights import safetensors_files, uniform_dtype, weight_count

VARIABLE = "PHONEREADY_STREAM"
"""The environment's word on when weights stay in files."""
ALWAYS, NEVER, AUTO = "always", "never", "auto"
_SHARE = 0.5
"""Of free memory, which a model may take before its weights are kept in fewer bytes."""
_IN_FILES = ContextVar("in_files", default=False)
NARROW: Mapping[str, torch.dtype] = MappingProxyType({"bfloat16": torch.bfloat16, "float16": torch.float16})
"""Names in `cfsp.precision.DTYPES` that weights may be kept in -> 16 bits."""


@dataclass(frozen=True)
class Keeping:
    """How weights are kept while they are not at hand.

    Attributes:
        dtype: In which.
        in_files: Whether in files.
    """

    dtype: torch.dtype = torch.float32
    in_files: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether all are at hand always."""
        return self == WHOLE


WHOLE = Keeping()


@contextmanager
def stay_in_files() -> Iterator[None]:
    """Where nobody asks for something else, models are read block by block inside the context, whatever is free."""
    before = _IN_FILES.set(True)
    try:
        yield
    finally:
        _IN_FILES.reset(before)


def stays_in_files(n_bytes: int) -> bool:
    """Whether weights that would take so much memory are to be kept in fewer bytes, or in files.

    Raises:
        InputError: The environment asks for something that is not known.
    """
    asked = os.environ.get(VARIABLE) or AUTO
    if asked not in (ALWAYS, NEVER, AUTO):
        allowed = ", ".join((AUTO, ALWAYS, NEVER))
        raise InputError("unknown", field=VARIABLE, value=asked, allowed=allowed)
    wanted = _IN_FILES.get() or n_bytes > _SHARE * free_memory()
    return asked == ALWAYS or (asked == AUTO and wanted)


def keeping_of(n_weights: int, stored: torch.dtype | None, asked: str = AUTO) -> Keeping:
    """The first way that has room: whole, where 16 bits are not asked for; in 16 bits, where files have no others; in
    files, where these hold what is asked for.

    Args:
        n_weights: All of them.
        stored: The dtype of all that the files hold; None where there are several.
        asked: A name in `cfsp.precision.DTYPES`.

    Raises:
        InputError: As `stays_in_files`.
    """
    narrow = NARROW.get(asked)
    if narrow is None and not stays_in_files(n_weights * torch.float32.itemsize):
        return WHOLE
    if asked == AUTO and stored in NARROW.values():
        narrow = stored
    if narrow is not None and not stays_in_files(n_weights * narrow.itemsize):
        return Keeping(narrow)
    if stored is not None and (stored == narrow or asked not in NARROW):
        return Keeping(stored, in_files=True)
    return WHOLE if narrow is None else Keeping(narrow)  # refused where memory does not hold it


def keeping_of_files(folder: Path, asked: str = AUTO) -> Keeping:
    """As `keeping_of`, for the weights of a Hugging Face folder.

    Raises:
        InputError: A file is missing or damaged.
    """
    files = safetensors_files(folder)
    return keeping_of(weight_count(files, tied=False), uniform_dtype(files), asked)
