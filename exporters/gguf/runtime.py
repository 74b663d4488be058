"""llama.cpp, through llama-cpp-python's low-level API: only this file and the quantizer in `matrix` touch it.

Its log is kept from the terminal; what it last complained about goes into error messages. No torch is imported: a
process that only runs a file holds none.

What is computed together decides how sums are rounded: `continuation_rows` and `write_together` run several sequences
in one context, and the native runner (runtime_bench/native/runner.cpp) as these do.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError, MissingExtraError
from exporters.gguf.quants import CACHE_TYPES, DEFAULT_CACHE, FLASH_AUTO, FLASH_ON

FloatArray = npt.NDArray[np.float32]
_DISTRIBUTION = "llama-cpp-python"
# 0.3.36 renamed fields that the runtime sets (use_mmap became load_mode); the low-level API may move again in 0.4.
_VERSIONS = ((0, 3, 36), (0, 4))
_LOAD_MMAP = 1
_ALL_LAYERS = -1
_OF_PROCESSOR = ("CPU", "AMX")  # how the names of buffers begin that are no GPU's
_INFORMATION, _WARNING, _ERROR, _CONTINUED = 2, 3, 4, 5
_BUFFER = re.compile(r"(\S+) model buffer size = +(\d+\.\d+) MiB")
_FLASH = re.compile(r"Flash Attention (enabled|not supported)")
SEQUENCES = 16
"""In a context."""
BATCH = 512
"""Tokens of one call, and with all logits the rows of the output."""


class Log:
    """The last warnings and errors that llama.cpp logged, whole lines, and those that say how a file was opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._complaints: deque[str] = deque(maxlen=20)
        self._facts: deque[str] = deque(maxlen=100)
        self._open, self._level = "", 0

    def __call__(self, level: int, text: bytes | None, _: Any) -> None:
        with self._lock:
            self._level = self._level if level == _CONTINUED else level
            if self._level not in (_INFORMATION, _WARNING, _ERROR):
                return
            *whole, self._open = (self._open + (text or b"").decode("utf-8", "replace")).split("\n")
            lines = [line.strip() for line in whole if line.strip()]
            self._facts.extend(line for line in lines if _BUFFER.search(line) or _FLASH.search(line))
            if self._level != _INFORMATION:
                self._complaints.extend(lines)

    def clear(self) -> None:
        """Forget everything, before a file is opened."""
        with self._lock:
            self._complaints.clear()
            self._facts.clear()
            self._open = ""

    def last(self, count: int = 3) -> str:
        """The newest complaints as one."""
        with self._lock:
            return "; ".join(list(self._complaints)[-count:]) or "llama.cpp gave no reason"

    def opened(self) -> tuple[bool | None, dict[str, int]]:
        """Whether llama.cpp chose its flash kernel, None if it did not say; bytes of the weights by their buffer."""
        flash, sizes = None, dict[str, int]()
        with self._lock:
            for line in self._facts:
                if match := _FLASH.search(line):
                    flash = match[1] == "enabled"
                elif match := _BUFFER.search(line):
                    sizes[match[1]] = sizes.get(match[1], 0) + round(float(match[2]) * 2**20)
        return flash, sizes


log = Log()


@functools.cache
def library() -> Any:
    """The llama_cpp module: imported, its version checked, its log redirected, its backend initialized."""
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingExtraError(_DISTRIBUTION, "gguf") from error
    except (OSError, RuntimeError) as error:
        raise InputError(f"{_DISTRIBUTION} is installed but its library does not load: {error}") from error
    version = importlib.metadata.version(_DISTRIBUTION)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not _VERSIONS[0] <= numbers < _VERSIONS[1]:
        low, high = (".".join(map(str, bound)) for bound in _VERSIONS)
        raise InputError(
            "this version is not supported", field=_DISTRIBUTION, value=version, allowed=f">={low},<{high}"
        )
    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.phoneready_log_callback = callback  # C keeps only the address: the object must live as long
    llama_cpp.llama_backend_init()
    return llama_cpp


def runtime_version() -> str:
    """Versions of the binding and of llama.cpp; MissingExtraError without it, InputError if it is not supported."""
    version = library().llama_version().decode()
    return f"{_DISTRIBUTION} {importlib.metadata.version(_DISTRIBUTION)}, llama.cpp {version}"


def system_info() -> str:
    """llama.cpp's line about the backends and processor features it was built with."""
    return str(library().llama_print_system_info().decode("utf-8", "replace")).strip(" |")


class Entry(NamedTuple):
    """One token of a batch."""

    token: int
    position: int  # in its sequences
    sequences: tuple[int, ...]  # it attends to what came before in them
    wanted: bool = False  # whether the logits after it are


class LlamaModel:
    """An open GGUF file with a context to run it in, unless it was opened for its vocabulary only. For one thread.

    Attributes:
        is_recurrent: Whether blocks keep something of a text that belongs to only one sequence.
        flash_attention: Whether attention runs in the flash kernel; None if llama.cpp does not tell.
        weight_buffers: Bytes of the weights by llama.cpp's name of the buffer that holds them.
    """

    def __init__(self, path: Path, model: Any, context: Any, cache_type: str) -> None:
        self.path, self.cache_type = path, cache_type
        chose_flash, self.weight_buffers = log.opened()
        asked = CACHE_TYPES[cache_type].flash_attention
        self.flash_attention = chose_flash if asked == FLASH_AUTO else asked == FLASH_ON
        self._lib, self._model, self._context = library(), model, context
        self._vocab = self._lib.llama_model_get_vocab(model)
        self._n_batch = self._lib.llama_n_batch(context) if context else 0
        self.n_ctx = int(self._lib.llama_n_ctx(context)) if context else 0
        self.vocab_size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.n_params = int(self._lib.llama_model_n_params(model))
        self.size_bytes = int(self._lib.llama_model_size(model))
        description = ctypes.create_string_buffer(256)
        self._lib.llama_model_desc(model, description, len(description))
        self.description = description.value.decode("utf-8", "replace")
        self.bos_token = int(self._lib.llama_vocab_bos(self._vocab))
        self.is_recurrent = bool(
            self._lib.llama_model_is_recurrent(model) or self._lib.llama_model_is_hybrid(model)
        )

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice."""
        if self._context:
            _computed(self._lib.llama_free, self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def backends(self) -> str:
        """What holds, and so multiplies, the weights: CPU, or the GPUs beside it."""
        others = [name for name in self.weight_buffers if not name.startswith(_OF_PROCESSOR)]
        return ", ".join(others) or "CPU"

    def is_end_of_generation(self, token: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text, special tokens in it included; `add_special`: and those that the file asks for."""
        raw = text.encode("utf-8")
        size = len(raw) + 8
        for _ in range(2):
            ids = (self._lib.llama_token * size)()
            count = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, size, add_special, True)
            if count >= 0:
                return list(ids[:count])
            size = -count
        raise InputError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes with {self.path}")

    def detokenize(self, tokens: Sequence[int], *, special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        pieces = []
        for token in tokens:
            buffer, count = ctypes.create_string_buffer(64), 0
            for _ in range(2):  # a token that does not fit says how long it is
                count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
                if count >= 0:
                    break
                buffer = ctypes.create_string_buffer(-count)
            pieces.append(buffer.raw[:count])
        return b"".join(pieces).decode("utf-8", "replace")

    def clear(self) -> None:
        """Forget all decoded tokens: the next one is at position 0."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def copy_sequence(self, source: int, target: int) -> None:
        """Let a sequence hold what another one holds, in place of what it held."""
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_rm(memory, target, -1, -1)
        self._lib.llama_memory_seq_cp(memory, source, target, -1, -1)

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Run tokens after those decoded so far, with logits of the last one, and wait: what llama-bench times."""
        ids = np.ascontiguousarray(tokens, dtype=np.int32)
        for start in range(0, len(ids), self._n_batch):
            piece = ids[start : start + self._n_batch]
            pointer = piece.ctypes.data_as(ctypes.POINTER(self._lib.llama_token))
            self._run(self._lib.llama_batch_get_one(pointer, len(piece)))
        self._lib.llama_synchronize(self._context)

    def last_logits(self) -> FloatArray:
        """Logits after the last decoded token, (vocab_size,) float32, copied."""
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).copy()

    def iter_logits(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> Iterator[FloatArray]:
        """Logits of a window in an empty context, (k, vocab_size) for the next k positions; views: use them at once."""
        self.clear()
        yield from self.iter_entries(
            [Entry(int(token), place, (0,), wanted=True) for place, token in enumerate(tokens)]
        )

    def iter_entries(self, entries: Sequence[Entry]) -> Iterator[FloatArray]:
        """Run tokens of several sequences; (k, vocab_size) for the next k wanted entries: views, use them at once."""
        lib = self._lib
        pointer = ctypes.POINTER(lib.llama_seq_id)
        for start in range(0, len(entries), self._n_batch):
            piece = entries[start : start + self._n_batch]
            count, ids = len(piece), [(lib.llama_seq_id * len(e.sequences))(*e.sequences) for e in piece]
            arrays: dict[str, Any] = {
                "token": (lib.llama_token * count)(*(e.token for e in piece)),
                "pos": (lib.llama_pos * count)(*(e.position for e in piece)),
                "n_seq_id": (ctypes.c_int32 * count)(*(len(e.sequences) for e in piece)),
                "seq_id": (pointer * count)(*(ctypes.cast(array, pointer) for array in ids)),
                "logits": (ctypes.c_int8 * count)(*(e.wanted for e in piece)),
            }
            batch = lib.llama_batch()
            batch.n_tokens = count
            for name, array in arrays.items():
                setattr(batch, name, ctypes.cast(array, type(getattr(batch, name))))
            self._run(batch)
            if wanted := sum(entry.wanted for entry in piece):
                logits = lib.llama_get_logits(self._context)
                yield np.ctypeslib.as_array(logits, shape=(wanted, self.vocab_size))

    def _run(self, batch: Any) -> None:
        status = _computed(self._lib.llama_decode, self._context, batch)
        if status == 1:
            raise InputError(
                f"{self.path}: the text does not fit the context", field="n_ctx", value=self.n_ctx
            )
        if status != 0:
            raise InputError(f"llama.cpp cannot run {self.path}: {log.last()}")


_THREAD = ThreadPoolExecutor(1, "llama.cpp")


def _computed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call llama.cpp on a thread that torch never computes on: both configure its AMX tiles, and would crash."""
    if "torch" not in sys.modules:
        return function(*arguments)
    return _THREAD.submit(function, *arguments).result()


class Context(NamedTuple):
    """What a file is opened to run."""

    n_ctx: int = 512  # tokens the context must hold; llama.cpp may round it up
    n_batch: int = 2048  # most tokens of one call; with all logits the output is n_batch * vocab_size floats
    n_ubatch: int = 512  # tokens that are computed at once
    cache_type: str = DEFAULT_CACHE  # of keys and values, a key of CACHE_TYPES
    n_seq: int = 1
    # Whether sequences may have tokens in common, and each as many as it likes of the context; else each has its part,
    # n_ctx / n_seq tokens: several times as fast for many, if those of a batch follow each other without a gap.
    shared: bool = True


def open_model(path: Path, context: Context, *, n_threads: int = 1, on_gpu: bool = False) -> LlamaModel:
    """Open a GGUF file; with `on_gpu` a GPU computes all layers, if there is one. InputError has llama.cpp's reason."""
    lib = library()
    model = _load(path, n_gpu_layers=_ALL_LAYERS if on_gpu else 0)
    settings, cache = lib.llama_context_default_params(), CACHE_TYPES[context.cache_type]
    settings.n_ctx, settings.n_batch = context.n_ctx, min(context.n_batch, context.n_ctx)
    settings.n_ubatch = min(context.n_ubatch, context.n_batch, context.n_ctx)
    settings.n_threads = settings.n_threads_batch = n_threads
    settings.n_seq_max, settings.kv_unified = context.n_seq, context.n_seq > 1 and context.shared
    settings.type_k = settings.type_v = cache.ggml_type
    settings.flash_attn_type = cache.flash_attention
    settings.no_perf = True
    opened = lib.llama_init_from_model(model, settings)
    if not opened:
        lib.llama_model_free(model)
        raise InputError(
            f"llama.cpp cannot make a context of {context.n_ctx} tokens for {path}: {log.last()}"
        )
    return LlamaModel(path, model, opened, context.cache_type)


def open_vocabulary(path: Path) -> LlamaModel:
    """A GGUF file to tokenize with: no weights are loaded, and there is no context; raises as `open_model`."""
    return LlamaModel(path, _load(path, vocab_only=True), None, DEFAULT_CACHE)


def _load(path: Path, **settings: Any) -> Any:
    lib = library()
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file")
    params = lib.llama_model_default_params()
    params.load_mode, params.n_gpu_layers = _LOAD_MMAP, 0
    for name, value in settings.items():
        setattr(params, name, value)
    log.clear()
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise InputError(f"llama.cpp cannot load {path}: {log.last()}")
    return model


def fitting(lengths: Sequence[int], shared: int, n_ctx: int, most: int = SEQUENCES) -> Iterator[slice]:
    """Runs of sequences, at most `most`, of these lengths beside `shared` tokens, that a context holds at once."""
    start, used = 0, shared
    for index, length in enumerate(lengths):
        if index - start == most or used + length > n_ctx:
            yield slice(start, index)
            start, used = index, shared
        used += length
    yield slice(start, len(lengths))


def continuation_rows(
    model: LlamaModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> Iterator[FloatArray]:
    """Logits after a context, and after all tokens but the last of each continuation in turn; as `iter_entries`."""
    everyone, start = tuple(range(len(continuations))), len(context)
    entries = [Entry(token, place, everyone) for place, token in enumerate(context[:-1])]
    entries.append(Entry(context[-1], start - 1, everyone, wanted=True))
    for sequence, continuation in enumerate(continuations):
        entries += [
            Entry(token, start + place, (sequence,), wanted=True)
            for place, token in enumerate(continuation[:-1])
        ]
    model.clear()
    yield from model.iter_entries(entries)


def write_together(
    model: LlamaModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    is_over: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Greedy continuations of prompts that fit the context together, without the token that ends them."""
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    entries = [
        Entry(token, place, (sequence,), wanted=place == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for place, token in enumerate(prompt)
    ]
    model.clear()
    while going:
        tokens = [int(row.argmax()) for row in chain.from_iterable(model.iter_entries(entries))]
        entries, still = [], []
        for sequence, token in zip(going, tokens, strict=True):
            if model.is_end_of_generation(token):
                continue
            answer = answers[sequence]
            answer.append(token)
            if len(answer) < max_new_tokens and not is_over(answer):
                place = len(prompts[sequence]) + len(answer) - 1
                entries.append(Entry(token, place, (sequence,), wanted=True))
                still.append(sequence)
        going = still
    return answers
