"""A look at what a model says: greedy answers to a fixed set of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from cfsp.evaluation.language_model import LanguageModel, prompt_ids
from cfsp.progress import Progress, no_progress

_AT_ONCE = 16

PROMPTS = (
    "List three fruits.",
    "What is 2+2?",
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short greeting to a colleague.",
    "Name two animals that can fly.",
)
"""Short tasks that a small chat model can do before pruning."""

CHECK_PROMPTS = (
    *PROMPTS,
    "Tell a very short story about a lighthouse.",
    "How do I boil an egg?",
    "Write a Python function that returns the larger of two numbers.",
    "Give me two tips for sleeping better.",
    "What does a librarian do?",
    "Translate 'good morning' into Spanish.",
    "Write an email that asks for a day off.",
    "Why do leaves fall in autumn?",
    "Compare a bicycle with a car.",
    "Describe the sea to someone who has never seen it.",
)
"""Varied short prompts for the check on degenerate text."""


def answer(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    progress: Progress = no_progress,
) -> list[str]:
    """Greedy answers, one a prompt; in the model's chat template where it has one."""
    ids = [prompt_ids(model.tokenizer, prompt) for prompt in prompts]
    answers: list[str] = []
    for start in range(0, len(ids), _AT_ONCE):
        for tokens in model.generate(ids[start : start + _AT_ONCE], max_new_tokens):
            answers.append(model.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        progress("sampling answers", len(answers), len(ids))
    return answers
