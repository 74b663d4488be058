"""What exported models answer, asked in their own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cfsp.evaluation.answers import answer
from cfsp.progress import Progress, no_progress
from exporters.gguf import runtime
from phoneready.release.artifact import Artifact

_CONTEXT = 1024


@dataclass(frozen=True)
class Answers:
    """Greedy answers of exports.

    Attributes:
        prompts: The questions.
        answers: Name of an export to its answers.
    """

    KIND: ClassVar[str] = "answers"
    SCHEMA_VERSION: ClassVar[int] = 1

    prompts: tuple[str, ...]
    answers: dict[str, tuple[str, ...]]


def answer_all(
    artifacts: Sequence[Artifact],
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    n_threads: int | None = None,
    progress: Progress = no_progress,
) -> Answers:
    """Ask every export every question, in its own runtime, in the chat template where the model has one.

    Args:
        artifacts: Exports of one model.
        tokenizer: The model's transformers tokenizer; it renders the template, a GGUF file's own makes the tokens.
        prompts: The questions.
        max_new_tokens: Longest answer.
        n_threads: Threads; torch's number by default.
        progress: Told after each export.

    Raises:
        InputError: An export that its runtime cannot run.
    """
    threads = n_threads or torch.get_num_threads()
    texts = [_render(tokenizer, prompt) for prompt in prompts]
    found: dict[str, tuple[str, ...]] = {}
    for artifact in artifacts:
        if artifact.root.is_dir():
            answers = _ask_onnx(artifact, prompts, max_new_tokens, threads)
        else:
            add_special = not tokenizer.chat_template
            answers = _ask_gguf(artifact, texts, max_new_tokens, threads, add_special=add_special)
        found[artifact.name] = tuple(answers)
        progress("asking the files", len(found), len(artifacts))
    return Answers(tuple(prompts), found)


def _ask_gguf(
    artifact: Artifact, texts: Sequence[str], max_new_tokens: int, n_threads: int, *, add_special: bool
) -> list[str]:
    answers = []
    with runtime.open_model(artifact.path, n_threads=n_threads, n_ctx=_CONTEXT) as model:
        for text in texts:
            tokens = model.tokenize(text, add_special=add_special)
            said = model.generate(tokens, min(max_new_tokens, model.n_ctx - len(tokens)))
            answers.append(model.detokenize(said, special=False).strip())
    return answers


def _ask_onnx(artifact: Artifact, prompts: Sequence[str], max_new_tokens: int, n_threads: int) -> list[str]:
    from exporters.onnx.language_model import OnnxLanguageModel

    model = OnnxLanguageModel(str(artifact.root), n_ctx=_CONTEXT, n_threads=n_threads)
    try:
        return answer(model, prompts, max_new_tokens=max_new_tokens)
    finally:
        model.close()


def _render(tokenizer: Any, prompt: str) -> str:
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
