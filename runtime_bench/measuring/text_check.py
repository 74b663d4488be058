"""Does a file still write text? Degenerate text voids a speed: a fast model that writes nonsense is no fast model.

`check_text` starts `python -m runtime_bench.measuring.text_check`, which continues three beginnings greedily and judges
the continuations: a file that crashes its runtime takes that process along and not ours. The file runs here, wherever
its speed is measured: the weights decide whether it makes sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
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

    texts: tuple[str, ...] = ()  # Continuations of BEGINNINGS; empty if it could not be run here
    degenerate: str | None = (
        None  # Why they are, one of cfsp.text.degeneration.CHECKS; None if not, or not known
    )
    problem: str | None = None  # Why it could not be run


def judge(texts: Sequence[str]) -> str | None:
    """Why all of the continuations are degenerate: the first one's reason. One that makes sense acquits the file:
    small intact models, too, loop now and then when they are greedy."""
    reasons = [degenerate(text, prompt) for text, prompt in zip(texts, BEGINNINGS, strict=True)]
    return reasons[0] if all(reasons) else None


def check_text(path: Path, timeout_s: float, cache_type: str | None = None) -> TextCheck:
    """Let a file write in a fresh process."""
    if path.suffix.lower() not in (".gguf", ".onnx"):
        return TextCheck(problem=f"nothing here runs {path.suffix} files")
    asked = {"path": str(path.resolve()), "cache_type": cache_type}
    try:
        return read_answer(TextCheck, exchange(python_module(__name__), asked, timeout_s))
    except ProcessFailed as error:
        return TextCheck(problem=str(error))


def _answer(payload: dict[str, Any]) -> TextCheck:
    path, most = Path(payload["path"]), _CONTEXT - NEW_TOKENS
    if path.suffix.lower() == ".gguf":
        from exporters.gguf.quants import DEFAULT_CACHE
        from exporters.gguf.runtime import Context, write_together
        from exporters.gguf.runtime import open_model as open_gguf

        context = Context(_CONTEXT, cache_type=payload["cache_type"] or DEFAULT_CACHE)
        with open_gguf(path, context, n_threads=_THREADS) as model:
            prompts = [model.tokenize(text, add_special=True)[:most] for text in BEGINNINGS]
            written = [write_together(model, [each], NEW_TOKENS, lambda _: False) for each in prompts]
            texts = [model.detokenize(answer, special=False) for (answer,) in written]
    else:
        from tokenizers import Tokenizer

        from exporters.onnx.folder import folder_of
        from exporters.onnx.runtime import open_model, write

        folder, stops = folder_of(path), set[int]()
        for name in ("generation_config.json", "config.json"):
            if (folder / name).is_file():
                ends = read_json_object(folder / name).get("eos_token_id")
                stops |= {end for end in (ends if isinstance(ends, list) else [ends]) if isinstance(end, int)}
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with closing(open_model(path, n_ctx=_CONTEXT, n_threads=_THREADS, n_batch=_CONTEXT)) as graph:
            prompts = [tokenizer.encode(text).ids[:most] for text in BEGINNINGS]
            texts = [
                tokenizer.decode(write(graph, prompt, NEW_TOKENS, frozenset(stops), lambda tokens: False))
                for prompt in prompts
            ]
    return TextCheck(tuple(texts), judge(texts))


if __name__ == "__main__":
    serve(_answer, lambda reason: TextCheck(problem=reason))
