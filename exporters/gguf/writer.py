"""Unquantized GGUF files, written tensor by tensor; the same input gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError
from cfsp.models.checkpoint import read_generation_config
from cfsp.models.gguf_model import SAMPLING
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from exporters.checkpoint_reader import open_tensors
from exporters.gguf.architecture import ChosenLayout, add_hyperparameters, read_layout, rope_tensors
from exporters.gguf.quants import find_quant
from exporters.gguf.tensors import FloatArray, tensor_specs
from exporters.gguf.tokenizer_metadata import add_tokenizer
from exporters.job import Provenance

# numpy has no bfloat16, whose bits are those of whole numbers.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_TOKENS_OF_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")


class PlainTensor(NamedTuple):
    """A tensor that is stored unquantized."""

    name: str  # llama.cpp's
    shape: tuple[int, ...]  # outermost dimension first
    kind: str  # F32, F16 or BF16
    values: Callable[[], FloatArray]  # float32; called when it is written, so that one is in memory

    def stored(self) -> npt.NDArray[Any]:
        """What the file gets; raises InputError: a number is too large for float16."""
        values = self.values()
        if self.kind == "BF16":
            return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        if self.kind == "F16" and values.size and float(np.abs(values).max()) > float(np.finfo("f2").max):
            raise InputError("values too large for float16; export f32 or a quantized type", field=self.name)
        return values.astype(_DTYPES[self.kind])


def write_gguf(
    checkpoint: Path,
    path: Path,
    tokenizer: Any,
    provenance: Provenance,
    *,
    quant: str = "f32",
    progress: Progress = no_progress,
) -> ChosenLayout:
    """Write a checkpoint folder as "f32", or with matrices as "f16" or "bf16" and vectors in float32.

    Raises InputError: the checkpoint is unusable, or llama.cpp has no architecture for it.
    """
    row, chosen = find_quant(quant), read_layout(checkpoint)
    lacked = [token for token in _TOKENS_OF_PHI3 if token not in tokenizer.get_vocab()]
    if lacked and any(part in provenance.name.lower() for part in ("phi3", "phi-3")):
        raise InputError(
            f"llama.cpp takes a model of this name for Phi-3, whose tokens {', '.join(lacked)} it lacks",
            field="name",
            value=provenance.name,
            allowed="another one (--name)",
        )

    def add_metadata(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(provenance.name)
        if provenance.license:
            writer.add_license(provenance.license)
        if provenance.base_model:
            writer.add_base_model_count(1)
            organization, _, name = provenance.base_model.rpartition("/")
            writer.add_base_model_name(0, name)
            if organization:
                writer.add_base_model_organization(0, organization)
                writer.add_base_model_repo_url(0, f"https://huggingface.co/{provenance.base_model}")
        writer.add_file_type(row.ftype)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in (provenance.metadata() | {"phoneready.tool_version": tool_version()}).items():
            writer.add_string(key, value)
        if provenance.seed is not None:
            writer.add_int64("phoneready.seed", provenance.seed)
        _add_sampling(writer, read_generation_config(checkpoint))
        add_hyperparameters(writer, chosen)
        add_tokenizer(writer, tokenizer, chosen.config.vocab_size)

    with open_tensors(checkpoint) as opened:
        tensors = [
            PlainTensor(
                spec.name,
                spec.shape,
                row.base_type if spec.is_matrix else "F32",
                partial(spec.build, opened.read),
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
    """Write a file with what `add_metadata` gives a gguf.GGUFWriter, and tensors in their order."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        add_metadata(writer)
        for tensor in tensors:
            kind, dtype = gguf.GGMLQuantizationType[tensor.kind], np.dtype(_DTYPES[tensor.kind])
            n_bytes = math.prod(tensor.shape) * dtype.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(tensor.stored())
            progress(what, done, len(tensors))
    finally:
        writer.close()


_MOST = {"temperature": 1000, "top_k": 2**31 - 1, "top_p": 1, "min_p": 1, "repetition_penalty": 1000}


def _add_sampling(writer: Any, generation_config: Any) -> None:
    """Write how a generation config (or None) says to sample, which llama.cpp's programs do unless told otherwise.

    What is out of range is left out. A config that asks for sampling and says no more has transformers' temperature, 1.
    """
    stated = generation_config.to_diff_dict() if generation_config is not None else {}
    values = {name: stated[name] for name in SAMPLING.values() if stated.get(name) is not None}
    if not values and stated.get("do_sample"):
        values = {"temperature": 1.0}
    for key, name in SAMPLING.items():
        value: Any = values.get(name)
        kinds = (int,) if name == "top_k" else (int, float)
        may_be_zero = name in ("top_k", "min_p")
        if type(value) in kinds and (0 < value <= _MOST[name] or (value == 0 and may_be_zero)):
            getattr(writer, f"add_sampling_{key}")(value)
