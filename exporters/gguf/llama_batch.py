"""llama.cpp's batches of several sequences, built from plain lists; the runtime decodes them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exporters.gguf.llama_library import library


@dataclass(frozen=True)
class Entry:
    """One token of a batch.

    Attributes:
        token: Its id.
        position: Its place in its sequences.
        sequences: Sequences that it belongs to; it attends to what came before in them.
        wanted: Whether the logits after it are wanted.
    """

    token: int
    position: int
    sequences: tuple[int, ...]
    wanted: bool = False


def native_batch(entries: Sequence[Entry]) -> tuple[Any, list[Any]]:
    """A llama_batch, and the arrays that it points to, which must live as long as it is used."""
    lib = library()
    count = len(entries)
    ids = [(lib.llama_seq_id * len(e.sequences))(*e.sequences) for e in entries]
    pointer = ctypes.POINTER(lib.llama_seq_id)
    arrays: dict[str, Any] = {
        "token": (lib.llama_token * count)(*(e.token for e in entries)),
        "pos": (lib.llama_pos * count)(*(e.position for e in entries)),
        "n_seq_id": (ctypes.c_int32 * count)(*(len(e.sequences) for e in entries)),
        "seq_id": (pointer * count)(*(ctypes.cast(array, pointer) for array in ids)),
        "logits": (ctypes.c_int8 * count)(*(e.wanted for e in entries)),
    }
    batch = lib.llama_batch()
    batch.n_tokens = count
    for name, array in arrays.items():
        setattr(batch, name, ctypes.cast(array, type(getattr(batch, name))))
    return batch, [*arrays.values(), ids]
