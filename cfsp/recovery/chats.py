"""Chats as tokens, with labels on what the assistant says.

The text is what the model's own template makes of the chat. Where each answer stands in it is found by rendering
the messages before it with the generation prompt, which is exactly what the model sees when it has to answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cfsp.errors import InputError
from cfsp.text.encoding import encode_in_place
from cfsp.text.templates import render_chat
from cfsp.text.tokens import Document

_SENTINEL = "\N{SNOWMAN}answer\N{SNOWMAN}"


@dataclass(frozen=True)
class LabelledTokens:
    """Token ids, and for each whether it is to be learnt."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]


def labelled_chat(document: Document, tokenizer: Any) -> LabelledTokens:
    """Tokens of a chat; learnt are those of the answers, the token that ends the turn included.

    Raises:
        InputError: As `answer_spans`.
    """
    text, spans = answer_spans(document.messages or (), tokenizer)
    tokens = encode_in_place(tokenizer, text)
    learnt = tuple(
        any(start <= first < end and last > first for start, end in spans) for _, first, last in tokens
    )
    return LabelledTokens(tuple(token for token, *_ in tokens), learnt)


def answer_spans(
    messages: Sequence[Mapping[str, str]], tokenizer: Any
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A chat's text and the (start, end) of every non-empty answer in it, end-of-turn token included.

    Raises:
        InputError: No chat template, or one that refuses the chat or cannot be split at an answer.
    """
    text = render_chat(tokenizer, messages)
    end_of_turn = _end_of_turn(tokenizer)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        answer = message["content"].strip()
        if message["role"] != "assistant" or not answer:
            continue
        before = render_chat(tokenizer, messages[:index], add_generation_prompt=True) if index else ""
        start = len(before)
        answer_start = text.find(answer, start) if text.startswith(before) else -1
        if answer_start < 0:
            raise InputError(
                "the model's chat template cannot be split at an answer: "
                "it renders a chat's beginning differently when more follows, or changes the answer",
                field="messages",
                value=answer[:60],
            )
        end = answer_start + len(answer)
        if text[end:].lstrip().startswith(end_of_turn):
            end = text.index(end_of_turn, end) + len(end_of_turn)
        spans.append((start, end))
    return text, tuple(spans)


def _end_of_turn(tokenizer: Any) -> str:
    """What the template writes after an answer, such as `<|im_end|>`; empty where it writes only space."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
    return render_chat(tokenizer, messages).rpartition(_SENTINEL)[2].strip()
