"""Engines: the runtimes that an exported file is measured in.

A row of ENGINES names the adapter's module; its import happens when it is used, so that a
measuring process holds nothing but its own engine. Other distributions add rows by entry point (cfsp.plugins).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, cast

from cfsp import plugins
from cfsp.errors import InputError, MissingExtraError

__all__ = [
    "ENGINES",
    "EngineFacts",
    "EngineSpec",
    "Session",
    "SessionSettings",
    "Vocabulary",
    "check_engine",
    "engine_for",
    "open_session",
    "prepare_engine",
    "require_engine",
]


@dataclass(frozen=True)
class SessionSettings:
    """How a file is opened.

    Attributes:
        n_ctx: Context length in tokens.
        n_threads: Threads for prompt and generation.
        n_batch: Most tokens given to the engine at once.
        n_ubatch: Most tokens computed at once.
    """

    n_ctx: int
    n_threads: int
    n_batch: int
    n_ubatch: int


@dataclass(frozen=True)
class EngineFacts:
    """What an engine says about itself and the open file; unknown is None.

    Attributes:
        model_type: The engine's description of the model.
        model_size: Bytes of all weights.
        model_n_params: Number of weights.
        backends: Where it computes.
        build_commit: Source revision of the engine.
        versions: Names of libraries to their versions.
        system_info: The engine's own line about the machine features it uses.
    """

    model_type: str | None
    model_size: int | None
    model_n_params: int | None
    backends: str | None
    build_commit: str | None
    versions: dict[str, str]
    system_info: str | None


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


class _EngineModule(Protocol):
    def prepare(self) -> None: ...

    def open_session(self, path: Path, settings: SessionSettings) -> Session: ...


@dataclass(frozen=True)
class EngineSpec:
    """Where an engine's adapter is and what it needs.

    Attributes:
        module: Adapter with `prepare()` and `open_session(path, settings)`.
        package: Import name of the runtime.
        distribution: What it is called where it is installed from.
        suffix: Of the files it runs; the first engine for a suffix is the default.
        extra: Extra of phoneready that brings it; empty where none does.
    """

    module: str
    package: str
    distribution: str
    suffix: str
    extra: str = ""


_ENGINES = "runtime_bench.engines"
ENGINES = MappingProxyType(
    {
        "llama.cpp": EngineSpec(f"{_ENGINES}.llama_cpp", "llama_cpp", "llama-cpp-python", ".gguf", "gguf"),
        "onnxruntime": EngineSpec(f"{_ENGINES}.onnxruntime", "onnxruntime", "onnxruntime", ".onnx", "onnx"),
        "onnxruntime-genai": EngineSpec(
            f"{_ENGINES}.onnxruntime_genai", "onnxruntime_genai", "onnxruntime-genai", ".onnx", "onnx"
        ),
    }
)


def engine_for(path: Path) -> str:
    """The default engine of a file.

    Raises:
        InputError: No engine runs files of this kind.
    """
    known: list[str] = []
    for name in (*ENGINES, *plugins.load_plugins(plugins.ENGINES, ENGINES)):
        known.append(_spec(name).suffix)
        if known[-1] == path.suffix.lower():
            return name
    allowed = ", ".join(dict.fromkeys(known))
    raise InputError(f"no engine runs {path.name}", field="file", value=str(path), allowed=allowed)


def check_engine(engine: str) -> None:
    """Check that an engine is known, be it installed or not.

    Raises:
        InputError: Unknown engine, or plugins of one name.
    """
    plugins.load_plugins(plugins.ENGINES, ENGINES)
    _spec(engine)


def require_engine(engine: str) -> None:
    """Check that an engine can be used, without importing it.

    Raises:
        InputError: Unknown engine, or plugins of one name.
        MissingExtraError: Its package is not installed.
    """
    check_engine(engine)
    _require_package(_spec(engine))


def prepare_engine(engine: str) -> None:
    """Import an engine's libraries, so that their cost is in no measurement.

    Raises:
        InputError: Unknown engine.
        MissingExtraError: Its package is not installed.
    """
    _require_package(_spec(engine))
    _module(engine).prepare()


def open_session(engine: str, path: Path, settings: SessionSettings) -> Session:
    """Open `path` in an engine.

    Raises:
        InputError: Unknown engine, or a file that it cannot open.
    """
    return _module(engine).open_session(path, settings)


def _spec(engine: str) -> EngineSpec:
    if engine in ENGINES:  # a measuring process looks no further
        return ENGINES[engine]
    others = plugins.load_plugins(plugins.ENGINES, ENGINES)
    if engine not in others:
        known = ", ".join((*ENGINES, *others))
        raise InputError("unknown engine", field="engine", value=engine, allowed=known)
    return others[engine].load(EngineSpec)


def _require_package(spec: EngineSpec) -> None:
    if importlib.util.find_spec(spec.package) is not None:
        return
    if spec.extra:
        raise MissingExtraError(spec.distribution, spec.extra)
    raise InputError(f"{spec.distribution} is not installed; run: pip install '{spec.distribution}'")


def _module(engine: str) -> _EngineModule:
    return cast(_EngineModule, importlib.import_module(_spec(engine).module))
