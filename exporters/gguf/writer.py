"""A checkpoint folder as one unquantized GGUF file, written tensor by tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from exporters.checkpoint_reader import CheckpointTensors, open_tensors
from exporters.gguf.architecture import ChosenLayout, TensorSpec, read_layout, tensor_specs
from exporters.gguf.metadata import add_general, add_hyperparameters, check_name
from exporters.gguf.quants import find_quant
from exporters.gguf.rope import rope_tensors
from exporters.gguf.tokenizer_metadata import add_tokenizer
from exporters.provenance import Provenance


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
        quant: "f32", or "f16": matrices in float16, vectors in float32.
        progress: Told after every tensor.

    Returns:
        How the model went into the file.

    Raises:
        InputError: The checkpoint is unusable, or llama.cpp has no architecture for it.
    """
    import gguf

    row, chosen = find_quant(quant), read_layout(checkpoint)
    half, specs, factors = row.base_type == "F16", tensor_specs(chosen), rope_tensors(chosen.config)
    check_name(provenance.name, tokenizer.get_vocab())
    writer = gguf.GGUFWriter(path, chosen.layout.architecture)
    try:
        add_general(writer, provenance, row.ftype)
        add_hyperparameters(writer, chosen)
        add_tokenizer(writer, tokenizer, chosen.config.vocab_size)
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for spec in specs:
            dtype = _dtype(spec, half)
            writer.add_tensor_info(spec.name, spec.shape, dtype, math.prod(spec.shape) * dtype.itemsize)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        with open_tensors(checkpoint) as tensors:
            for done, spec in enumerate(specs, start=1):
                writer.write_tensor_data(_stored(spec, tensors, half))
                progress(f"writing {quant}", done, len(specs))
    finally:
        writer.close()
    return chosen


def _dtype(spec: TensorSpec, half: bool) -> np.dtype[Any]:
    return np.dtype(np.float16 if half and len(spec.shape) == 2 else np.float32)


def _stored(spec: TensorSpec, tensors: CheckpointTensors, half: bool) -> npt.NDArray[Any]:
    values = spec.build(tensors)
    dtype = _dtype(spec, half)
    if dtype == np.float16 and values.size and float(np.abs(values).max()) > float(np.finfo(np.float16).max):
        raise InputError("values too large for float16; export f32 or a quantized type", field=spec.name)
    return values.astype(dtype)
