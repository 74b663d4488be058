"""A look at what a model says: greedy answers to a fixed set of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cfsp.progress import Progress, no_progress

__all__ = ["PROMPTS", "sample_answers"]

PROMPTS = (
    "List three fruits.",
    "What is 2+2?",
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short greeting to a colleague.",
    "Name two animals that can fly.",
)
"""Short tasks that a small chat model can do before pruning."""


def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 64,
    progress: Progress = no_progress,
) -> list[str]:
    """Greedy answers, one a prompt; in the model's chat template where it has one."""
    answers = []
    for done, prompt in enumerate(prompts, 1):
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
        answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
        progress("sampling answers", done, len(prompts))
    return answers
