"""llama.cpp, through llama-cpp-python's low-level API: the one place that touches it, with llama_library.

`open_model` gives a `LlamaModel`, which tokenizes, decodes and hands out logits.
llama.cpp's own log is kept from the terminal; what it last complained about goes into error messages.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError
from exporters.gguf.cache_types import CACHE_TYPES, DEFAULT_CACHE, FLASH_AUTO, FLASH_ON
from exporters.gguf.llama_batch import Entry, native_batch
from exporters.gguf.llama_library import FloatArray, library, log

_LOAD_MMAP = 1
_ALL_LAYERS = -1
_OF_PROCESSOR = ("CPU", "AMX")
"""How the names of buffers begin that are no GPU's."""


class LlamaModel:
    """An open GGUF file with, unless it was opened for its vocabulary only, a context to run it in.

    Use it as a context manager, or call `close`. Not safe to share between threads.

    Attributes:
        path: The file.
        cache_type: Type of its keys and values, a key of CACHE_TYPES.
        flash_attention: Whether attention runs in the flash kernel; None where llama.cpp does not tell.
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
        """Whether blocks keep something of a text that belongs to one sequence alone."""
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

        Logits are made for the last token alone. Prompts are cut where they exceed n_batch; llama.cpp itself works
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
            batch, arrays = native_batch(piece)
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


def open_model(
    path: Path,
    *,
    n_ctx: int = 512,
    n_threads: int = 1,
    n_batch: int = 2048,
    n_ubatch: int = 512,
    cache_type: str = DEFAULT_CACHE,
    vocab_only: bool = False,
    n_seq: int = 1,
    shared: bool = True,
    on_gpu: bool = False,
) -> LlamaModel:
    """Open a GGUF file.

    Args:
        path: The file.
        n_ctx: Tokens the context must hold; llama.cpp may round it up.
        n_threads: Threads, for prompts and single tokens alike.
        n_batch: Most tokens of one llama_decode call; with all logits the output buffer is n_batch * vocab_size floats.
        n_ubatch: Tokens that are computed at once.
        cache_type: Of keys and values, a key of CACHE_TYPES.
        vocab_only: Load no weights and make no context: enough to tokenize.
        n_seq: Sequences in the context.
        shared: Whether they may have tokens in common, and each as many as it likes of the context; else each has its
            part, n_ctx / n_seq tokens, and attends to no other's: several times as fast for many, if those of a batch
            follow each other without a gap.
        on_gpu: Have a GPU hold and compute all layers, where llama.cpp was built for one and finds it.

    Raises:
        InputError: Not there, or llama.cpp cannot load it (the message has its reason).
        MissingExtraError: llama-cpp-python is not installed.
    """
    lib = library()
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file")
    params = lib.llama_model_default_params()
    params.n_gpu_layers = _ALL_LAYERS if on_gpu else 0
    params.vocab_only = vocab_only
    params.load_mode = _LOAD_MMAP
    log.clear()
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise InputError(f"llama.cpp cannot load {path}: {log.last()}")
    context = None
    if not vocab_only:
        context = lib.llama_init_from_model(
            model, _context_params(n_ctx, n_threads, n_batch, n_ubatch, n_seq, cache_type, shared=shared)
        )
        if not context:
            lib.llama_model_free(model)
            raise InputError(f"llama.cpp cannot make a context of {n_ctx} tokens for {path}: {log.last()}")
    return LlamaModel(path, model, context, cache_type)


def _context_params(
    n_ctx: int, n_threads: int, n_batch: int, n_ubatch: int, n_seq: int, cache_type: str, *, shared: bool
) -> Any:
    params = library().llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, min(n_batch, n_ctx), min(n_ubatch, n_batch, n_ctx)
    params.n_threads = params.n_threads_batch = n_threads
    params.n_seq_max, params.kv_unified = n_seq, n_seq > 1 and shared
    cache = CACHE_TYPES[cache_type]
    params.type_k = params.type_v = cache.ggml_type
    params.flash_attn_type = cache.flash_attention
    params.no_perf = True
    return params
