"""What a stage will take, before it begins: operations counted from shapes, and a product of these shapes timed here.

A stage is described by its `Work`; this machine's speed makes a `Forecast` of it. Memory and disk that are needed at
least are asked for before anything is written.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch

from cfsp.devices import CPU
from cfsp.errors import InputError
from cfsp.files import large_temporary
from cfsp.memory import require_memory
from cfsp.models.architectures import spec_for, state_size
from cfsp.models.config_file import read_model_config
from cfsp.models.families import FAMILIES
from cfsp.models.folds import is_folded
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_model import config_from_gguf, keeping_of_gguf
from cfsp.models.hf_folder import config_from_settings, keeping_of_folder, text_names
from cfsp.models.offload import AUTO, NARROW, WHOLE, Keeping
from cfsp.models.weights import OUTPUT_MATRIX, safetensors_files, uniform_dtype
from cfsp.precision import products_in
from cfsp.reading import as_input_error
from cfsp.units import format_bytes, format_seconds

LONG_S = 5.0
"""What takes less than that is not spoken of."""
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
_TRIAL_S, _TRIALS, _TRIAL_OPERATIONS, _TRIAL_TOKENS = 0.1, 3, 5e8, 128
"""Of a timing; and most operations of one product in it, or rows of numbers."""
_MOST_TOKENS = 1024
"""More are multiplied no faster."""
_SLOW_OPERATIONS, _SLOW_ELEMENTS = 2e9, 1e8
"""A second, that any machine does."""
_LIBRARIES = 600 * 2**20
"""Bytes that torch and transformers take before there is a model."""

_Shape = tuple[int, ...]

ProductsAs = Callable[[str, str], AbstractContextManager[None]]
"""Name of a dtype, type of a device -> a context in which matrix products are so."""


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

    @cached_property
    def largest_block(self) -> int:
        """Weights of the block that has most."""
        return max(sum(map(math.prod, block)) for block in self.blocks)

    @property
    def by_blocks(self) -> bool:
        """Whether the weights stay in files."""
        return self.keeping.in_files

    @property
    def resident_bytes(self) -> int:
        """Of weights that are in memory at once: all but of a model in files, and of one that is not whole a page."""
        page = 0 if self.keeping.is_whole else 4 * max(self.largest_block, self.end_weights)
        return page + self._kept_bytes * self.n_weights

    @property
    def least_resident_bytes(self) -> int:
        """Of these, what is in memory at least."""
        return self._kept_bytes * self.least_weights

    @property
    def _kept_bytes(self) -> int:
        """In memory, of a weight that is not at hand."""
        return 0 if self.keeping.in_files else self.keeping.dtype.itemsize

    def narrowed(self, ratio: float) -> Extent:
        """It with a share of the FFN channels gone."""
        blocks = tuple(
            tuple((_less(rows, width, ratio), _less(columns, width, ratio)) for rows, columns in block)
            for block, width in zip(self.blocks, self.widths, strict=True)
        )
        return replace(self, blocks=blocks)

    def pass_operations(self, tokens: int, seqlen: int) -> float:
        """Of all blocks over tokens in windows of `seqlen`; attention sees half of a window on average."""
        mixing = 2 * seqlen * self.hidden_size * len(self.blocks)
        return float(tokens) * (2 * self.block_weights + mixing)

    def head_operations(self, tokens: int) -> float:
        """Of the output matrix."""
        return 2.0 * tokens * self.end_weights

    def pass_elements(self, tokens: int) -> float:
        """Numbers of all blocks, between the products, that one function of each makes."""
        return float(tokens) * sum(2 * self.hidden_size + width for width in self.widths)

    def states_bytes(self, tokens: int) -> int:
        """Of hidden states at one depth, float32."""
        return 4 * tokens * (self.state_size or self.hidden_size)


def _less(size: int, width: int, ratio: float) -> int:
    return round(size * (1 - ratio)) if size == width else size


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
class Work:
    """What a stage takes.

    Attributes:
        products: Tokens beside each other -> floating-point operations taking as long as a matrix product's, by torch.
        elements: Numbers that go through something between these products.
        host_products: As `products`, of what the CPU computes whatever torch's device is: files in their own runtimes.
        host_elements: As `elements`, of these, and of what is read, quantized or written.
        seconds: Of what is as fast on any machine, or nearly.
        memory: Bytes at its peak, libraries left out.
        least_memory: Without so many bytes it cannot be.
        disk: Bytes that it leaves, or has at once, where its output goes.
        least_disk: Of these, what is there at least.
        scratch: Bytes in the folder for large temporary files, at its peak.
        is_most: Whether it is so much only where a text is as long as it may be.
    """

    products: Mapping[int, float] = field(default_factory=dict)
    elements: float = 0.0
    host_products: Mapping[int, float] = field(default_factory=dict)
    host_elements: float = 0.0
    seconds: float = 0.0
    memory: int = 0
    least_memory: int = 0
    disk: int = 0
    least_disk: int = 0
    scratch: int = 0
    is_most: bool = False

    def then(self, other: Work) -> Work:
        """Both, one after the other: what is left on the disk adds up, what is held meanwhile does not."""
        return Work(
            _added(self.products, other.products),
            self.elements + other.elements,
            _added(self.host_products, other.host_products),
            self.host_elements + other.host_elements,
            self.seconds + other.seconds,
            max(self.memory, other.memory),
            max(self.least_memory, other.least_memory),
            self.disk + other.disk,
            self.least_disk + other.least_disk,
            max(self.scratch, other.scratch),
            self.is_most or other.is_most,
        )

    def on_host(self, speed: float = 1.0) -> Work:
        """It on the CPU, whatever torch's device is, with products so many times as fast as torch's of float32."""
        products = _added(self.host_products, _times(1 / speed, self.products))
        elements = self.host_elements + self.elements
        return replace(self, products={}, elements=0.0, host_products=products, host_elements=elements)

    def is_within(self, seconds: float) -> bool:
        """Whether it takes no longer even on a slow machine, so that nothing need be timed."""
        operations = sum((*self.products.values(), *self.host_products.values()))
        slowly = operations / _SLOW_OPERATIONS + (self.elements + self.host_elements) / _SLOW_ELEMENTS
        return self.seconds + slowly < seconds

    def times(self, count: int) -> Work:
        """It so many times; it leaves what one leaves."""
        return replace(
            self,
            products=_times(count, self.products),
            elements=count * self.elements,
            host_products=_times(count, self.host_products),
            host_elements=count * self.host_elements,
            seconds=count * self.seconds,
        )


def _added(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    return {key: first.get(key, 0.0) + second.get(key, 0.0) for key in {**first, **second}}


def _times(factor: float, products: Mapping[int, float]) -> dict[int, float]:
    return {tokens: factor * operations for tokens, operations in products.items()}


@dataclass(frozen=True)
class Forecast:
    """What a stage will take on this machine.

    Attributes:
        seconds: Of this machine as it is now.
        memory: Bytes at its peak, as a process that has loaded the libraries.
        disk: Bytes where its output goes.
        scratch: Bytes in the folder for large temporary files.
        is_most: Whether a short text takes less.
    """

    seconds: float
    memory: int
    disk: int
    scratch: int
    is_most: bool = False

    def __str__(self) -> str:
        parts = [
            f"{'up to' if self.is_most else 'about'} {format_seconds(self.seconds)}",
            f"{format_bytes(self.memory)} of memory",
        ]
        parts += [f"{format_bytes(self.disk)} of disk"] if self.disk else []
        parts += [f"{format_bytes(self.scratch)} in {large_temporary()} meanwhile"] if self.scratch else []
        return ", ".join(parts)


def foresee(
    work: Work,
    extent: Extent,
    *,
    dtype: str = "float32",
    device: torch.device = CPU,
    products_as: ProductsAs = products_in,
) -> Forecast:
    """What work on a model will take here; products of its shapes are timed for it, a fraction of a second.

    Args:
        work: It.
        extent: Of the model.
        dtype: Of torch's products, a name in `cfsp.precision.DTYPES`.
        device: Where torch computes them.
        products_as: The context of `cfsp.precision` that it computes them in.

    Raises:
        RuntimeError: The device has no room for a product, or fails.
    """
    parts = (
        (work.products, work.elements, products_as(dtype, device.type), device),
        (work.host_products, work.host_elements, products_in("float32", CPU.type), CPU),
    )
    seconds = work.seconds
    for products, elements, multiplied, where in parts:
        seconds += elements / element_speed(extent, device=where) if elements else 0.0
        with multiplied:
            for tokens, operations in products.items():
                seconds += operations / product_speed(extent, tokens, device=where)
    return Forecast(seconds, work.memory + _LIBRARIES, work.disk, work.scratch, work.is_most)


def product_speed(extent: Extent, tokens: int, *, device: torch.device = CPU) -> float:
    """Operations a second of a product of so many tokens with a matrix of a model, with torch's threads, as it is now.

    Of a large matrix some rows are taken, and of many tokens a window.
    """
    tokens = min(tokens, _MOST_TOKENS)
    rows, columns = max((shape for block in extent.blocks for shape in block), key=math.prod)
    rows = max(1, min(rows, int(_TRIAL_OPERATIONS / (2 * tokens * columns))))
    weight, x = (torch.ones(n, columns, device=device) for n in (rows, tokens))
    return 2.0 * tokens * rows * columns / _fastest_s(lambda: x @ weight.T)


def element_speed(extent: Extent, *, device: torch.device = CPU) -> float:
    """Numbers a second that pass through an activation function: what is between the products."""
    x = torch.ones(_TRIAL_TOKENS, max(extent.widths), device=device)
    return x.numel() / _fastest_s(lambda: torch.nn.functional.silu(x) * x)


def _fastest_s(compute: Callable[[], torch.Tensor]) -> float:
    """Seconds of the fastest call of those that fit a tenth of a second; of three at least."""
    times: list[float] = []
    with torch.inference_mode():
        compute()
        end = time.perf_counter() + _TRIAL_S
        while len(times) < _TRIALS or time.perf_counter() < end:
            began = time.perf_counter()
            compute()[-1, -1].item()  # which waits for a GPU
            times.append(time.perf_counter() - began)
    return min(times)


def require_room(work: Work, output: Path | None, what: str, less: str = "a smaller model") -> None:
    """Refuse what cannot fit, before anything is written.

    Args:
        work: Of a stage.
        output: What it writes; None where that is nothing.
        what: Does it, in words.
        less: Would take less memory.

    Raises:
        InputError: Memory, the file system of the output, or that of scratch files has too little room.
    """
    require_memory(work.least_memory, what, less)
    needs = [(large_temporary(), work.scratch, "another folder (TMPDIR)")]
    if output is not None:
        needs.insert(0, (output, work.least_disk, "another place (-o)"))
    # Each alone, on one disk too: what is in the one may be gone before the other is written.
    for path, n_bytes, allowed in needs:
        if n_bytes and n_bytes > (free := shutil.disk_usage(_existing(path)).free):
            raise InputError(
                f"no space left to write {path}: {what} takes {format_bytes(n_bytes)} at least, and "
                f"{format_bytes(free)} are free",
                allowed=allowed,
            )


def _existing(path: Path) -> Path:
    """The path, or the folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
