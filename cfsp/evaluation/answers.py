"""A look at what a model says: answers to a fixed set of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from cfsp.evaluation.language_model import LanguageModel, prompt_ids
from cfsp.progress import Progress, no_progress
from cfsp.text.choosing import Sampling, choosers

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
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> list[str]:
    """Answers, one a prompt; in the model's chat template where it has one.

    Args:
        model: The model.
        prompts: What it is asked.
        max_new_tokens: Most tokens of an answer.
        sampling: How tokens are drawn; None for greedy answers.
        seed: Of what is drawn.
        progress: Told how many are answered.
    """
    chosen_by = choosers(sampling, seed, len(prompts))
    ids = [prompt_ids(model.tokenizer, prompt) for prompt in prompts]
    answers: list[str] = []
    for start in range(0, len(ids), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        for tokens in model.generate(ids[some], max_new_tokens, choosers=chosen_by[some]):
            answers.append(model.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        progress("sampling answers", len(answers), len(ids))
    return answers
