"""A model's size by the headers of its files, and whether memory and disk have room for what it needs."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import safetensors
import torch

from cfsp.errors import InputError
from cfsp.files import large_temporary
from cfsp.memory import require_memory
from cfsp.models.architectures import spec_for, state_size
from cfsp.models.config_file import read_model_config
from cfsp.models.families import FAMILIES
from cfsp.models.gguf_file import EMBEDDING, OUTPUT, read_gguf
from cfsp.models.gguf_model import config_from_gguf, keeping_of_gguf
from cfsp.models.offload import AUTO, NARROW, WHOLE, Keeping
from cfsp.models.reference import config_from_settings, is_folded, keeping_of_folder, text_names
from cfsp.models.weights import OUTPUT_MATRIX, safetensors_files, uniform_dtype
from cfsp.reading import as_input_error
from cfsp.units import format_bytes

_BLOCK = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")
_EMBEDDINGS, _OUTPUTS = (EMBEDDING, "model.embed_tokens.weight"), (OUTPUT, OUTPUT_MATRIX)


@dataclass(frozen=True)
class Extent:
    """How large a model is."""

    blocks: tuple[tuple[tuple[int, int], ...], ...]  # of every block its matrices, (rows, columns)
    vocab_size: int  # rows of the embedding
    hidden_size: int  # its columns
    tied: bool  # whether it is the output matrix, too
    beside: int = 0  # weights of all other matrices, such as a further table of tokens
    stored_bytes: int = 4  # of a weight, in a checkpoint that is made of the model
    keeping: Keeping = WHOLE
    state_size: int = 0  # numbers held of a token between blocks; 0 for `hidden_size`
    is_alone: bool = True  # whether a block is given nothing but hidden states

    @cached_property
    def block_weights(self) -> int:
        """Weights of all blocks."""
        return sum(math.prod(shape) for block in self.blocks for shape in block)

    @property
    def end_weights(self) -> int:
        """Weights of the embedding, or of the output matrix."""
        return self.vocab_size * self.hidden_size

    @property
    def n_weights(self) -> int:
        """All but norms and biases."""
        return self.block_weights + self.beside + self.end_weights * (1 if self.tied else 2)

    @property
    def least_weights(self) -> int:
        """If the output matrix is the embedding after all, which a file may hold twice."""
        return self.block_weights + self.beside + self.end_weights

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """FFN channels of every block: the most inputs of a matrix."""
        return tuple(max((columns for _, columns in block), default=0) for block in self.blocks)

    @property
    def by_blocks(self) -> bool:
        """Whether the weights stay in files."""
        return self.keeping.in_files

    @property
    def least_resident_bytes(self) -> int:
        """Least bytes of weights in memory at once."""
        return 0 if self.keeping.in_files else self.keeping.dtype.itemsize * self.least_weights

    def states_bytes(self, tokens: int) -> int:
        """Bytes of hidden states at one depth, float32."""
        return 4 * tokens * (self.state_size or self.hidden_size)


def read_extent(path: Path, dtype: str = AUTO) -> Extent:
    """The size of a GGUF file or Hugging Face folder, its weights kept in a dtype, by headers; raises InputError."""
    stored, keeping = torch.float32, WHOLE
    if path.is_file():
        file = read_gguf(path)
        tensors = [(tensor.name, tensor.shape) for tensor in file.tensors]
        config, keeping = config_from_gguf(file), keeping_of_gguf(file, dtype)
    else:
        settings, config = read_model_config(path), None
        if (row := FAMILIES.get(settings["model_type"])) is not None and row.own_arguments:
            config = config_from_settings(settings, str(path))
        tensors = []
        for one in safetensors_files(path):
            with as_input_error(f"{one} is damaged or cut short"), safetensors.safe_open(one, "pt") as opened:
                names = text_names(path, opened.keys())
                tensors += [(ours, tuple(opened.get_slice(n).get_shape())) for n, ours in names.items()]
        if not is_folded(path):  # else it is float32 before it is anything else
            keeping = keeping_of_folder(path, dtype)
            stored = uniform_dtype(safetensors_files(path)) or torch.float32
    blocks: dict[int, list[tuple[int, int]]] = {}
    shapes, beside = dict(tensors), 0
    for name, shape in tensors:
        if len(shape) == 2 and (block := _BLOCK.search(name)):
            blocks.setdefault(int(block[1]), []).append((shape[0], shape[1]))
        elif len(shape) == 2 and name not in (*_EMBEDDINGS, *_OUTPUTS):
            beside += math.prod(shape)
    embedding = next((shapes[name] for name in _EMBEDDINGS if name in shapes), ())
    if not blocks or len(embedding) != 2:
        raise InputError(f"{path} holds no decoder with an embedding")
    own = config is not None and bool(spec_for(config).own_arguments)
    return Extent(
        tuple(tuple(blocks[index]) for index in sorted(blocks)),
        *embedding,
        tied=not any(name in shapes for name in _OUTPUTS),
        beside=beside,
        stored_bytes=NARROW.get(dtype, stored).itemsize,
        keeping=keeping,
        state_size=state_size(config) if own else 0,
        is_alone=not own,
    )


@dataclass(frozen=True)
class Needs:
    """Least bytes in memory, at the output, and in the folder for temporary files."""

    memory: int = 0
    disk: int = 0
    scratch: int = 0


def require_room(needs: Needs, output: Path | None, what: str, less: str = "a smaller model") -> None:
    """Raise InputError for what cannot fit, before anything is written; `less`: what would take less memory."""
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
