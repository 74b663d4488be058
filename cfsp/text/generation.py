"""Batched generation with transformers: padding on the left, where to stop, and what is recommended to draw with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cfsp.models.architectures import spec_for
from cfsp.models.source import LoadedModel
from cfsp.settings import declared
from cfsp.text.choosing import Chooser, Sampling


def stop_ids(loaded: LoadedModel) -> set[int]:
    """Tokens that end a text: the generation config's and the tokenizer's."""
    return stop_tokens(loaded.model.generation_config, loaded.tokenizer)


def stop_tokens(generation_config: Any, tokenizer: Any) -> set[int]:
    """The same without a model; the generation config may be None."""
    configured = getattr(generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def stated_sampling(generation_config: Any) -> dict[str, Any]:
    """Fields of `Sampling` that a generation config, or None, states, whether or not it asks for sampling by default.

    One that asks for it and states none has transformers' temperature of 1; else there are none.
    """
    stated = generation_config.to_diff_dict() if generation_config is not None else {}
    fields = (row.name for row in declared(Sampling))
    values = {name: stated[name] for name in fields if stated.get(name) is not None}
    return values or ({"temperature": 1.0} if stated.get("do_sample") else {})


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    choosers: Sequence[Chooser] = (),
    **options: Any,
) -> list[list[int]]:
    """What the model writes after each prompt, the token that ends it included.

    Args:
        loaded: The model with its tokenizer.
        prompts: Token ids; shorter ones are padded on the left, so that all end at the right.
        max_new_tokens: Most tokens of a continuation.
        choosers: One for each prompt, of its tokens, where options ask for no sampling; or none.
        options: Further ones of transformers' `generate`.
    """
    if len(set(map(len, prompts))) > 1 and spec_for(loaded.model.config).sees_neighbours:
        # Tokens would see the padding before them in some releases of transformers.
        return [
            generate(loaded, [prompt], max_new_tokens, choosers=choosers[index : index + 1], **options)[0]
            for index, prompt in enumerate(prompts)
        ]
    pad = loaded.tokenizer.pad_token_id or 0  # any token will do: padding is masked
    longest, stops = max(map(len, prompts)), stop_ids(loaded)
    device = loaded.model.device
    if choosers:
        options["logits_processor"] = [_chosen_alone(choosers, prompts)]
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


def _chosen_alone(choosers: Sequence[Chooser], prompts: Sequence[Sequence[int]]) -> Any:
    """A logits processor of transformers that leaves each row the token that its prompt's chooser takes."""
    from transformers import LogitsProcessor

    longest = max(map(len, prompts))

    class ChosenAlone(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            written, logits = input_ids[:, longest:].tolist(), scores.float().cpu().numpy()
            rows = zip(choosers, prompts, written, logits, strict=True)
            tokens = [choose(prompt, so_far, row) for choose, prompt, so_far, row in rows]
            chosen = torch.tensor(tokens, device=scores.device)[:, None]
            return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)

    return ChosenAlone()
