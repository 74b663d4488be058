"""Batched generation with transformers: padding on the left, and where to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cfsp.models.architectures import spec_for
from cfsp.models.source import LoadedModel


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end a text: the generation config's and the tokenizer's."""
    return stop_tokens(loaded.model.generation_config, loaded.tokenizer)


def stop_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """The same without a model; the generation config may be None."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def generate(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """What the model writes after each prompt, the token that ends it included.

    Args:
        loaded: The model with its tokenizer.
        prompts: Token ids; shorter ones are padded on the left, so that all end at the right.
        max_new_tokens: Most tokens of a continuation.
        options: Further ones of transformers' `generate`.
    """
    if len(set(map(len, prompts))) > 1 and spec_for(loaded.model.config).sees_neighbours:
        # Tokens would see the padding before them in some releases of transformers.
        return [generate(loaded, [prompt], max_new_tokens, **options)[0] for prompt in prompts]
    pad = loaded.tokenizer.pad_token_id or 0  # any token will do: padding is masked
    longest, stops = max(map(len, prompts)), stop_ids(loaded)
    device = loaded.model.device
    output = loaded.model.generate(
        input_ids=torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device),
        attention_mask=torch.tensor(
            [[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device
        ),
        max_new_tokens=max_new_tokens,
        repetition_penalty=1.0,
        pad_token_id=pad,
        eos_token_id=sorted(stops) or None,
        **options,
    )
    written = []
    for row in output[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        written.append(row[:end])
    return written
