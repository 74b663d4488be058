"""Reading GGUF files: metadata as plain values, tensors dequantized, gated delta nets' heads in ggml's order.

The gguf package's reader makes an array of every string, seconds for a vocabulary; so the header is parsed here
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), and the package dequantizes.
"""

from __future__ import annotations

import functools
import math
import mmap
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
from pydantic import Field

from cfsp.errors import InputError
from cfsp.models.config_file import ContextLength, Epsilon, LayerCount, TokenId
from cfsp.models.families import BUILT_IN, FOLDS
from cfsp.models.families.row import Count, Positive, Size
from cfsp.reading import one_line
from cfsp.validation import check_kinds, kinds

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_FORMS = ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "", "", "<u8", "<i8", "<f8")
_NUMBERS = {kind: form for kind, form in enumerate(_FORMS) if form}

# llama.cpp divides by some of the metadata, allocates by others, and aborts at failed assertions: all is checked first.
_PerBlock = Size | list[Annotated[int, Field(ge=0, le=2**24)]]
_METADATA = kinds(
    {
        "general.architecture general.name general.license general.organization": str,
        "general.base_model.0.name general.base_model.0.organization phoneready.source_sha256": str,
        "tokenizer.ggml.model tokenizer.ggml.pre tokenizer.chat_template": str,
        "tokenizer.ggml.tokens tokenizer.ggml.merges": list[str],
        "tokenizer.ggml.token_type": list[int],
        "tokenizer.ggml.scores": list[float],
        "general.sampling.temp general.sampling.top_p general.sampling.min_p": float,
        "general.sampling.penalty_repeat": float,
        "general.sampling.top_k": int,
    },
    {f"tokenizer.ggml.{name}_token_id": TokenId for name in ("bos", "eos", "eot", "unknown")},
    {f"tokenizer.ggml.{name}_token_id": TokenId for name in ("padding", "seperator")},
    {f"tokenizer.ggml.add_{name}": bool for name in ("bos_token", "eos_token", "space_prefix")},
)
_HYPERPARAMETERS = kinds(
    {
        "embedding_length vocab_size rope.dimension_count": Size,
        "attention.key_length attention.value_length": Size,
        "attention.key_length_swa attention.value_length_swa": Size,
        "feed_forward_length attention.head_count attention.head_count_kv": _PerBlock,
        "block_count": LayerCount,
        "context_length rope.scaling.original_context_length": ContextLength,
        "attention.layer_norm_rms_epsilon": Epsilon,
        "attention.sliding_window": Annotated[int, Field(ge=0, lt=2**32)],
        "attention.sliding_window_pattern": Annotated[int, Field(ge=0, lt=2**16)] | list[bool | int],
        "final_logit_softcapping": Annotated[float, Field(ge=0, allow_inf_nan=False)],
        "rope.freq_base rope.freq_base_swa rope.scaling.attn_factor": Positive,
        "nextn_predict_layers": Count,
        "rope.scaling.type": str,
        "rope.scaling.factor": Annotated[float, Field(ge=0, lt=1e6)],  # 0 stands for none
        "rope.scaling.finetuned": bool,
    },
    *(row.gguf_kinds for row in BUILT_IN.values()),
    *(fold.gguf_kinds for fold in FOLDS.values()),
)

CONVOLUTIONS = ("shortconv.conv.weight", "ssm_conv1d.weight")
"""Suffixes of tensors that llama.cpp reads only in float32; a block with one of them has no keys."""
UNQUANTIZED = (*CONVOLUTIONS, "per_layer_model_proj.weight")
"""Suffixes of matrices that llama.cpp's quantizer leaves as they are."""
ROPE_FREQUENCIES, EMBEDDING, OUTPUT = "rope_freqs.weight", "token_embd.weight", "output.weight"
DELTA_NET_NUMBERS: Mapping[str, tuple[str, str]] = {"dt_bias": ("dt_proj", ".bias"), "A_log": ("A_log", "")}
"""Parameters of a gated delta net that are no modules -> the gguf package's name of them, and the suffix in a file."""


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor as it is stored."""

    name: str  # llama.cpp's name, such as "blk.0.ffn_up.weight"
    shape: tuple[int, ...]  # outermost dimension first, as torch has it
    kind: Any  # the gguf package's quantization type
    data: np.ndarray[Any, np.dtype[np.uint8]]  # (n_bytes,) uint8 view of the file
    offset: int
    mapping: mmap.mmap = field(repr=False, compare=False)  # the file in memory

    def let_go(self) -> None:
        """Drop its pages from memory if the system can; they are read again on demand."""
        if hasattr(mmap, "MADV_DONTNEED"):
            start = self.offset - self.offset % mmap.PAGESIZE
            self.mapping.madvise(mmap.MADV_DONTNEED, start, self.offset - start + self.data.nbytes)

    def dequantize(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The values, (shape) float32, in memory of their own."""
        dtype = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(self.kind.name)
        rows = self.data.reshape(*self.shape[:-1], -1) if dtype is None else self.data.view(dtype)
        try:
            values = gguf.dequantize(rows, self.kind) if dtype is None else rows
        except NotImplementedError as error:
            problem = f"tensor {self.name} is stored in a type that cannot be dequantized"
            raise InputError(problem, field="tensor type", value=self.kind.name) from error
        return np.array(values, dtype=np.float32).reshape(self.shape)

    def rows(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The values of rows `start` to `stop`, or to the last one."""
        size, stop = len(self.data) // self.shape[0], min(stop, self.shape[0])
        data = self.data[start * size : stop * size]
        return replace(self, shape=(stop - start, *self.shape[1:]), data=data).dequantize()


@dataclass(frozen=True)
class GGUFFile:
    """Metadata and tensors in the file's order; tensors stay on disk until they are dequantized."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's architecture name."""
        return str(self.require("general.architecture"))

    def require(self, key: str) -> Any:
        """A metadata value; raises InputError if it is missing."""
        if key not in self.metadata:
            raise InputError(f"{self.path} lacks the GGUF metadata key {key}")
        return self.metadata[key]

    def hyperparameter(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def drafting_blocks(file: GGUFFile) -> range:
    """Blocks behind the model's own that draft further tokens, if the file has their tensors; raises InputError."""
    key, count = "nextn_predict_layers", file.require(f"{file.architecture}.block_count")
    drafting = file.hyperparameter(key, 0)
    if not drafting or not any(".nextn." in tensor.name for tensor in file.tensors):
        return range(count, count)
    if drafting >= count:
        raise InputError(
            f"{file.path}: no block is left", field=key, value=drafting, allowed=f"below {count}"
        )
    return range(count - drafting, count)


def is_drafting(file: GGUFFile) -> Callable[[str], bool]:
    """Whether a tensor of this name is one of `drafting_blocks`."""
    prefixes = tuple(f"blk.{block}." for block in drafting_blocks(file))
    return lambda name: bool(prefixes) and name.startswith(prefixes)


def looked_up_alone(names: Collection[str]) -> frozenset[str]:
    """Tables of tokens that no product reads; a tied embedding is none."""
    return frozenset({"per_layer_token_embd.weight", *([EMBEDDING] if OUTPUT in names else [])})


@functools.cache
def tensor_names(architecture: str, blocks: int) -> Any:
    """The gguf package's map from Hugging Face's module names to an architecture's of llama.cpp."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], blocks)


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file; raises InputError if it is missing, not GGUF, damaged, or its metadata is unsound."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise InputError(f"{path} is not a GGUF file (it does not start with {_MAGIC.decode()})")
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    try:
        metadata, tensors = _parse(content)
    except (ValueError, TypeError, KeyError, ArithmeticError, MemoryError, struct.error) as error:
        raise InputError(
            f"{path} is damaged or cut short and cannot be read as GGUF: {one_line(error)}"
        ) from error
    check_kinds(metadata, _METADATA, str(path))
    prefix = f"{metadata.get('general.architecture')}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    check_kinds(own, _HYPERPARAMETERS, str(path))
    return GGUFFile(path, metadata, tensors)


class _Cursor:
    """A place in the file that moves on with every read and never beyond the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.at = len(_MAGIC)

    def take(self, count: int) -> int:
        """Where the next `count` bytes start."""
        start = self.at
        if count > len(self.content) - start:
            raise ValueError(f"{count} bytes expected at {start}, the file ends at {len(self.content)}")
        self.at = start + count
        return start

    def number(self, form: str) -> int:
        value: int = struct.unpack_from(form, self.content, self.take(struct.calcsize(form)))[0]
        return value

    def texts(self, count: int) -> list[str]:
        """A loop of its own: vocabularies are long."""
        content, end, at, texts = self.content, len(self.content), self.at, []
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(content[at:start], "little")
            if at > end:
                raise ValueError(f"a text of {at - start} bytes expected at {start}, the file ends at {end}")
            texts.append(content[start:at].decode("utf-8"))
        self.at = at
        return texts

    def text(self) -> str:
        return self.texts(1)[0]

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(_NUMBERS[kind])
        start = self.take(dtype.itemsize * count)
        values: list[Any] = np.frombuffer(self.content, dtype, count, start).tolist()
        return values

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(kind, 1)[0]
        kind, count = self.number("<I"), self.number("<Q")
        return self.texts(count) if kind == _STRING else self.numbers(kind, count)


def _parse(content: mmap.mmap) -> tuple[dict[str, Any], tuple[GGUFTensor, ...]]:
    cursor = _Cursor(content)
    if (version := cursor.number("<I")) not in _VERSIONS:
        raise ValueError(f"GGUF version {version}, known are {_VERSIONS}")
    n_tensors, n_values = cursor.number("<Q"), cursor.number("<Q")
    metadata = {}
    for _ in range(n_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("<I"))
    rows = []
    for _ in range(n_tensors):
        name = cursor.text()
        shape = tuple(reversed(cursor.numbers(10, cursor.number("<I"))))
        rows.append((name, shape, gguf.GGMLQuantizationType(cursor.number("<I")), cursor.number("<Q")))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.at // alignment) * alignment
    tensors = []
    for name, shape, kind, offset in rows:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name} of shape {shape} is not made of whole {kind.name} blocks")
        cursor.at = start + offset
        count = math.prod(shape) // block * block_bytes
        place = cursor.take(count)
        data = np.frombuffer(content, np.uint8, count, place)
        tensors.append(GGUFTensor(name, shape, kind, data, place, content))
    return metadata, tuple(tensors)


@dataclass(frozen=True)
class Tiling:
    """A gated delta net's value heads along one axis of a tensor.

    They read key heads in groups, [k0, k0, ..., k1, k1, ...]; ggml repeats key heads whole, [k0, k1, ..., k0, k1, ...],
    and stores all that belongs to value heads in that order.
    """

    groups: int  # key heads
    per_group: int  # value heads that read each of them
    axis: int = 0
    first: int = 0  # where the value heads begin; what stands before stays

    def _order(self, count: int) -> np.ndarray[Any, np.dtype[np.intp]]:
        heads = np.arange(self.first, count).reshape(self.groups, self.per_group, -1)
        return np.concatenate([np.arange(self.first), heads.swapaxes(0, 1).reshape(-1)])

    def tiled(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The checkpoint's values in the file's order."""
        return np.take(values, self._order(values.shape[self.axis]), self.axis)

    def grouped(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The file's values in the checkpoint's order."""
        return np.take(values, np.argsort(self._order(values.shape[self.axis])), self.axis)


def tilings(key_heads: int, value_heads: int, key_width: int) -> Mapping[str, Tiling]:
    """By name of a net's module or parameter; key_width: numbers of all key heads."""
    per_group = value_heads // key_heads
    if per_group == 1:
        return {}
    values, behind_keys = (Tiling(key_heads, per_group, first=first) for first in (0, 2 * key_width))
    return {
        **dict.fromkeys(("in_proj_qkv", "conv1d"), behind_keys),
        **dict.fromkeys(("in_proj_z", "in_proj_b", "in_proj_a", "dt_bias", "A_log"), values),
        "out_proj": Tiling(key_heads, per_group, axis=1),
    }
