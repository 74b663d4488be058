"""Does a file still write text? A fast model that writes nonsense is no fast model: degenerate text voids a speed.

`check_text` starts `python -m runtime_bench.measuring.text_check`, which continues three beginnings greedily
and judges the continuations: a file that crashes its runtime takes that process along and not ours. The file is run
here, in this machine's runtime for it, wherever its speed is measured: the weights decide whether it makes sense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cfsp.child_process import python_module
from cfsp.reading import read_json_object
from cfsp.text.degeneration import degenerate
from runtime_bench.process import ProcessFailed, exchange, read_answer
from runtime_bench.worker import serve

BEGINNINGS = (
    "The lighthouse stood on a rock above the sea, and every evening the old keeper",
    "There are many ways to learn a new language. One of them is",
    "Last summer my friend and I went to the mountains, where we",
)
"""Beginnings without a chat template, which not every model has; they end where no text may end."""
NEW_TOKENS = 48
_CONTEXT = 128
_THREADS = 1
"""Several would wait for each other on a busy machine, and nothing here is timed."""


@dataclass(frozen=True)
class TextCheck:
    """What a file wrote."""

    texts: tuple[str, ...] = ()  # Continuations of BEGINNINGS; empty where it could not be run here
    # The reason why they are degenerate, one of cfsp.text.degeneration.CHECKS; None where they are not, or
    # where nothing is known
    degenerate: str | None = None
    problem: str | None = None  # Why it could not be run


def judge(texts: Sequence[str]) -> str | None:
    """Why all of the continuations are degenerate: the first one's reason. One that makes sense acquits the file,
    since small models that are whole loop now and then when they are greedy."""
    reasons = [degenerate(text, prompt) for text, prompt in zip(texts, BEGINNINGS, strict=True)]
    return reasons[0] if all(reasons) else None


def check_text(path: Path, timeout_s: float, cache_type: str | None = None) -> TextCheck:
    """Let a file write in a fresh process."""
    if path.suffix.lower() not in _WRITERS:
        return TextCheck(problem=f"nothing here runs {path.suffix} files")
    command = python_module("runtime_bench.measuring.text_check")
    asked = {"path": str(path.resolve()), "cache_type": cache_type}
    try:
        return read_answer(TextCheck, exchange(command, asked, timeout_s))
    except ProcessFailed as error:
        return TextCheck(problem=str(error))


def _answer(payload: dict[str, Any]) -> TextCheck:
    path = Path(payload["path"])
    texts = _WRITERS[path.suffix.lower()](path, payload["cache_type"])
    return TextCheck(tuple(texts), judge(texts))


def _continue_gguf(path: Path, cache_type: str | None) -> list[str]:
    from exporters.gguf.cache_types import DEFAULT_CACHE
    from exporters.gguf.runtime import Context, open_model

    context = Context(_CONTEXT, cache_type=cache_type or DEFAULT_CACHE)
    with open_model(path, context, n_threads=_THREADS) as model:
        return [
            model.detokenize(
                model.generate(model.tokenize(text, add_special=True)[: _CONTEXT - NEW_TOKENS], NEW_TOKENS),
                special=False,
            )
            for text in BEGINNINGS
        ]


def _continue_onnx(path: Path, _: str | None) -> list[str]:
    from tokenizers import Tokenizer

    from exporters.onnx.folder import folder_of
    from exporters.onnx.runtime import open_model

    folder = folder_of(path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stops = _stop_tokens(folder)
    with closing(open_model(path, n_ctx=_CONTEXT, n_threads=_THREADS, n_batch=_CONTEXT)) as model:
        return [
            tokenizer.decode(_greedy(model, tokenizer.encode(text).ids[: _CONTEXT - NEW_TOKENS], stops))
            for text in BEGINNINGS
        ]


def _greedy(model: Any, prompt: list[int], stops: set[int]) -> list[int]:
    model.clear()
    written: list[int] = []
    tokens = prompt
    while len(written) < NEW_TOKENS:
        token = int(model.decode(tokens)[-1].argmax())
        if token in stops:
            break
        written.append(token)
        tokens = [token]
    return written


def _stop_tokens(folder: Path) -> set[int]:
    """Where the folder's configs say that a text ends."""
    stops: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends = read_json_object(folder / name).get("eos_token_id")
            stops |= {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}
    return stops


_WRITERS: MappingProxyType[str, Callable[[Path, str | None], list[str]]] = MappingProxyType(
    {".gguf": _continue_gguf, ".onnx": _continue_onnx}
)


if __name__ == "__main__":
    serve(_answer, lambda reason: TextCheck(problem=reason))
