"""llama.cpp, through llama-cpp-python's low-level API: only this file and the quantizer in `matrix` touch it.

`open_model` gives a `LlamaModel`, which tokenizes, decodes and hands out logits. llama.cpp's own log is kept from the
terminal; what it last complained about goes into error messages. No torch: a process that only runs a file holds none.

What is computed together decides how sums are rounded, so all that runs several sequences in one context does it by
`continuation_rows` and `write_together`, and the native runner (runtime_bench/native/runner.cpp) as these do.
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
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError, MissingExtraError
from exporters.gguf.cache_types import CACHE_TYPES, DEFAULT_CACHE, FLASH_AUTO, FLASH_ON

FloatArray = npt.NDArray[np.float32]
_DISTRIBUTION = "llama-cpp-python"
# 0.3.36 renamed fields that the runtime sets (use_mmap became load_mode); the low-level API may move again in 0.4.
_VERSIONS = ((0, 3, 36), (0, 4))
_LOAD_MMAP = 1
_ALL_LAYERS = -1
_OF_PROCESSOR = ("CPU", "AMX")
"""How the names of buffers begin that are no GPU's."""
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
        self._complaints: deque[str] = deque(maxlen=20)
        self._facts: deque[str] = deque(maxlen=100)
        self._open = ""
        self._level = 0
        self._lock = threading.Lock()

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

    @property
    def flash_attention(self) -> bool | None:
        """Whether llama.cpp chose its flash kernel, where the choice was its own; None if it told of none."""
        with self._lock:
            found = [match[1] for line in self._facts if (match := _FLASH.search(line))]
        return found[-1] == "enabled" if found else None

    @property
    def weight_buffers(self) -> dict[str, int]:
        """Bytes of the weights by the buffer that holds them: `CPU_Mapped` are the file's pages, others are copies."""
        with self._lock:
            found = [match for line in self._facts if (match := _BUFFER.search(line))]
        sizes: dict[str, int] = {}
        for match in found:
            sizes[match[1]] = sizes.get(match[1], 0) + round(float(match[2]) * 2**20)
        return sizes


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
    """Names and versions of the binding and of llama.cpp.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        InputError: Its version is not one that this module was written for.
    """
    version = library().llama_version().decode()
    return f"{_DISTRIBUTION} {importlib.metadata.version(_DISTRIBUTION)}, llama.cpp {version}"


def system_info() -> str:
    """llama.cpp's line about the backends and processor features it was built with."""
    return str(library().llama_print_system_info().decode("utf-8", "replace")).strip(" |")


@dataclass(frozen=True)
class Entry:
    """One token of a batch.

    Attributes:
        token: Its id.
        position: Its place in its sequences.
        sequences: Sequences that it belongs to; it attends to what came before in them.
        wanted: Whether the logits after it are wanted.
    """

    token: int
    position: int
    sequences: tuple[int, ...]
    wanted: bool = False


def _native_batch(entries: Sequence[Entry]) -> tuple[Any, list[Any]]:
    """A llama_batch, and the arrays that it points to, which must live as long as it is used."""
    lib = library()
    count = len(entries)
    ids = [(lib.llama_seq_id * len(e.sequences))(*e.sequences) for e in entries]
    pointer = ctypes.POINTER(lib.llama_seq_id)
    arrays: dict[str, Any] = {
        "token": (lib.llama_token * count)(*(e.token for e in entries)),
        "pos": (lib.llama_pos * count)(*(e.position for e in entries)),
        "n_seq_id": (ctypes.c_int32 * count)(*(len(e.sequences) for e in entries)),
        "seq_id": (pointer * count)(*(ctypes.cast(array, pointer) for array in ids)),
        "logits": (ctypes.c_int8 * count)(*(e.wanted for e in entries)),
    }
    batch = lib.llama_batch()
    batch.n_tokens = count
    for name, array in arrays.items():
        setattr(batch, name, ctypes.cast(array, type(getattr(batch, name))))
    return batch, [*arrays.values(), ids]


class LlamaModel:
    """An open GGUF file with, unless it was opened for its vocabulary only, a context to run it in.

    Use it as a context manager, or call `close`. Not safe to share between threads.

    Attributes:
        path: The file.
        cache_type: Type of its keys and values, a key of CACHE_TYPES.
        flash_attention: Whether attention runs in the flash kernel; None if llama.cpp does not tell.
        weight_buffers: Bytes of the weights by the buffer that holds them, as llama.cpp names it.
    """

    def __init__(self, path: Path, model: Any, context: Any, cache_type: str) -> None:
        self.path, self.cache_type = path, cache_type
        asked = CACHE_TYPES[cache_type].flash_attention
        self.flash_attention = log.flash_attention if asked == FLASH_AUTO else asked == FLASH_ON
        self.weight_buffers = log.weight_buffers
        self._lib = library()
        self._model = model
        self._context = context
        self._vocab = self._lib.llama_model_get_vocab(model)
        self._n_batch = self._lib.llama_n_batch(context) if context else 0

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free context and model; may be called twice."""
        if self._context:
            _computed(self._lib.llama_free, self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, which is also the length of a row of logits."""
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    @property
    def n_params(self) -> int:
        """Elements of all tensors."""
        return int(self._lib.llama_model_n_params(self._model))

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(self._lib.llama_model_size(self._model))

    @property
    def backends(self) -> str:
        """What holds, and so multiplies, the weights: CPU, or the GPUs beside it."""
        others = [name for name in self.weight_buffers if not name.startswith(_OF_PROCESSOR)]
        return ", ".join(others) or "CPU"

    @property
    def n_ctx(self) -> int:
        """Tokens that the context holds."""
        return int(self._lib.llama_n_ctx(self._context))

    @property
    def description(self) -> str:
        """llama.cpp's words for the model, such as "llama 256M Q4_0"."""
        buffer = ctypes.create_string_buffer(256)
        self._lib.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def bos_token(self) -> int:
        """Id of the start token; -1 without one."""
        return int(self._lib.llama_vocab_bos(self._vocab))

    @property
    def is_recurrent(self) -> bool:
        """Whether blocks keep something of a text that belongs to only one sequence."""
        return bool(
            self._lib.llama_model_is_recurrent(self._model) or self._lib.llama_model_is_hybrid(self._model)
        )

    def is_end_of_generation(self, token: int) -> bool:
        """Whether llama.cpp stops generating at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text, in which special tokens may be written out.

        Args:
            text: Any text.
            add_special: Add the start and end tokens that the file asks for.
        """
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
        return b"".join(self._piece(token, special) for token in tokens).decode("utf-8", "replace")

    def _piece(self, token: int, special: bool) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:count]

    def clear(self) -> None:
        """Forget all decoded tokens: the next one is at position 0."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def copy_sequence(self, source: int, target: int) -> None:
        """Let a sequence hold what another one holds, in place of what it held."""
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_rm(memory, target, -1, -1)
        self._lib.llama_memory_seq_cp(memory, source, target, -1, -1)

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Run tokens after those decoded so far, and wait until they are done: what llama-bench times.

        Logits are made only for the last token. Prompts are cut where they exceed n_batch; llama.cpp itself works
        in pieces of n_ubatch.

        Raises:
            InputError: The context is full, or a token is not in the vocabulary.
        """
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
        """Logits of a window that starts an empty context.

        Args:
            tokens: Token ids (n,).

        Yields:
            (k, vocab_size) float32 for k successive positions, at most n_batch. A view that the next piece
            overwrites: use or copy it at once.
        """
        self.clear()
        yield from self.iter_entries(
            [Entry(int(token), place, (0,), wanted=True) for place, token in enumerate(tokens)]
        )

    def iter_entries(self, entries: Sequence[Entry]) -> Iterator[FloatArray]:
        """Run tokens of several sequences after what their sequences hold already.

        Yields:
            (k, vocab_size) float32 for the next k wanted entries, in order. A view: use or copy it at once.
        """
        for start in range(0, len(entries), self._n_batch):
            piece = entries[start : start + self._n_batch]
            batch, arrays = _native_batch(piece)
            self._run(batch)
            del arrays
            wanted = sum(entry.wanted for entry in piece)
            if wanted:
                pointer = self._lib.llama_get_logits(self._context)
                yield np.ctypeslib.as_array(pointer, shape=(wanted, self.vocab_size))

    def generate(self, prompt: Sequence[int], max_new_tokens: int, *, stop_at_end: bool = True) -> list[int]:
        """Greedy continuation of a prompt in an empty context; stops before an end-of-generation token if asked to."""
        self.clear()
        self.decode(prompt)
        new: list[int] = []
        while len(new) < max_new_tokens:
            token = int(self.last_logits().argmax())
            if stop_at_end and self.is_end_of_generation(token):
                break
            new.append(token)
            if len(new) < max_new_tokens:
                self.decode([token])
        return new

    def _run(self, batch: Any) -> None:
        status = _computed(self._lib.llama_decode, self._context, batch)
        if status == 1:
            raise InputError(
                f"{self.path}: the text does not fit the context", field="n_ctx", value=self.n_ctx
            )
        if status != 0:
            raise InputError(f"llama.cpp cannot run {self.path}: {log.last()}")


@functools.cache
def _own_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "llama.cpp")


def _computed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call llama.cpp on a thread that torch never computes on.

    llama.cpp configures the processor's matrix tiles (AMX) once a thread. oneDNN, in torch, configures and releases
    them as it goes, so that the next tile that llama.cpp loads on that thread would kill the process.
    """
    if "torch" not in sys.modules:
        return function(*arguments)
    return _own_thread().submit(function, *arguments).result()


@dataclass(frozen=True)
class Context:
    """What a file is opened to run.

    Attributes:
        n_ctx: Tokens the context must hold; llama.cpp may round it up.
        n_batch: Most tokens of one llama_decode call; with all logits the output buffer is n_batch * vocab_size floats.
        n_ubatch: Tokens that are computed at once.
        cache_type: Of keys and values, a key of CACHE_TYPES.
        n_seq: Sequences in the context.
        shared: Whether they may have tokens in common, and each as many as it likes of the context; else each has its
            part, n_ctx / n_seq tokens, and attends to no other's: several times as fast for many, if those of a batch
            follow each other without a gap.
    """

    n_ctx: int = 512
    n_batch: int = 2048
    n_ubatch: int = 512
    cache_type: str = DEFAULT_CACHE
    n_seq: int = 1
    shared: bool = True


def open_model(path: Path, context: Context, *, n_threads: int = 1, on_gpu: bool = False) -> LlamaModel:
    """Open a GGUF file.

    Args:
        path: The file.
        context: For what.
        n_threads: Threads, for prompts and single tokens alike.
        on_gpu: Have a GPU hold and compute all layers, if llama.cpp was built for one and finds it.

    Raises:
        InputError: Not there, or llama.cpp cannot load it (the message has its reason).
        MissingExtraError: llama-cpp-python is not installed.
    """
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
    """Runs of sequences that can be computed at once.

    Args:
        lengths: Tokens of each, none more than fits alone.
        shared: Tokens that all of them have in common, beside these.
        n_ctx: Tokens that the context holds.
        most: Sequences at once.
    """
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
    """Logits after a context, and after all tokens but the last of each continuation in turn.

    Yields:
        (k, vocab_size) float32 for the next k of these. A view: use or copy it at once.
    """
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
    """Greedy continuations of prompts that fit the context together, without the token that ends them.

    Args:
        model: The file.
        prompts: Token ids, at least one each.
        max_new_tokens: Most tokens of a continuation.
        is_over: Whether what was written ends there.
    """
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
