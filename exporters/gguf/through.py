"""A model as a quantized GGUF file holds it, for training through its rounding.

The file is written as export writes it, its numbers chosen for a text. Its codes stay; what all numbers of a block of
ggml's are proportional to, its float16 scale (and minimum), is trained, and so are the norms, which are float32 in
every file. The trained file has as many bytes and computes as fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cfsp.errors import InputError
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.models.rounded_numbers import RoundedFormat, RoundedNumbers
from cfsp.models.weights import sha256_tensors
from cfsp.progress import Progress
from cfsp.scratch import LargeScratch
from exporters.gguf.architecture import read_layout
from exporters.gguf.fallbacks import block_of
from exporters.gguf.files import draft_file
from exporters.gguf.packing import SCALES, StoredMatrix
from exporters.gguf.quants import MIXED, QUANTS, find_quant
from exporters.gguf.tensors import TensorSpec, tensor_specs
from exporters.options import ExportOptions
from exporters.quantize.scaled import factors_of, make_plain, train_blocks, train_norms

_TABLES = ("model.embed_tokens", "lm_head")
"""They are looked up, or read once for each token's logits: their numbers stay."""


@dataclass(frozen=True)
class GGUFRounded:
    """See `cfsp.recovery.rounding.RoundedModel`.

    Attributes:
        format: What the file is.
        stored: Its matrices, with what of the checkpoint each is made of.
    """

    format: RoundedFormat
    stored: Mapping[str, tuple[TensorSpec, StoredMatrix]]

    @property
    def sha256(self) -> str:
        """Hash of the matrices."""
        return sha256_tensors(
            (name, torch.from_numpy(np.array(m.data))) for name, (_, m) in self.stored.items()
        )

    def attach(self, model: Any) -> None:
        """See `RoundedModel`."""
        train_norms(model)
        for spec, matrix in self.stored.values():
            _hold(model, spec, matrix)
            if _is_trained(spec, matrix):
                elements, _ = block_of(matrix.kind)
                for module in _modules(model, spec):
                    train_blocks(module, elements)

    def finish(self, model: Any) -> RoundedNumbers:
        """See `RoundedModel`."""
        tensors = {}
        for name, (spec, matrix) in self.stored.items():
            modules = list(_modules(model, spec))
            if _is_trained(spec, matrix):
                matrix = matrix.scaled(_factors(spec, matrix, modules))
            make_plain(modules)
            _hold(model, spec, matrix)
            tensors[name] = torch.from_numpy(np.ascontiguousarray(matrix.data))
        return RoundedNumbers(self.format, tensors)


class GGUFRounding:
    """See `cfsp.recovery.rounding.Rounding`."""

    def check(self, name: str) -> None:
        """See `Rounding`: Q8_0 and floats lose nothing to speak of."""
        row = find_quant(name)
        if not row.uses_imatrix:
            allowed = ", ".join((*(known.name for known in QUANTS.values() if known.uses_imatrix), MIXED))
            raise InputError(
                "loses nothing that training could win back",
                field="for_quant",
                value=row.name,
                allowed=allowed,
            )

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> GGUFRounded:
        """See `Rounding`."""
        row = find_quant(name)
        settings = ExportOptions(calibration=input_ids, device=device, progress=progress)
        with LargeScratch("rounded") as scratch:
            file = draft_file(checkpoint, scratch.path, row.name, settings)
            tensors = {tensor.name: tensor for tensor in read_gguf(file.path).tensors}
            specs = [spec for spec in tensor_specs(read_layout(checkpoint)) if spec.is_matrix]
            stored = {spec.name: (spec, _matrix(tensors[spec.name], spec)) for spec in specs}
        types = {name: matrix.kind for name, (_, matrix) in stored.items()}
        loss = file.mixture.loss if file.mixture else None
        return GGUFRounded(RoundedFormat(row.name, types, loss), stored)


def _matrix(tensor: GGUFTensor, spec: TensorSpec) -> StoredMatrix:
    return StoredMatrix(tensor.kind.name, tensor.data.reshape(spec.shape[0], -1))


def _is_trained(spec: TensorSpec, matrix: StoredMatrix) -> bool:
    """Whether its blocks' scales are: those of an order of columns of its own are not the checkpoint's blocks."""
    tables = [name for name, _ in spec.sources if name.removesuffix(".weight") in _TABLES]
    reordered = spec.tiling is not None and spec.tiling.axis != 0
    return matrix.kind in SCALES and not tables and not reordered


def _modules(model: Any, spec: TensorSpec) -> Iterator[nn.Module]:
    for name, _ in spec.sources:
        yield model.get_submodule(name.removesuffix(".weight"))


def _hold(model: Any, spec: TensorSpec, matrix: StoredMatrix) -> None:
    """Give the modules of a matrix what it stands for."""
    with torch.no_grad():
        for name, part in spec.split(matrix.values()).items():
            weight = model.get_submodule(name.removesuffix(".weight")).weight
            weight.copy_(torch.from_numpy(np.ascontiguousarray(part)))


def _factors(spec: TensorSpec, matrix: StoredMatrix, modules: list[nn.Module]) -> np.ndarray:
    """Of every block of the file's, (rows, blocks); 1 of those that the file pads."""
    found = [factors for module in modules if (factors := factors_of(module)) is not None]
    stacked = torch.from_numpy(spec.stack([factors.numpy() for factors in found]))
    elements, _ = block_of(matrix.kind)
    rows, blocks = spec.shape[0], math.ceil(spec.shape[1] / elements)
    missing = (0, blocks - stacked.shape[1], 0, rows - stacked.shape[0])
    return np.asarray(F.pad(stacked, missing, value=1.0).numpy())
