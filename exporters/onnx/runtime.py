"""ONNX Runtime: a decoder graph opened with its key-value cache. The one place that makes sessions.

A graph with GroupQueryAttention writes keys and values into buffers of a fixed length that are its input and its
output at once; other graphs give a longer cache each time. A file says in its metadata which kind it is. What blocks
keep of a text that do not attend is given anew each time by both, and knows nothing of what came before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfsp.errors import InputError, require_extra

FloatArray = npt.NDArray[np.float32]

CACHE_KEY, FIXED_CACHE = "phoneready.cache", "fixed"
"""Metadata of a file whose cache is buffers of a fixed length."""

PREFILL_TOKENS = 128
"""Tokens of a prompt to run at once. More are slower, and cost memory: ONNX Runtime keeps the buffers of one block for
the next, and those of blocks that differ in width do not fit into each other's place."""

_KEYS_AND_VALUES = "past_key_values."
_PRESENT = {
    _KEYS_AND_VALUES: "present.",
    "past_conv.": "present_conv.",
    "past_recurrent.": "present_recurrent.",
}
"""How the names of caches begin, as inputs and as outputs."""
_RECORD_PROVIDERS, _PROVIDER = "session.record_ep_graph_assignment_info", "ExecutionProvider"
_FEEDS = ("input_ids", "attention_mask", "position_ids")
_TYPES = {"tensor(float)": ("f32", np.float32), "tensor(float16)": ("f16", np.float16)}
"""ONNX Runtime's name of a cache's type, to ours and NumPy's."""


def runtime_version() -> str:
    """Name and version; raises MissingExtraError if it is not installed."""
    require_extra("onnxruntime", "onnx")
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


class OnnxModel:
    """An open decoder graph and the text it has seen. For one thread.

    Attributes:
        n_past: Tokens in the cache, which holds `n_ctx`; `n_batch` are run at once.
        can_rewind: Whether all but the first of them can be forgotten.
        last_logits: Whether the graph gives only the last position's logits.
        cache_type: Of keys and values: f32 or f16; None without any.
        providers: Nodes of the graph by the execution provider that runs them, such as CPU; empty if it does not say.
    """

    def __init__(self, path: Path, session: Any, n_ctx: int, n_batch: int) -> None:
        self.path, self.n_ctx, self.n_batch, self.n_past = path, n_ctx, n_batch, 0
        self._session = session
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = session.get_outputs()
        if "input_ids" not in inputs or outputs[0].name != "logits":
            raise InputError(f"{path} is no decoder graph: it has no input_ids and logits")
        self._inputs = inputs
        self._caches = [name for name in inputs if name.startswith(tuple(_PRESENT))]
        sizes = [outputs[0].shape[-1], *(size for n in self._caches for size in _sizes(n, inputs[n]))]
        if not all(isinstance(size, int) for size in sizes):
            raise InputError(f"{path} leaves the size of its vocabulary or of its heads open")
        if unknown := {inputs[name].type for name in self._caches} - _TYPES.keys():
            raise InputError(f"{path} has a cache of {', '.join(unknown)}", allowed=", ".join(_TYPES))
        if missing := inputs.keys() - {*_FEEDS, *self._caches}:
            raise InputError(
                f"{path} wants inputs that a decoder does not have: {', '.join(sorted(missing))}"
            )
        self.vocab_size = int(outputs[0].shape[-1])
        self.last_logits = outputs[0].shape[1] == 1
        self.metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        fixed = self.metadata.get(CACHE_KEY) == FIXED_CACHE
        self._in_place = frozenset(n for n in self._caches if fixed and n.startswith(_KEYS_AND_VALUES))
        self.can_rewind = fixed and len(self._in_place) == len(self._caches)
        kinds = [inputs[name].type for name in self._caches if name.startswith(_KEYS_AND_VALUES)]
        self.cache_type = _TYPES[kinds[0]][0] if kinds else None
        self.providers: dict[str, int] = {}
        if hasattr(session, "get_provider_graph_assignment_info"):  # from 1.24 on
            for part in session.get_provider_graph_assignment_info():
                provider = part.ep_name.removesuffix(_PROVIDER)
                self.providers[provider] = self.providers.get(provider, 0) + len(part.get_nodes())
        self._cache: dict[str, Any] = {}
        self.clear()

    def close(self) -> None:
        """Let the session go; may be called twice."""
        self._session, self._cache = None, {}

    def clear(self) -> None:
        """Forget all text."""
        self.rewind(0)

    def rewind(self, n_past: int) -> None:
        """Forget all but the first `n_past` tokens: any number if all of the cache has a fixed length, else 0."""
        if n_past and not self.can_rewind:
            raise InputError("this graph's cache cannot be rewound", value=n_past, allowed="0")
        from onnxruntime import OrtValue

        self.n_past = n_past
        for name in self._caches:
            if name in self._in_place and name in self._cache:
                continue
            value, sizes = self._inputs[name], _sizes(name, self._inputs[name])
            if name.startswith(_KEYS_AND_VALUES):
                sizes.insert(1, self.n_ctx if name in self._in_place else 0)
            zeros = np.zeros((1, *sizes), dtype=_TYPES[value.type][1])
            self._cache[name] = OrtValue.ortvalue_from_numpy(zeros)

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> FloatArray:
        """Append tokens; returns float32 logits (n, vocab_size), or only the last one's. InputError: too many."""
        count = len(tokens)
        if self.n_past + count > self.n_ctx:
            raise InputError(
                "more text than the context holds",
                field="n_ctx",
                value=self.n_past + count,
                allowed=str(self.n_ctx),
            )
        feeds = {
            "input_ids": np.asarray(tokens, dtype=np.int64)[None],
            "attention_mask": np.ones((1, self.n_past + count), dtype=np.int64),
            "position_ids": np.arange(self.n_past, self.n_past + count, dtype=np.int64)[None],
        }
        binding = self._session.io_binding()
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        for name, cache in self._cache.items():
            binding.bind_ortvalue_input(name, cache)
        binding.bind_output("logits", "cpu")
        for name in self._caches:
            prefix = next(prefix for prefix in _PRESENT if name.startswith(prefix))
            present_name = f"{_PRESENT[prefix]}{name.removeprefix(prefix)}"
            if name in self._in_place:
                binding.bind_ortvalue_output(present_name, self._cache[name])
            else:
                binding.bind_output(present_name, "cpu")
        self._session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        for name, present in zip(self._caches, presents, strict=True):
            if name not in self._in_place:
                self._cache[name] = present
        self.n_past += count
        values: FloatArray = logits.numpy()[0]
        return values

    def iter_logits(self, tokens: npt.NDArray[np.integer]) -> Iterator[FloatArray]:
        """Logits of a text that nothing comes before, piece by piece, (k, vocab_size)."""
        self.clear()
        for start in range(0, len(tokens), self.n_batch):
            yield self.decode(tokens[start : start + self.n_batch])


def _sizes(name: str, value: Any) -> list[Any]:
    """The sizes of a cache that a file says: heads and numbers of a head, or what does not grow with the text."""
    _, *sizes = value.shape
    return [sizes[0], sizes[2]] if name.startswith(_KEYS_AND_VALUES) else sizes


def open_model(
    path: Path,
    *,
    n_ctx: int,
    n_threads: int,
    n_batch: int = PREFILL_TOKENS,
    provider: str | None = None,
) -> OnnxModel:
    """Open a file, for n_ctx tokens, of which at most n_batch are run at once; InputError if it cannot be loaded.

    `provider` is an execution provider such as cuda; what it cannot take, or all if it is not there, runs on the CPU.
    """
    require_extra("onnxruntime", "onnx")
    import onnxruntime

    if not path.is_file():
        raise InputError(f"{path} does not exist")
    providers, wanted = [f"CPU{_PROVIDER}"], (provider or "cpu").lower()
    known = {name.removesuffix(_PROVIDER).lower(): name for name in onnxruntime.get_all_providers()}
    if wanted not in known:
        raise InputError(
            "ONNX Runtime knows no such provider",
            field="backend",
            value=provider,
            allowed=", ".join(sorted(known)),
        )
    if wanted != "cpu" and known[wanted] in onnxruntime.get_available_providers():
        providers.insert(0, known[wanted])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised; written by ONNX Runtime it would be in colours
    options.add_session_config_entry(_RECORD_PROVIDERS, "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions have no common base
        raise InputError(f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0][:200]}") from error
    return OnnxModel(path, session, n_ctx, n_batch)


def continuation_rows(
    model: OnnxModel, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> FloatArray:
    """Logits after a context, and after all tokens but the last of each continuation in turn, (n, vocab_size)."""
    rows = [_read(model, context)[-1:]]
    for continuation in continuations:
        if len(continuation) > 1:
            if model.can_rewind:
                model.rewind(len(context))
            elif model.n_past != len(context):
                _read(model, context)
            rows.append(model.decode(continuation[:-1]).copy())
    return np.concatenate(rows)


def write(
    model: OnnxModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    ends: Collection[int],
    is_over: Callable[[list[int]], bool],
) -> list[int]:
    """Greedy continuation of a prompt, without the token of `ends` that ends it; `is_over` may end it, too."""
    answer: list[int] = []
    logits = _read(model, prompt)
    while (token := int(logits[-1].argmax())) not in ends:
        answer.append(token)
        if len(answer) == max_new_tokens or is_over(answer):
            break
        logits = model.decode([token])
    return answer


def _read(model: OnnxModel, tokens: Sequence[int]) -> FloatArray:
    """Logits of the last piece of a text that nothing comes before."""
    *_, last = model.iter_logits(np.asarray(tokens, dtype=np.int64))
    return last.copy()
