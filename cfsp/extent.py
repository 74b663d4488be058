"""How much of a model there is, by the heads of its files; and whether memory and disk have room for what it needs."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch

from cfsp.errors import InputError
from cfsp.files import large_temporary
from cfsp.memory import require_memory
from cfsp.models.architectures import spec_for, state_size
from cfsp.models.config_file import read_model_config
from cfsp.models.families import FAMILIES
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import config_from_gguf, keeping_of_gguf
from cfsp.models.hf_folder import config_from_settings, is_folded, keeping_of_folder, text_names
from cfsp.models.offload import AUTO, NARROW, WHOLE, Keeping
from cfsp.models.weights import OUTPUT_MATRIX, safetensors_files, uniform_dtype
from cfsp.reading import as_input_error
from cfsp.units import format_bytes

_BLOCK = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")
_ENDS = MappingProxyType(
    {
        "token_embd.weight": "embedding",
        "model.embed_tokens.weight": "embedding",
        "output.weight": "output",
        OUTPUT_MATRIX: "output",
    }
)
"""Name in a file -> which end of the model it is."""
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Extent:
    """How much of a model there is.

    Attributes:
        blocks: Of every block its matrices, (rows, columns).
        vocab_size: Rows of the embedding.
        hidden_size: Its columns.
        tied: Whether it is the output matrix, too.
        beside: Weights of all other matrices, such as a further table of tokens.
        stored_bytes: Of a weight, in a checkpoint that is made of the model.
        keeping: How the weights are kept.
        state_size: Numbers that are held of a token between blocks; 0 for `hidden_size`.
        is_alone: Whether a block is given nothing but hidden states.
        on_cpu: Whether the CPU computes what is done with it.
    """

    blocks: tuple[tuple[tuple[int, int], ...], ...]
    vocab_size: int
    hidden_size: int
    tied: bool
    beside: int = 0
    stored_bytes: int = 4
    keeping: Keeping = WHOLE
    state_size: int = 0
    is_alone: bool = True
    on_cpu: bool = True

    @cached_property
    def block_weights(self) -> int:
        """Of all blocks."""
        return sum(math.prod(shape) for block in self.blocks for shape in block)

    @property
    def end_weights(self) -> int:
        """Of the embedding, or of the output matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def n_weights(self) -> int:
        """All of them, but for norms and biases."""
        return self.block_weights + self.beside + self.end_weights * (1 if self.tied else 2)

    @property
    def least_weights(self) -> int:
        """Where the output matrix is the embedding after all, which a file may hold twice."""
        return self.block_weights + self.beside + self.end_weights

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Of every block the most inputs of a matrix: its FFN's channels."""
        return tuple(max((columns for _, columns in block), default=0) for block in self.blocks)

    @property
    def by_blocks(self) -> bool:
        """Whether the weights stay in files."""
        return self.keeping.in_files

    @property
    def least_resident_bytes(self) -> int:
        """Of weights that are in memory at once, at least."""
        return 0 if self.keeping.in_files else self.keeping.dtype.itemsize * self.least_weights

    def states_bytes(self, tokens: int) -> int:
        """Of hidden states at one depth, float32."""
        return 4 * tokens * (self.state_size or self.hidden_size)


def read_extent(path: Path, dtype: str = AUTO) -> Extent:
    """How much of a model there is, from the heads of its files alone.

    Args:
        path: A GGUF file, or a Hugging Face folder.
        dtype: That weights are kept in, a name in `cfsp.precision.DTYPES`.

    Raises:
        InputError: Files are missing or damaged, or hold no decoder.
    """
    if path.is_file():
        file = read_gguf(path)
        extent = _extent(((tensor.name, tensor.shape) for tensor in file.tensors), str(path))
        extent, stored = replace(extent, keeping=keeping_of_gguf(file, dtype)), torch.float32
        config = config_from_gguf(file)
    else:
        # What is loaded as another type is float32 before it is anything else.
        keeping = WHOLE if is_folded(path) else keeping_of_folder(path, dtype)
        extent = replace(_extent(_folder_shapes(path), str(path)), keeping=keeping)
        stored = torch.float32 if is_folded(path) else uniform_dtype(safetensors_files(path)) or torch.float32
        config = _folder_config(path)
    if config is not None and spec_for(config).own_arguments:
        extent = replace(extent, state_size=state_size(config), is_alone=False)
    return replace(extent, stored_bytes=NARROW.get(dtype, stored).itemsize)


def _folder_config(folder: Path) -> Any:
    """A folder's configuration where it is of a type whose blocks are given more than hidden states; else None."""
    settings = read_model_config(folder)
    row = FAMILIES.get(settings["model_type"])
    return config_from_settings(settings, str(folder)) if row is not None and row.own_arguments else None


def _folder_shapes(folder: Path) -> Iterator[tuple[str, _Shape]]:
    for file in safetensors_files(folder):
        with as_input_error(f"{file} is damaged or cut short"), safetensors.safe_open(file, "pt") as opened:
            names = text_names(folder, opened.keys())
            yield from ((ours, tuple(opened.get_slice(name).get_shape())) for name, ours in names.items())


def _extent(tensors: Iterable[tuple[str, _Shape]], where: str) -> Extent:
    blocks: dict[int, list[tuple[int, int]]] = {}
    ends: dict[str, _Shape] = {}
    beside = 0
    for name, shape in tensors:
        if len(shape) == 2 and (block := _BLOCK.search(name)):
            blocks.setdefault(int(block[1]), []).append((shape[0], shape[1]))
        elif name in _ENDS:
            ends[_ENDS[name]] = shape
        elif len(shape) == 2:
            beside += math.prod(shape)
    if not blocks or len(ends.get("embedding", ())) != 2:
        raise InputError(f"{where} holds no decoder with an embedding")
    rows, columns = ends["embedding"]
    in_order = tuple(tuple(blocks[index]) for index in sorted(blocks))
    return Extent(in_order, rows, columns, tied="output" not in ends, beside=beside)


@dataclass(frozen=True)
class Needs:
    """Bytes that something needs at least: in memory, where its output goes, and in the folder for temporary files."""

    memory: int = 0
    disk: int = 0
    scratch: int = 0


def require_room(needs: Needs, output: Path | None, what: str, less: str = "a smaller model") -> None:
    """Refuse what cannot fit, before anything is written; `less`: what would take less memory.

    Raises:
        InputError: Memory, the file system of the output, or that of scratch files has too little room.
    """
    require_memory(needs.memory, what, less)
    places = [(large_temporary(), needs.scratch, "another folder (TMPDIR)")]
    if output is not None:
        places.insert(0, (output, needs.disk, "another place (-o)"))
    # Each for itself, on one disk too: what is in the one may be gone before the other is written.
    for path, n_bytes, allowed in places:
        there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        if n_bytes and n_bytes > (free := shutil.disk_usage(there).free):
            raise InputError(
                f"no space left to write {path}: {what} takes {format_bytes(n_bytes)} at least, and "
                f"{format_bytes(free)} are free",
                allowed=allowed,
            )
