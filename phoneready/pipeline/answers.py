"""What exported files answer, asked in their own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from cfsp.progress import Progress, no_progress
from exporters.gguf import runtime

__all__ = ["Answers", "answer_all"]


@dataclass(frozen=True)
class Answers:
    """Greedy answers of files.

    Attributes:
        prompts: The questions.
        answers: File name to its answers.
    """

    KIND: ClassVar[str] = "answers"
    SCHEMA_VERSION: ClassVar[int] = 1

    prompts: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]


def answer_all(
    files: Sequence[Path],
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> Answers:
    """Ask every file every question, in the chat template where the model has one.

    Args:
        files: GGUF files of one model.
        tokenizer: The model's transformers tokenizer; it renders the template, the file's own makes the tokens.
        prompts: The questions.
        max_new_tokens: Longest answer.
        n_threads: Threads; torch's number by default.
        progress: Told after each answer.

    Raises:
        InputError: A file that llama.cpp cannot run.
    """
    texts = [_render(tokenizer, prompt) for prompt in prompts]
    found: dict[str, tuple[str, ...]] = {}
    for file in files:
        answers = []
        with runtime.open_model(file, n_threads=n_threads or torch.get_num_threads(), n_ctx=1024) as model:
            for text in texts:
                tokens = model.tokenize(text, add_special=not tokenizer.chat_template)
                answer = model.generate(tokens, min(max_new_tokens, model.n_ctx - len(tokens)))
                answers.append(model.detokenize(answer, special=False).strip())
                progress("asking the files", len(found) * len(texts) + len(answers), len(files) * len(texts))
        found[file.name] = tuple(answers)
    return Answers(tuple(prompts), found)


def _render(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
