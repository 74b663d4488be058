"""Conversations on which a chat template is tried: turns, tools and their results, text that templates trip over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from cfsp.errors import InputError
from cfsp.text.tokens import encode, render_chat

_WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city, today.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Its name."},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}
_ANSWER = "Sehr gerne: 42 \U0001f600"
_ASKED = {"role": "user", "content": "How warm is it in Z\u00fcrich?"}
_CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "abcdefghi",
            "function": {"name": "get_weather", "arguments": {"city": "Z\u00fcrich", "unit": "celsius"}},
        }
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"degrees": 21.5}'}


class Conversation(NamedTuple):
    """Messages as chat templates take them, and functions that may be called, as JSON schemas.

    With `to_be_answered` the text ends where the model has to answer.
    """

    name: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    to_be_answered: bool = True


def _said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """What a user and the model say in turns."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


CONVERSATIONS = (
    Conversation("a question", _said("List three fruits.")),
    Conversation("a system prompt", _said("What is 2+2?", system="You answer in one word.")),
    Conversation(
        "several turns", _said("Hello!", "Hello, how can I help?", "Name a colour.", "Blue.", "Another?")
    ),
    Conversation("an answer", _said("Hello!", "Hello, how can I help?"), to_be_answered=False),
    Conversation("white space", _said("  two spaces before,\n\n\ttwo lines and a tab within, one behind ")),
    Conversation(
        "other scripts",
        _said(
            "\u4f60\u597d, \u043c\u0438\u0440, e\u0301t\u00e9 \U0001f468\u200d\U0001f469\u200d\U0001f467?",
            _ANSWER,
            "<b>&amp;</b> {{ x }} {% y %}",
        ),
    ),
    Conversation("tools", [_ASKED], [_WEATHER]),
    Conversation(
        "tools and a system prompt", [{"role": "system", "content": "Be brief."}, _ASKED], [_WEATHER]
    ),
    Conversation("a tool's result", [_ASKED, _CALLED, _RESULT], [_WEATHER]),
)


def rendered(
    tokenizer: Any, conversations: Sequence[Conversation] = CONVERSATIONS, *, template: str | None = None
) -> dict[str, str]:
    """Name -> text of the conversations that a template, else the model's own, takes; empty without a template."""
    texts = {}
    for conversation in conversations if tokenizer.chat_template else ():
        options: dict[str, Any] = {"chat_template": template} if template else {}
        if conversation.tools:
            options["tools"] = list(conversation.tools)
        try:
            texts[conversation.name] = render_chat(
                tokenizer,
                conversation.messages,
                add_generation_prompt=conversation.to_be_answered,
                **options,
            )
        except InputError:  # many templates refuse system prompts, or know no tools
            continue
    return texts


def turn_end(tokenizer: Any) -> int | None:
    """The special token with which a template ends an answer; None if it has none."""
    text = rendered(tokenizer, [Conversation("", _said("a", _ANSWER), to_be_answered=False)]).get("", "")
    _, shown, behind = text.rpartition(_ANSWER)
    others = (tokenizer.unk_token_id, tokenizer.bos_token_id)
    special = {
        token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special and (token == tokenizer.eos_token_id or token not in others)
    }
    with suppress(InputError):  # no token for what stands there
        return next((token for token in encode(tokenizer, behind if shown else "") if token in special), None)
    return None
