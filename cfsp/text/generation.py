"""What every batched generation with transformers needs: padding on the left, and where to stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cfsp.models.source import LoadedModel


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end a text: the generation config's and the tokenizer's."""
    return stop_tokens(loaded.model.generation_config, loaded.tokenizer)


def stop_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """The same without a model; the generation config may be None."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def pad_id(loaded: LoadedModel) -> int:
    """The tokenizer's padding token, or any: padding is masked."""
    pad = loaded.tokenizer.pad_token_id
    return 0 if pad is None else int(pad)


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, attention mask), each (n_prompts, longest) int64; all prompts end at the right."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
