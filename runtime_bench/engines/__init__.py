"""Engines: the runtimes that an exported file is measured in.

A row of ENGINES names the adapter's module, which is imported when it is used, so that a measuring process holds only
its own engine. Other distributions add rows by entry point (cfsp.plugins).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

from cfsp import plugins
from cfsp.errors import InputError, LimitError, require_extra
from exporters.gguf.quants import MEASURED_CACHES
from runtime_bench.records.reported import EngineSettings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_DATA_SUFFIXES, _LAST = ("_data", ".data"), "_last.onnx"


@dataclass(frozen=True)
class SessionSettings:
    """How a file is opened."""

    n_ctx: int  # Context length in tokens
    n_threads: int  # Threads for prompt and generation
    n_batch: int  # Most tokens given to the engine at once
    n_ubatch: int  # Most tokens computed at once
    cache_type: str | None = (
        None  # Of keys and values, one of the engine's `cache_types`; None for its own choice
    )
    backend: str | None = None  # What shall compute, in small letters; None for the processor
    n_seq: int = 1  # Texts that the context holds at once; engines that hold one read them in turn


@dataclass(frozen=True)
class EngineFacts:
    """What an engine says about itself and the open file; unknown is None."""

    model_type: str | None = None
    model_size: int | None = None  # Bytes of all weights
    model_n_params: int | None = None
    backends: str | None = None  # Where it computes: CPU, or what does beside it
    versions: dict[str, str] = field(default_factory=dict)  # Names of libraries to their versions
    system_info: str | None = None  # The engine's own line about the machine features it uses
    settings: EngineSettings = field(default_factory=EngineSettings)  # How it computes


def files_of(path: Path) -> list[Path]:
    """A model file and, for ONNX, its external data: `model.onnx` with `model.onnx_data` or `model.onnx.data`.

    `model_last.onnx` shares the data of `model.onnx`.
    """
    if path.suffix != ".onnx":
        return [path]
    owner = path.name.removesuffix(_LAST) + ".onnx" if path.name.endswith(_LAST) else path.name
    beside = (path.with_name(owner + suffix) for suffix in _DATA_SUFFIXES)
    return [path, *(file for file in beside if file.is_file())]


def size_of(path: Path) -> int:
    """Bytes of all files of a model."""
    return sum(file.stat().st_size for file in files_of(path))


def file_facts(path: Path, backends: str, versions: dict[str, str]) -> EngineFacts:
    """What is known of an open file whose engine says nothing of it."""
    return EngineFacts(path.stem, size_of(path), backends=backends, versions=versions)


def continuation_scores(
    pieces: Iterable[npt.NDArray[np.float32]], continuations: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """For each continuation ln p of its tokens, in nats and float64, and whether each is the likeliest.

    Args:
        pieces: Rows of logits (k, vocab_size) after the context, then after all tokens but the last of each
            continuation in turn.
        continuations: Token ids, at least one each.

    Raises:
        LimitError: Logits that are not finite.
    """
    import numpy as np

    first = [(number, tokens[0]) for number, tokens in enumerate(continuations)]
    later = [[(number, token)] for number, tokens in enumerate(continuations) for token in tokens[1:]]
    predicted = iter([first, *later])
    sums, is_greedy = [0.0] * len(continuations), [True] * len(continuations)
    for piece in pieces:
        most = piece.max(-1).astype(np.float64)
        if not np.isfinite(most).all():
            raise LimitError("the model gives logits that are not finite")
        totals = most + np.log(np.exp(piece - most[:, None]).sum(-1))
        for row, total, best in zip(piece, totals, piece.argmax(-1), strict=True):
            for number, token in next(predicted):
                sums[number] += float(row[token] - total)
                is_greedy[number] = is_greedy[number] and int(best) == token
    return list(zip(sums, is_greedy, strict=True))


def ends_at(decode: Callable[[list[int]], str], stop_strings: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the text of some tokens has one of the strings in it, as a function of the tokens."""

    def is_over(tokens: list[int]) -> bool:
        text = decode(tokens) if stop_strings else ""
        return any(stop in text for stop in stop_strings)

    return is_over


class Vocabulary(Protocol):
    """The tokens of an open file."""

    @property
    def n_vocab(self) -> int:
        """Size of the vocabulary."""

    @property
    def bos(self) -> int | None:
        """The token a sequence must begin with; None where the model adds none."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, begun as the model wants a sequence begun."""


class Session(Vocabulary, Protocol):
    """An open file, ready for tokens. Every method returns only when its work is done."""

    @property
    def facts(self) -> EngineFacts:
        """What the engine says about itself and the file."""

    def clear(self) -> None:
        """Forget the context."""

    def decode(self, tokens: Sequence[int]) -> None:
        """Append tokens to the context, n_batch at a time, computing the logits of the last of each batch."""

    def sample(self) -> int:
        """The likeliest token after the last one."""

    def close(self) -> None:
        """Let go of the file and its memory."""


class AnsweringSession(Session, Protocol):
    """An open file whose engine tells what it thinks of a text: of a row of ENGINES that `answers`."""

    def score(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """For each continuation ln p of its tokens after the context, in nats, and whether each is the likeliest."""

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_strings: Sequence[str],
        ends: Sequence[int],
    ) -> list[list[int]]:
        """Greedy continuations, without the token that ends them: one of `ends`, or of what the engine knows as such.

        A continuation also ends once its text has one of `stop_strings` in it, which it then still holds.
        """


class EngineAdapter(Protocol):
    """What an engine's module has."""

    def prepare(self) -> None:
        """Import the engine's libraries, so that their cost is in no measurement."""

    def open_session(self, path: Path, settings: SessionSettings) -> Session:
        """Open a file; raises InputError if the engine cannot."""


@dataclass(frozen=True)
class EngineSpec:
    """Where an engine's adapter is and what it needs."""

    module: str  # The adapter's
    package: str  # Import name of the runtime
    distribution: str  # What it is called where it is installed from
    suffix: str  # Of the files it runs; the first engine for a suffix is the default
    extra: str = ""  # Extra of phoneready that brings it
    remote_packages: tuple[
        str, ...
    ] = ()  # Imported by its worker on another machine; empty if it runs only here
    cache_types: tuple[str, ...] = ()  # Types of the key-value cache that can be asked for
    answers: bool = False  # Whether its sessions are of `AnsweringSession`

    def require(self) -> None:
        """Check that the engine can be used, without importing it. Raises PhonereadyError: its package is not
        installed."""
        if self.extra:
            require_extra(self.package, self.extra, self.distribution)
        elif importlib.util.find_spec(self.package) is None:
            raise InputError(f"{self.distribution} is not installed; run: pip install '{self.distribution}'")

    @property
    def adapter(self) -> EngineAdapter:
        """The adapter; this imports it."""
        return cast(EngineAdapter, importlib.import_module(self.module))


_ENGINES = "runtime_bench.engines"
ENGINES = MappingProxyType(
    {
        "llama.cpp": EngineSpec(
            f"{_ENGINES}.llama_cpp", "llama_cpp", "llama-cpp-python", ".gguf", "gguf",
            cache_types=MEASURED_CACHES, answers=True,
        ),
        "onnxruntime": EngineSpec(
            f"{_ENGINES}.onnxruntime", "onnxruntime", "onnxruntime", ".onnx", "onnx",
            ("onnxruntime", "numpy", "tokenizers"),
            answers=True,
        ),
        "onnxruntime-genai": EngineSpec(
            f"{_ENGINES}.onnxruntime_genai", "onnxruntime_genai", "onnxruntime-genai", ".onnx", "onnx",
            ("onnxruntime_genai", "numpy"),
        ),
    }
)  # fmt: skip


def engine_for(path: Path) -> str:
    """The default engine of a file. Raises InputError: no engine runs files of this kind."""
    known: list[str] = []
    # A plugin is only imported if no engine before it runs the file.
    for name in (*ENGINES, *plugins.load_plugins(plugins.ENGINES, ENGINES)):
        known.append(engine_spec(name).suffix)
        if known[-1] == path.suffix.lower():
            return name
    allowed = ", ".join(dict.fromkeys(known))
    raise InputError(f"no engine runs {path.name}", field="file", value=str(path), allowed=allowed)


def check_cache(engine: str, cache_type: str | None) -> None:
    """Check that an engine can hold keys and values in a type; None is its own choice. Raises InputError: it
    cannot."""
    known = engine in ENGINES or engine in plugins.load_plugins(plugins.ENGINES, ENGINES)
    types = engine_spec(engine).cache_types if known else ()  # a browser's engines have no row
    if cache_type is not None and cache_type not in types:
        raise InputError(
            f"{engine} cannot be told the type of its cache" if not types else f"{engine} has no such cache",
            field="cache_type",
            value=cache_type,
            allowed=", ".join(types) or "without it",
        )


def engine_spec(engine: str) -> EngineSpec:
    """The row of an engine; of a built-in one without a look at plugins, as a measuring process wants it.
    Raises InputError: unknown engine, or plugins of one name."""
    if engine in ENGINES:
        return ENGINES[engine]
    others = plugins.load_plugins(plugins.ENGINES, ENGINES)
    if engine not in others:
        known = ", ".join((*ENGINES, *others))
        raise InputError("unknown engine", field="engine", value=engine, allowed=known)
    return others[engine].load(EngineSpec)
