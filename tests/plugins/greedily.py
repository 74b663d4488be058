"""What llama.cpp's likeliest tokens are, whatever ends a text."""

from __future__ import annotations

from collections.abc import Sequence

from exporters.gguf.runtime import LlamaModel


def continued(model: LlamaModel, prompt: Sequence[int], count: int) -> list[int]:
    model.clear()
    model.decode(prompt)
    tokens = [int(model.last_logits().argmax())]
    while len(tokens) < count:
        model.decode(tokens[-1:])
        tokens.append(int(model.last_logits().argmax()))
    return tokens
