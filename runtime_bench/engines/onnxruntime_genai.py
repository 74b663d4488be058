"""ONNX Runtime GenAI as an engine: its own cache and generation loop over the graph that genai_config.json names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import InputError
from cfsp.reading import read_json_object
from exporters.onnx.folder import GENAI_CONFIG, folder_of
from exporters.onnx.runtime import PREFILL_TOKENS
from runtime_bench.engines import EngineFacts, Session, SessionSettings, file_facts


class GenAISession:
    """An open folder; see `runtime_bench.engines.Session`."""

    def __init__(self, path: Path, folder: Path, settings: SessionSettings) -> None:
        import onnxruntime_genai as genai

        options = {"intra_op_num_threads": settings.n_threads}
        config = genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._genai, self._path, self._settings = genai, path, settings
        self._model = genai.Model(config)
        self._tokenizer = genai.Tokenizer(self._model)
        self.n_vocab = int(read_json_object(folder / GENAI_CONFIG)["model"]["vocab_size"])
        self.bos = None
        self.clear()

    @property
    def facts(self) -> EngineFacts:
        return file_facts(self._path, "CPU", {"onnxruntime-genai": self._genai.__version__})

    def clear(self) -> None:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._settings.n_ctx, do_sample=False)
        self._generator: Any = self._genai.Generator(self._model, parameters)

    def decode(self, tokens: Sequence[int]) -> None:
        step = min(self._settings.n_batch, self._settings.n_ubatch, PREFILL_TOKENS)
        for start in range(0, len(tokens), step):
            self._generator.append_tokens(list(tokens[start : start + step]))

    def tokenize(self, text: str) -> list[int]:
        """Token ids, as GenAI's tokenizer makes them; it adds a start token where the model's own does."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def sample(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def close(self) -> None:
        self._generator = self._model = None


def prepare() -> None:
    """Load the library."""
    import onnxruntime_genai  # noqa: F401


def open_session(path: Path, settings: SessionSettings) -> Session:
    """Open the folder that a graph belongs to. Raises InputError: no genai_config.json above it, or GenAI
    cannot load it."""
    folder = folder_of(path)
    if not (folder / GENAI_CONFIG).is_file():
        raise InputError(f"no {GENAI_CONFIG} in {folder}")
    named = read_json_object(folder / GENAI_CONFIG)["model"]["decoder"]["filename"]
    if (folder / named).resolve() != path.resolve():
        raise InputError(
            f"GenAI runs the graph that {GENAI_CONFIG} names, not {path}", allowed=str(folder / named)
        )
    try:
        return GenAISession(path, folder, settings)
    except RuntimeError as error:
        raise InputError(f"ONNX Runtime GenAI cannot load {folder}: {str(error).splitlines()[0]}") from error
