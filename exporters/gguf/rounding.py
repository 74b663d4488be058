"""The numbers of a written file, chosen for a text.

llama.cpp's quantizer rounds each block of a row by itself. Here the file that it wrote keeps its types and layout, and
its numbers are chosen anew, for the inputs that the rounded layers before give. Where a type has a code for each number
(`exporters.gguf.packing`), GPTQ and coordinate descent choose these codes, and scales that are free; where one stands
for several, ggml rounds block after block, each to make up for what those before have lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cfsp.models.checkpoint import open_pruned
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.models.offload import WHOLE, Keeping
from cfsp.progress import Progress, no_progress
from exporters.gguf.architecture import read_layout
from exporters.gguf.fallbacks import block_of
from exporters.gguf.imatrix import floored
from exporters.gguf.llama_library import dequantized
from exporters.gguf.llama_library import stored as in_type
from exporters.gguf.packing import PACKINGS, WHOLE_BLOCKS, StoredMatrix
from exporters.gguf.tensors import TensorSpec, tensor_specs
from exporters.matrices import slope_of
from exporters.quantize.gptq import gptq_blocks, gptq_codes
from exporters.quantize.refine import refine_codes
from exporters.quantize.walk import Readings, alike, round_blocks

_NOTHING, _LEAST = 1e-30, 2.0**-24
"""A scale for which every code stands for nothing, and the least that float16 holds."""
_TABLE = "model.embed_tokens"
_CHOSEN = (*PACKINGS, *WHOLE_BLOCKS)
_ROWS = 8192
"""Of a matrix that are chosen at once: they do not depend on each other."""


def round_for_text(
    checkpoint: Path,
    base: Path,
    path: Path,
    input_ids: torch.Tensor,
    *,
    device: str = "cpu",
    keeping: Keeping = WHOLE,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Choose the numbers of a file anew, in place.

    Args:
        checkpoint: Hugging Face folder.
        base: The float32 file of it.
        path: A file that llama.cpp has quantized from that one.
        input_ids: Text to round for, (nsamples, seqlen).
        device: Where to compute.
        keeping: How the model's weights are kept.
        progress: Told after each block.

    Returns:
        Matrix whose numbers were chosen -> their slope (`exporters.matrices`).

    Raises:
        InputError: What the layers read is not finite.
    """
    model = open_pruned(checkpoint, device, keeping)
    chosen = read_layout(checkpoint)
    matrices = [spec for spec in tensor_specs(chosen) if spec.is_matrix]
    specs = {spec.sources[0][0].removesuffix(".weight"): spec for spec in matrices}
    tied, total = chosen.config.tie_word_embeddings, chosen.config.num_hidden_layers + 1
    with path.open("r+b") as stream:
        file = _File(stream, specs, _tensors(base), _tensors(path))
        if not tied:
            table = file.stored[specs[_TABLE].name].dequantize()
            rows = torch.from_numpy(table.copy()).to(device)
            model.get_input_embeddings().weight = nn.Parameter(rows, requires_grad=False)
        gram = round_blocks(
            model,
            input_ids,
            lambda _, readings: file.round(readings),
            progress=lambda _, done, all_of_them: progress(f"rounding {path.stem}", done, all_of_them),
        )
        file.choose_output(_TABLE if tied else "lm_head", gram)
        progress(f"rounding {path.stem}", total, total)
    return file.slopes


def _tensors(path: Path) -> dict[str, GGUFTensor]:
    return {tensor.name: tensor for tensor in read_gguf(path).tensors}


@dataclass
class _File:
    """A file whose numbers change.

    Attributes:
        stream: Of the file.
        specs: Its matrices, by the first module that each is made of.
        exact: Tensors of the one that it was quantized from.
        stored: Its own, as they were.
        slopes: Of the matrices that were changed.
    """

    stream: BinaryIO
    specs: Mapping[str, TensorSpec]
    exact: Mapping[str, GGUFTensor]
    stored: Mapping[str, GGUFTensor]
    slopes: dict[str, float] = field(default_factory=dict)

    def round(self, readings: Readings) -> dict[str, torch.Tensor]:
        """Choose numbers of the matrices that are about to read; module -> what its weight has become."""
        specs = {module: self.specs[module] for module in readings if module in self.specs}
        kinds = {module: self.stored[spec.name].kind.name for module, spec in specs.items()}
        changed: dict[str, torch.Tensor] = {}
        for modules in alike(kinds, readings):
            tensors = [self.stored[specs[module].name] for module in modules]
            kind, gram = kinds[modules[0]], _in_file(specs[modules[0]], readings[modules[0]].gram)
            if kind in _CHOSEN:
                wanted = [specs[module].build(_Weights(readings)) for module in modules]
                chosen = self._choose(tensors, partial(_rows, wanted), gram)
                values = [dequantized(data, kind) for data in chosen]
                for tensor, each in zip(tensors, values, strict=True):
                    self.slopes[tensor.name] = slope_of(each, self.exact[tensor.name].dequantize())
            else:
                values = [tensor.dequantize() for tensor in tensors]
            for tensor in tensors:
                tensor.let_go()
            for module, each in zip(modules, values, strict=True):
                parts = specs[module].split(each)
                changed |= {
                    name.removesuffix(".weight"): torch.from_numpy(np.ascontiguousarray(part))
                    for name, part in parts.items()
                }
        return changed

    def choose_output(self, module: str, gram: torch.Tensor) -> None:
        """Choose numbers of the output matrix, which nothing reads any more."""
        spec = self.specs[module]
        tensor = self.stored[spec.name]
        if tensor.kind.name in _CHOSEN:
            exact = self.exact[spec.name]
            (data,) = self._choose([tensor], exact.rows, _in_file(spec, gram))
            self.slopes[spec.name] = slope_of(dequantized(data, tensor.kind.name), exact.dequantize())
            tensor.let_go()
            exact.let_go()

    def _choose(
        self, tensors: list[GGUFTensor], wanted: Callable[[int, int], np.ndarray], gram: torch.Tensor
    ) -> list[np.ndarray]:
        """Choose numbers of tensors that read the same, some rows at a time; the bytes that each has then, by rows."""
        rows = [tensor.shape[0] for tensor in tensors]
        data = np.concatenate([t.data.reshape(n, -1) for t, n in zip(tensors, rows, strict=True)])
        padding = tensors[0].shape[1] - len(gram)
        if padding:
            gram = F.pad(gram, (0, padding, 0, padding))
        for start in range(0, len(data), _ROWS):
            some = slice(start, min(start + _ROWS, len(data)))
            weight = torch.from_numpy(wanted(some.start, some.stop)).to(gram.device)
            stored = StoredMatrix(tensors[0].kind.name, data[some])
            data[some] = choose_numbers(weight, stored, gram).data
        parts = np.split(data, np.cumsum(rows)[:-1])
        for tensor, part in zip(tensors, parts, strict=True):
            self.stream.seek(tensor.offset)
            self.stream.write(part.tobytes())
        return parts


@dataclass(frozen=True)
class _Weights:
    """A checkpoint's tensors as layers that are about to read would have them: see `TensorSpec.build`."""

    readings: Readings

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor as float32."""
        return self.readings[name.removesuffix(".weight")].weight.cpu().numpy()


def _rows(matrices: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Some rows of matrices that lie below each other; float32."""
    ends = np.cumsum([len(matrix) for matrix in matrices]).tolist()
    parts = zip(matrices, [0, *ends], strict=False)
    return np.concatenate([matrix[max(start - first, 0) : max(stop - first, 0)] for matrix, first in parts])


def _in_file(spec: TensorSpec, gram: torch.Tensor) -> torch.Tensor:
    """X^T X / T of a module's inputs in the order of the file's columns."""
    order = torch.from_numpy(spec.of_inputs(np.arange(len(gram))))
    return gram[order][:, order] if (order.diff() != 1).any() else gram


def choose_numbers(weight: torch.Tensor, stored: StoredMatrix, gram: torch.Tensor) -> StoredMatrix:
    """A matrix of the same type that is closer to a weight for its inputs.

    Args:
        weight: (rows, columns) float32.
        stored: As ggml has rounded it; one of `PACKINGS` or `WHOLE_BLOCKS`.
        gram: X^T X / T of its inputs, (columns, columns).

    Raises:
        InputError: That is not finite.
    """
    choose = _choose_codes if stored.kind in PACKINGS else _choose_blocks
    return choose(weight, stored, gram)


def _choose_codes(weight: torch.Tensor, stored: StoredMatrix, gram: torch.Tensor) -> StoredMatrix:
    grid = stored.packing.grid
    scales, offsets = (torch.from_numpy(each).to(weight.device) for each in stored.scales_and_offsets())
    # A block of zeros: not every grid has a code for 0.
    scales = torch.where(scales == 0, _LEAST if grid.free_scales else _NOTHING, scales)
    weight = weight - offsets.repeat_interleave(grid.block_size, 1)
    codes = gptq_codes(weight, scales, grid, gram)
    codes, scales = refine_codes(weight, codes, scales, grid, gram)
    places = torch.searchsorted(codes.new_tensor(grid.codes), codes.T.contiguous()).to(torch.uint8)
    return stored.with_codes(places.cpu().numpy(), scales.cpu().numpy() if grid.free_scales else None)


def _choose_blocks(weight: torch.Tensor, stored: StoredMatrix, gram: torch.Tensor) -> StoredMatrix:
    elements, size = block_of(stored.kind)
    data = stored.data.reshape(len(weight), -1, size).copy()
    importance = floored(gram.diagonal().float().cpu().numpy()).reshape(-1, elements)

    def rounded(block: int, values: torch.Tensor) -> torch.Tensor:
        data[:, block] = in_type(values.cpu().numpy(), stored.kind, importance[block])
        return torch.from_numpy(dequantized(data[:, block], stored.kind)).to(values.device)

    gptq_blocks(weight, gram, elements, rounded)
    return StoredMatrix(stored.kind, data.reshape(stored.data.shape))
