"""Unquantized GGUF files, written tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from cfsp.models.checkpoint import read_generation_config
from cfsp.progress import Progress, no_progress
from exporters.checkpoint_reader import open_tensors
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.metadata import add_general, add_hyperparameters, add_sampling, check_name
from exporters.gguf.quants import find_quant
from exporters.gguf.rope import rope_tensors
from exporters.gguf.tensors import FloatArray, tensor_specs
from exporters.gguf.tokenizer_metadata import add_tokenizer
from exporters.provenance import Provenance

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is stored unquantized.

    Attributes:
        name: llama.cpp's.
        shape: Outermost dimension first.
        kind: F32, F16 or BF16.
        values: Gives it, float32; called when it is written, so that one is in memory.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    values: Callable[[], FloatArray]

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's, of its elements; it has none for bfloat16, whose bits are those of whole numbers."""
        return np.dtype(_DTYPES[self.kind])

    @property
    def n_bytes(self) -> int:
        """In the file, padding aside."""
        return math.prod(self.shape) * self.dtype.itemsize

    def stored(self) -> npt.NDArray[Any]:
        """What the file gets.

        Raises:
            InputError: A number is too large for float16.
        """
        values = self.values()
        if self.kind == "BF16":
            return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        if self.kind == "F16" and values.size and float(np.abs(values).max()) > float(np.finfo("f2").max):
            raise InputError("values too large for float16; export f32 or a quantized type", field=self.name)
        return values.astype(self.dtype)


def write_gguf(
    checkpoint: Path,
    path: Path,
    tokenizer: Any,
    provenance: Provenance,
    *,
    quant: str = "f32",
    progress: Progress = no_progress,
) -> ChosenLayout:
    """Write an unquantized file; the same input gives the same bytes.

    Args:
        checkpoint: Hugging Face folder.
        path: File to write.
        tokenizer: The checkpoint's PreTrainedTokenizerFast.
        provenance: Goes into the metadata.
        quant: "f32", or "f16" or "bf16": matrices in that, vectors in float32.
        progress: Told after every tensor.

    Returns:
        How the model went into the file.

    Raises:
        InputError: The checkpoint is unusable, or llama.cpp has no architecture for it.
    """
    row, chosen = find_quant(quant), read_layout(checkpoint)
    check_name(provenance.name, tokenizer.get_vocab())

    def add_metadata(writer: Any) -> None:
        add_general(writer, provenance, row.ftype)
        add_sampling(writer, read_generation_config(checkpoint))
        add_hyperparameters(writer, chosen)
        add_tokenizer(writer, tokenizer, chosen.config.vocab_size)

    with open_tensors(checkpoint) as opened:
        tensors = [
            PlainTensor(
                spec.name,
                spec.shape,
                row.base_type if spec.is_matrix else "F32",
                partial(spec.build, opened),
            )
            for spec in tensor_specs(chosen)
        ]
        tensors = [*plain_rope_tensors(chosen), *tensors]
        write_tensors(
            path, chosen.layout.architecture, add_metadata, tensors, f"writing {quant}", progress=progress
        )
    return chosen


def plain_rope_tensors(chosen: ChosenLayout) -> Iterator[PlainTensor]:
    """The divisors of rotary frequencies that llama.cpp reads from tensors."""
    for name, values in rope_tensors(chosen.config).items():
        yield PlainTensor(name, values.shape, "F32", partial(np.asarray, values))


def write_tensors(
    path: Path,
    architecture: str,
    add_metadata: Callable[[Any], None],
    tensors: Sequence[PlainTensor],
    what: str,
    *,
    progress: Progress = no_progress,
) -> None:
    """Write a file.

    Args:
        path: File to write.
        architecture: llama.cpp's name of it.
        add_metadata: Is given a gguf.GGUFWriter.
        tensors: In the order of the file.
        what: Is written, in words.
        progress: Told after every tensor.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    try:
        add_metadata(writer)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(tensor.stored())
            progress(what, done, len(tensors))
    finally:
        writer.close()
