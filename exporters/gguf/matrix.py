"""Matrices in ggml's types, ggml's own quantizer, and the numbers of a written file, chosen anew in place.

llama.cpp's quantizer rounds each block of a row by itself. `FileNumbers.fit_to_text` chooses codes, and scales that are
free, for the inputs that the rounded layers before give; `tune` trains the scales of rows, and norms; `put` writes what
training through the rounding has left. Types and layout of the file stay.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cfsp.errors import InputError
from cfsp.models.architectures import block_linears
from cfsp.models.checkpoint import RoundedNumbers
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from exporters.gguf.architecture import ChosenLayout
from exporters.gguf.quants import block_of
from exporters.gguf.runtime import FloatArray, library, log
from exporters.gguf.tensors import TensorSpec, tensor_specs
from exporters.proof import slope_of
from exporters.quantize import Grid, Placed, stands_for
from exporters.quantize.rounding import fit, gptq_blocks
from exporters.quantize.training import TunedScales, tune_scales
from exporters.quantize.walk import Readings, alike, round_blocks

Bytes = npt.NDArray[np.uint8]
_FLOATS = ctypes.POINTER(ctypes.c_float)
_SMALL = 32


class Plane(NamedTuple):
    """Some bits of every code of a block, in runs: the first codes of a run have the lowest bits of its bytes."""

    offset: int  # its first byte in the block
    bits: int  # of a code
    run: int  # codes in a run

    def write(self, blocks: Bytes, codes: Bytes) -> None:
        """Put the lowest bits of codes (blocks, elements) in their place."""
        low = codes & ((1 << self.bits) - 1)
        layers = low.reshape(len(blocks), -1, 8 // self.bits, self.run * self.bits // 8)
        packed = np.zeros_like(layers[:, :, 0])
        for place in range(8 // self.bits):
            packed |= layers[:, :, place] << (self.bits * place)
        flat = packed.reshape(len(blocks), -1)
        blocks[:, self.offset : self.offset + flat.shape[1]] = flat


class Packing(NamedTuple):
    """A type: what its blocks hold, scales first if they are free, and where codes are, lowest bits first."""

    grid: Grid
    planes: tuple[Plane, ...]


def _grid(least: int, bits: int, block_size: int, *, free_scales: bool = False) -> Grid:
    codes = tuple(float(least + code) for code in range(1 << bits))
    return Grid(codes, block_size, free_scales=free_scales)


_UNEVEN = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
# Places as in ggml-common.h and the dequantize_row_* functions of ggml-quants.c.
PACKINGS: Mapping[str, Packing] = MappingProxyType(
    {
        "Q4_0": Packing(_grid(-8, 4, _SMALL, free_scales=True), (Plane(2, 4, 32),)),
        "Q4_1": Packing(_grid(0, 4, _SMALL, free_scales=True), (Plane(4, 4, 32),)),
        "Q5_0": Packing(_grid(-16, 5, _SMALL, free_scales=True), (Plane(6, 4, 32), Plane(2, 1, 8))),
        "Q5_1": Packing(_grid(0, 5, _SMALL, free_scales=True), (Plane(8, 4, 32), Plane(4, 1, 8))),
        "IQ4_NL": Packing(Grid(_UNEVEN, _SMALL), (Plane(2, 4, 32),)),
        "IQ4_XS": Packing(Grid(_UNEVEN, _SMALL, free_scales=False), (Plane(8, 4, 32),)),
        "Q2_K": Packing(_grid(0, 2, 16), (Plane(16, 2, 128),)),
        "Q3_K": Packing(_grid(-4, 3, 16), (Plane(32, 2, 128), Plane(0, 1, 256))),
        "Q4_K": Packing(_grid(0, 4, 32), (Plane(16, 4, 64),)),
        "Q5_K": Packing(_grid(0, 5, 32), (Plane(48, 4, 64), Plane(16, 1, 256))),
        "Q6_K": Packing(_grid(-32, 6, 16), (Plane(0, 4, 128), Plane(128, 2, 128))),
    }
)
"""ggml's name -> how it is stored. Q8_0 has no row: choosing its codes with care wins nothing back."""
WHOLE_BLOCKS = ("IQ3_S", "IQ3_XXS", "IQ2_S")
"""Types in which one code stands for four or eight numbers: only ggml can round a block of them, and its numbers are of
no use without an importance matrix."""
SCALES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("F16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", *WHOLE_BLOCKS), (0,)),
        **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
    }
)
"""ggml's name -> where float16 numbers are to which everything in the block is proportional."""


TABLE, HEAD = "model.embed_tokens", "lm_head"
_CHOSEN = (*PACKINGS, *WHOLE_BLOCKS)  # types whose numbers are chosen for a text
_ROWS = 8192  # of a matrix that are chosen at once: they do not depend on each other
_LEARNING_RATE = 2e-3
"""Measured on SmolLM2-135M: at 1e-3 files of 3 bits keep more bits per byte, at 3e-3 those of 4 more divergence."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in one of ggml's types: see `exporters.quantize.QuantizedMatrix`."""

    kind: str  # ggml's name of it
    data: Bytes  # (rows, bytes of a row)

    @classmethod
    def nearest(cls, values: FloatArray, kind: str, importance: FloatArray | None) -> StoredMatrix:
        """As ggml rounds values (rows, in_features), by importance, mean squared inputs, which `WHOLE_BLOCKS` need."""
        elements, size = block_of(kind)
        rows, columns = values.shape
        values = np.ascontiguousarray(values, dtype=np.float32)
        weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
        data = np.empty((rows, columns // elements * size), dtype=np.uint8)
        address = None if weights is None else weights.ctypes.data_as(_FLOATS)
        number, source = int(gguf.GGMLQuantizationType[kind]), values.ctypes.data_as(_FLOATS)
        _quantize_chunk()(number, source, data.ctypes.data, 0, rows, columns, address)
        return cls(kind, data)

    @property
    def grid(self) -> Grid:
        return PACKINGS[self.kind].grid

    def values(self) -> FloatArray:
        """What a runtime computes with, (rows, columns) float32."""
        return np.asarray(gguf.dequantize(self.data, gguf.GGMLQuantizationType[self.kind]), dtype=np.float32)

    def dequantize(self) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.values()))

    def scales_and_offsets(self) -> tuple[torch.Tensor, torch.Tensor]:
        # What the first and the last code stand for tells both.
        codes = self.grid.codes
        elements, size = block_of(self.kind)
        columns = self.data.shape[1] // size * elements
        first, last = (
            self._with_places(np.full((len(self.data), columns), code, np.uint8)).dequantize()[
                :, :: self.grid.block_size
            ]
            for code in (0, len(codes) - 1)
        )
        scales = (last - first) / (codes[-1] - codes[0])
        return scales, first - codes[0] * scales

    def with_codes(self, codes: torch.Tensor, scales: torch.Tensor | None = None) -> StoredMatrix:
        places = torch.searchsorted(codes.new_tensor(self.grid.codes), codes.T.contiguous()).to(torch.uint8)
        return self._with_places(places.cpu().numpy(), None if scales is None else scales.cpu().numpy())

    def _with_places(self, places: Bytes, scales: FloatArray | None = None) -> StoredMatrix:
        """With codes (rows, columns), counted from the grid's first."""
        elements, size = block_of(self.kind)
        blocks, codes = self.data.reshape(-1, size).copy(), places.reshape(-1, elements)
        for plane in PACKINGS[self.kind].planes:
            plane.write(blocks, codes)
            codes = np.right_shift(codes, plane.bits, dtype=np.uint8)
        if scales is not None:
            blocks[:, :2] = scales.astype(np.float16).reshape(-1, 1).view(np.uint8)
        return StoredMatrix(self.kind, blocks.reshape(self.data.shape))

    def scaled(self, factors: torch.Tensor) -> StoredMatrix:
        _, size = block_of(self.kind)
        blocks = self.data.reshape(len(factors), -1, size).copy()
        for offset in SCALES[self.kind]:
            place = blocks[:, :, offset : offset + 2]
            scales = np.ascontiguousarray(place).view(np.float16) * factors.numpy()[:, :, None]
            place[:] = scales.astype(np.float16).view(np.uint8)
        return StoredMatrix(self.kind, blocks.reshape(self.data.shape))

    def pack(self) -> dict[str, torch.Tensor]:
        return {"": torch.from_numpy(np.array(self.data))}


def choose_numbers(weight: torch.Tensor, stored: StoredMatrix, gram: torch.Tensor) -> StoredMatrix:
    """A matrix of the same type, one of `PACKINGS` or `WHOLE_BLOCKS`, that is closer to a weight: see `fit`."""
    if stored.kind in PACKINGS:
        return fit(weight, stored, gram)
    elements, size = block_of(stored.kind)
    data = stored.data.reshape(len(weight), -1, size).copy()
    importance = floored(gram.diagonal().float().cpu().numpy()).reshape(-1, elements)

    def rounded(block: int, values: torch.Tensor) -> torch.Tensor:
        found = StoredMatrix.nearest(values.cpu().numpy(), stored.kind, importance[block])
        data[:, block] = found.data
        return found.dequantize().to(values.device)

    gptq_blocks(weight, gram, elements, rounded)
    return StoredMatrix(stored.kind, data.reshape(stored.data.shape))


def floored(moments: FloatArray) -> FloatArray:
    """Mean squared inputs as importances: one that never fired must still count, or its weights become arbitrary."""
    least = 1e-6 * float(moments.mean()) or 1.0
    return np.maximum(moments, least).astype(np.float32)


@functools.cache
def _quantize_chunk() -> Any:
    """ggml's own function, which the quantizer calls for a tensor's rows."""
    library()
    from llama_cpp._ggml import libggml

    function = libggml.ggml_quantize_chunk
    integer = ctypes.c_int64
    function.argtypes = [ctypes.c_int, _FLOATS, ctypes.c_void_p, integer, integer, integer, _FLOATS]
    function.restype = ctypes.c_size_t
    return function


def quantize(
    source: Path,
    destination: Path,
    ftype: int,
    *,
    n_threads: int = 1,
    imatrix: Mapping[str, FloatArray] | None = None,
    types: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Quantize a float32 or 16-bit GGUF file with llama.cpp's quantizer; raises InputError with its reason.

    `imatrix` has mean squared inputs (in_features,) of tensors, `types` ggml types other than the `ftype` says,
    `metadata` keys of the destination, whose values are texts of up to 127 bytes.
    """
    lib, imatrix, types, metadata = library(), imatrix or {}, types or {}, metadata or {}
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, n_threads
    # Each list ends with an entry without a name; what entries point to must live as long as they do.
    entries, keep_alive = (lib.llama_model_imatrix_data * (len(imatrix) + 1))(), []
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        data, raw = np.ascontiguousarray(values, dtype=np.float32), name.encode()
        entry.name, entry.size, entry.data = raw, data.size, data.ctypes.data_as(_FLOATS)
        keep_alive += [data, raw]
    if imatrix:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(lib.llama_model_imatrix_data))
    overrides = (lib.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(overrides, types.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), int(gguf.GGMLQuantizationType[kind])
    if types:
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(lib.llama_model_tensor_override))
    stated = (lib.llama_model_kv_override * (len(metadata) + 1))()
    for one, (key, text) in zip(stated, metadata.items(), strict=False):
        one.tag, one.key = lib.LLAMA_KV_OVERRIDE_TYPE_STR, key.encode()
        one.value.val_str = text.encode()
    if metadata:
        params.kv_overrides = ctypes.cast(stated, ctypes.POINTER(lib.llama_model_kv_override))
    log.clear()
    status = lib.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(params))
    del keep_alive
    if status != 0:
        raise InputError(f"llama.cpp cannot quantize {source.name}: {log.last()}")


class FileNumbers:
    """The numbers of a file, and of the unquantized `base` it was made from; `slopes` of what changed."""

    def __init__(self, base: Path, path: Path, chosen: ChosenLayout) -> None:
        self.path, self.tied = path, chosen.config.tie_word_embeddings
        self.specs = tensor_specs(chosen)
        self.exact, self.stored = (
            {tensor.name: tensor for tensor in read_gguf(file).tensors} for file in (base, path)
        )
        self.slopes: dict[str, float] = {}

    def matrix(self, spec: TensorSpec) -> StoredMatrix:
        tensor = self.stored[spec.name]
        return StoredMatrix(tensor.kind.name, tensor.data.reshape(spec.shape[0], -1))

    def write(self, tensor: GGUFTensor, data: npt.NDArray[Any]) -> None:
        """Put a tensor in its place."""
        with self.path.open("r+b") as stream:
            stream.seek(tensor.offset)
            stream.write(data.tobytes())

    def fit_to_text(self, model: Any, input_ids: torch.Tensor, progress: Progress = no_progress) -> None:
        """Choose the numbers of all matrices of few bits for a text (nsamples, seqlen); the model stays as it is."""
        specs = {spec.sources[0][0].removesuffix(".weight"): spec for spec in self.specs if spec.is_matrix}
        what = f"rounding {self.path.stem}"

        def visit(_: int, readings: Readings) -> dict[str, torch.Tensor]:
            """Choose numbers of the matrices that are about to read; module -> what its weight has become."""
            its = {module: specs[module] for module in readings if module in specs}
            kinds = {module: self.stored[spec.name].kind.name for module, spec in its.items()}
            read = lambda name, _: readings[name.removesuffix(".weight")].weight.cpu().numpy()  # noqa: E731
            changed: dict[str, torch.Tensor] = {}
            for modules in alike(kinds, readings):
                several = [its[module] for module in modules]
                if kinds[modules[0]] in _CHOSEN:
                    wanted = [spec.build(read) for spec in several]
                    rows = [lambda start, stop, each=each: each[start:stop] for each in wanted]
                    values = self._choose(several, rows, _in_file(several[0], readings[modules[0]].gram))
                else:
                    values = [self.stored[spec.name].dequantize() for spec in several]
                for spec, each in zip(several, values, strict=True):
                    self.stored[spec.name].let_go()
                    changed |= {
                        name.removesuffix(".weight"): part for name, part in _parts(spec, each).items()
                    }
            return changed

        embedding = model.get_input_embeddings()
        before = embedding.weight
        if not self.tied:
            table = torch.from_numpy(self.stored[specs[TABLE].name].dequantize())
            embedding.weight = nn.Parameter(table.to(model.device), requires_grad=False)
        try:
            report = lambda _, done, total: progress(what, done, total)  # noqa: E731
            gram = round_blocks(model, input_ids, visit, progress=report)
        finally:
            embedding.weight = before
        # The output matrix is read by nothing any more.
        spec = specs[TABLE if self.tied else HEAD]
        if self.stored[spec.name].kind.name in _CHOSEN:
            self._choose([spec], [self.exact[spec.name].rows], _in_file(spec, gram))
            self.exact[spec.name].let_go()
        total = len(block_linears(model)) + 1
        progress(what, total, total)

    def _choose(
        self, specs: Sequence[TensorSpec], wanted: Sequence[Any], gram: torch.Tensor
    ) -> list[np.ndarray]:
        """Choose numbers of matrices of one type that read the same, some rows of all at a time; their values then.

        `wanted`, of each, is (first row, row behind the last) -> what these are to be; gram is in the columns' order.
        """
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
        """Train scales and norms on a text (nsamples, seqlen); returns how many tensors that changed."""
        stored: dict[str, torch.Tensor] = {}
        for spec in self.specs:
            if spec.is_matrix and self.stored[spec.name].kind.name in SCALES:
                parts = _parts(spec, self.stored[spec.name].dequantize())
                stored |= {name: part.to(model.device) for name, part in parts.items()}
        table = stored.get(f"{TABLE}.weight", model.get_input_embeddings().weight.detach())
        own_head = stored.get(f"{HEAD}.weight", model.get_output_embeddings().weight.detach())
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
            return self.matrix(spec).scaled(factors[:, None])
        norm = found.norms.get(spec.sources[0][0])
        return None if norm is None else norm.numpy() + np.float32(spec.offset)

    def put(self, numbers: RoundedNumbers) -> None:
        """Write what a training through the rounding has left; InputError if the weights do not stand for it."""
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
        is_trained = matrix.kind in SCALES and not {TABLE, HEAD} & {*modules} and not reordered
        elements, _ = block_of(matrix.kind)

        def hold(model: Any, values: torch.Tensor) -> None:
            for name, part in _parts(spec, values.numpy()).items():
                model.get_parameter(name).copy_(part)

        def stack(factors: list[torch.Tensor]) -> torch.Tensor:
            return torch.from_numpy(spec.stack([each.numpy() for each in factors]))

        return Placed(matrix, hold, stack, tuple(modules) if is_trained else (), elements)


def _parts(spec: TensorSpec, values: np.ndarray) -> Mapping[str, torch.Tensor]:
    """The checkpoint's tensors that a matrix of the file holds, by their names."""
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in spec.split(values).items()}


def _in_file(spec: TensorSpec, gram: torch.Tensor) -> torch.Tensor:
    """X^T X / T of a module's inputs in the order of the file's columns."""
    order = torch.from_numpy(spec.of_inputs(np.arange(len(gram))))
    return gram[order][:, order] if (order.diff() != 1).any() else gram
