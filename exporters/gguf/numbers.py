"""The numbers of a written file, chosen anew in place; its types and its layout stay.

llama.cpp's quantizer rounds each block of a row by itself. `fit_to_text` chooses codes, and scales that are free, for
the inputs that the rounded layers before give; `tune` trains the scales of rows, and norms, which are float32 in every
file; `put` writes what training through the rounding has left; `GGUFRounding` in `files.py` starts such a training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import block_linears
from cfsp.models.checkpoint import RoundedNumbers
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from exporters.gguf.architecture import ChosenLayout
from exporters.gguf.matrix import PACKINGS, SCALES, WHOLE_BLOCKS, StoredMatrix, block_of, choose_numbers
from exporters.gguf.tensors import TensorSpec, tensor_specs
from exporters.proof import slope_of
from exporters.quantize import Placed, stands_for
from exporters.quantize.training import TunedScales, tune_scales
from exporters.quantize.walk import Readings, alike, round_blocks

_TABLE, _HEAD = "model.embed_tokens", "lm_head"
_CHOSEN = (*PACKINGS, *WHOLE_BLOCKS)
_ROWS = 8192
"""Of a matrix that are chosen at once: they do not depend on each other."""
_LEARNING_RATE = 2e-3
"""Measured on SmolLM2-135M: at 1e-3 files of 3 bits keep more bits per byte, at 3e-3 those of 4 more divergence."""


class FileNumbers:
    """A quantized file whose numbers change.

    Args:
        base: The unquantized file that it was quantized from.
        path: The file.
        chosen: How the model goes into both.

    Attributes:
        slopes: Tensor that was changed -> its slope (`exporters.proof`).
    """

    def __init__(self, base: Path, path: Path, chosen: ChosenLayout) -> None:
        self.path, self.tied = path, chosen.config.tie_word_embeddings
        self.specs = tensor_specs(chosen)
        self.exact, self.stored = (
            {tensor.name: tensor for tensor in read_gguf(file).tensors} for file in (base, path)
        )
        self.slopes: dict[str, float] = {}

    def matrix(self, spec: TensorSpec) -> StoredMatrix:
        """One of its matrices."""
        tensor = self.stored[spec.name]
        return StoredMatrix(tensor.kind.name, tensor.data.reshape(spec.shape[0], -1))

    def write(self, tensor: GGUFTensor, data: npt.NDArray[Any]) -> None:
        """Put a tensor in its place."""
        with self.path.open("r+b") as stream:
            stream.seek(tensor.offset)
            stream.write(data.tobytes())

    def fit_to_text(self, model: Any, input_ids: torch.Tensor, progress: Progress = no_progress) -> None:
        """Choose the numbers of all matrices of few bits for a text, (nsamples, seqlen).

        Args:
            model: The checkpoint's; unchanged.
            input_ids: The text.
            progress: Told after each block.

        Raises:
            InputError: What the layers read is not finite.
        """
        specs = {spec.sources[0][0].removesuffix(".weight"): spec for spec in self.specs if spec.is_matrix}
        what = f"rounding {self.path.stem}"

        def visit(_: int, readings: Readings) -> dict[str, torch.Tensor]:
            return self._round(specs, readings)

        embedding = model.get_input_embeddings()
        before = embedding.weight
        if not self.tied:
            table = torch.from_numpy(self.stored[specs[_TABLE].name].dequantize())
            embedding.weight = nn.Parameter(table.to(model.device), requires_grad=False)
        try:
            report = lambda _, done, total: progress(what, done, total)  # noqa: E731
            gram = round_blocks(model, input_ids, visit, progress=report)
        finally:
            embedding.weight = before
        # The output matrix is read by nothing any more.
        spec = specs[_TABLE if self.tied else _HEAD]
        if self.stored[spec.name].kind.name in _CHOSEN:
            self._choose([spec], [self.exact[spec.name].rows], _in_file(spec, gram))
            self.exact[spec.name].let_go()
        total = len(block_linears(model)) + 1
        progress(what, total, total)

    def _round(self, specs: Mapping[str, TensorSpec], readings: Readings) -> dict[str, torch.Tensor]:
        """Choose numbers of the matrices that are about to read; module -> what its weight has become."""
        specs = {module: specs[module] for module in readings if module in specs}
        kinds = {module: self.stored[spec.name].kind.name for module, spec in specs.items()}
        changed: dict[str, torch.Tensor] = {}
        for modules in alike(kinds, readings):
            several = [specs[module] for module in modules]
            if kinds[modules[0]] in _CHOSEN:
                wanted = [spec.build(_Weights(readings)) for spec in several]
                rows = [lambda start, stop, each=each: each[start:stop] for each in wanted]
                values = self._choose(several, rows, _in_file(several[0], readings[modules[0]].gram))
            else:
                values = [self.stored[spec.name].dequantize() for spec in several]
            for spec, each in zip(several, values, strict=True):
                self.stored[spec.name].let_go()
                for name, part in spec.split(each).items():
                    changed[name.removesuffix(".weight")] = torch.from_numpy(np.ascontiguousarray(part))
        return changed

    def _choose(
        self, specs: Sequence[TensorSpec], wanted: Sequence[Any], gram: torch.Tensor
    ) -> list[np.ndarray]:
        """Choose numbers of matrices that read the same, some rows of all at a time; their values then.

        Args:
            specs: Of one type.
            wanted: (first row, row behind the last) -> what these rows are to be, of each.
            gram: Of what they read, in the order of their columns.
        """
        if padding := specs[0].shape[1] - len(gram):
            gram = F.pad(gram, (0, padding, 0, padding))
        matrices = [self.matrix(spec) for spec in specs]
        data, kind = np.concatenate([matrix.data for matrix in matrices]), matrices[0].kind
        ends = np.cumsum([len(matrix.data) for matrix in matrices]).tolist()
        for start in range(0, len(data), _ROWS):
            stop = min(start + _ROWS, len(data))
            parts = [
                rows(max(start - first, 0), max(min(stop, end) - first, 0))
                for rows, first, end in zip(wanted, [0, *ends], ends, strict=False)
                if first < stop and end > start
            ]
            weight = torch.from_numpy(np.concatenate(parts)).to(gram.device)
            data[start:stop] = choose_numbers(weight, StoredMatrix(kind, data[start:stop]), gram).data
        values = []
        for spec, part in zip(specs, np.split(data, ends[:-1]), strict=True):
            self.write(self.stored[spec.name], part)
            values.append(StoredMatrix(kind, part).values())
            self.slopes[spec.name] = slope_of(values[-1], self.exact[spec.name].dequantize())
        return values

    def tune(self, model: Any, input_ids: torch.Tensor, progress: Progress = no_progress) -> int:
        """Train scales and norms on a text, (nsamples, seqlen); returns how many tensors that changed."""
        stored: dict[str, torch.Tensor] = {}
        for spec in self.specs:
            if spec.is_matrix and self.stored[spec.name].kind.name in SCALES:
                parts = spec.split(self.stored[spec.name].dequantize())
                stored |= {
                    name: torch.from_numpy(np.ascontiguousarray(part)).to(model.device)
                    for name, part in parts.items()
                }
        table = stored.get(f"{_TABLE}.weight", model.get_input_embeddings().weight.detach())
        own_head = stored.get(f"{_HEAD}.weight", model.get_output_embeddings().weight.detach())
        linears = [name for block in block_linears(model) for name in block if f"{name}.weight" in stored]
        weights = {name: stored[f"{name}.weight"] for name in linears}
        head = table if self.tied else own_head
        with products_in("auto", model.device.type):
            found = tune_scales(model, weights, head, table, input_ids, _LEARNING_RATE, progress=progress)
        # All are read before any is written: the file is in memory as it is on disk.
        changed = {spec.name: data for spec in self.specs if (data := self.tuned(spec, found)) is not None}
        for name, data in changed.items():
            values = data.values() if isinstance(data, StoredMatrix) else data
            self.slopes[name] = slope_of(values, self.exact[name].dequantize())
            self.write(self.stored[name], data.data if isinstance(data, StoredMatrix) else data)
        return len(changed)

    def tuned(self, spec: TensorSpec, found: TunedScales) -> StoredMatrix | npt.NDArray[Any] | None:
        """What a tensor becomes; None of one that stays."""
        modules = [name.removesuffix(".weight") for name, _ in spec.sources]
        if all(name in found.rows for name in modules):
            factors = torch.from_numpy(spec.stack([found.rows[name].numpy() for name in modules]))
            padded = F.pad(factors, (0, spec.shape[0] - len(factors)), value=1.0)
            return self.matrix(spec).scaled(padded[:, None])
        norm = found.norms.get(spec.sources[0][0])
        return None if norm is None else norm.numpy() + np.float32(spec.offset)

    def put(self, numbers: RoundedNumbers) -> None:
        """Write what a training through the rounding has left; the file's types are those of the numbers.

        Raises:
            InputError: They are not what the checkpoint's weights stand for, or not of its shape.
        """
        for name, tensor in numbers.tensors.items():
            data, place = tensor.numpy(), self.stored.get(name)
            kind = numbers.format.types.get(name)
            if place is None or kind is None or place.kind.name != kind or place.data.size != data.size:
                raise InputError(f"the checkpoint's rounded numbers are not of its tensor {name}")
            weight = torch.from_numpy(self.exact[name].dequantize())
            if not stands_for(StoredMatrix(kind, data.reshape(len(weight), -1)).dequantize(), weight):
                raise InputError(
                    f"the checkpoint's rounded numbers are not what its weights stand for: {name}"
                )
            self.write(place, data)
            self.slopes[name] = 1.0  # the checkpoint's weights are what these numbers stand for

    def placed(self) -> dict[str, Placed]:
        """Its matrices, as training through their rounding has them."""
        return {spec.name: self._placed(spec) for spec in self.specs if spec.is_matrix}

    def _placed(self, spec: TensorSpec) -> Placed:
        matrix = self.matrix(spec)
        matrix = StoredMatrix(matrix.kind, np.array(matrix.data))  # the file goes
        modules = [name.removesuffix(".weight") for name, _ in spec.sources]
        # Tables are looked up, or read once for each token's logits; the blocks of columns in an order of their own are
        # not the checkpoint's.
        reordered = spec.tiling is not None and spec.tiling.axis != 0
        is_trained = matrix.kind in SCALES and not {_TABLE, _HEAD} & {*modules} and not reordered
        elements, _ = block_of(matrix.kind)

        def hold(model: Any, values: torch.Tensor) -> None:
            for name, part in spec.split(values.numpy()).items():
                model.get_parameter(name).copy_(torch.from_numpy(np.ascontiguousarray(part)))

        def stack(factors: list[torch.Tensor]) -> torch.Tensor:
            """Factors of blocks that the file pads are 1."""
            stacked = torch.from_numpy(spec.stack([each.numpy() for each in factors]))
            rows, blocks = spec.shape[0], math.ceil(spec.shape[1] / elements)
            return F.pad(stacked, (0, blocks - stacked.shape[1], 0, rows - stacked.shape[0]), value=1.0)

        return Placed(matrix, hold, stack, tuple(modules) if is_trained else (), elements)


class _Weights:
    """A checkpoint's tensors as layers that are about to read would have them: see `TensorSpec.build`."""

    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """One tensor as float32."""
        return self._readings[name.removesuffix(".weight")].weight.cpu().numpy()


def _in_file(spec: TensorSpec, gram: torch.Tensor) -> torch.Tensor:
    """X^T X / T of a module's inputs in the order of the file's columns."""
    order = torch.from_numpy(spec.of_inputs(np.arange(len(gram))))
    return gram[order][:, order] if (order.diff() != 1).any() else gram
