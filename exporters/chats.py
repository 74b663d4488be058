"""Whether a runtime reads chats as the checkpoint's tokenizer does, and stops where an answer ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cfsp.reading import one_line
from cfsp.text.conversations import CONVERSATIONS, Conversation, rendered, turn_end
from cfsp.text.tokens import encode

_SHOWN = 6


@dataclass(frozen=True)
class ReadChats:
    """What a runtime made of the conversations that the model's template takes.

    Attributes:
        equal: Names of those that are the checkpoint's, token by token.
        warnings: What differs.
    """

    equal: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def read_chats(
    runtime: str,
    tokenizer: Any,
    stops: Collection[int],
    read: Callable[[Conversation, str], Sequence[int]],
    ends: Callable[[int], bool],
) -> ReadChats:
    """Hold a runtime's token ids of conversations, and the tokens at which it stops, against the checkpoint's.

    Args:
        runtime: Name for the warnings.
        tokenizer: The checkpoint's.
        stops: Tokens at which the checkpoint's texts end.
        read: The runtime's ids of a conversation, whose text transformers renders like this.
        ends: Whether the runtime stops at a token.
    """
    equal, warnings = [], []
    texts = rendered(tokenizer)
    for conversation in CONVERSATIONS:
        if (text := texts.get(conversation.name)) is None:
            continue
        difference = _difference(tokenizer, text, partial(read, conversation, text))
        if difference is None:
            equal.append(conversation.name)
        else:
            warnings.append(f"{runtime} reads a chat with {conversation.name} otherwise: {difference}")
    return ReadChats(tuple(equal), (*warnings, *_ends(runtime, tokenizer, stops, ends)))


def _difference(tokenizer: Any, text: str, read: Callable[[], Sequence[int]]) -> str | None:
    try:
        ours, theirs = encode(tokenizer, text), list(read())
    except Exception as error:  # each runtime has its own errors for a template that it cannot run
        return one_line(error, 160)
    if theirs == ours:
        return None
    place = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), None)
    place = min(len(ours), len(theirs)) if place is None else place
    parts = [[_name(tokenizer, token) for token in ids[place : place + _SHOWN]] for ids in (ours, theirs)]
    return f"from token {place} on the checkpoint has {parts[0]}, and it {parts[1]}"


def _ends(runtime: str, tokenizer: Any, stops: Collection[int], ends: Callable[[int], bool]) -> Iterator[str]:
    missed = sorted(token for token in stops if not ends(token))
    if missed:
        names = ", ".join(_name(tokenizer, token) for token in missed)
        yield f"{runtime} does not stop at {names}, where the checkpoint's texts end"
    end = turn_end(tokenizer)
    if end is not None and end not in stops:
        also = "" if ends(end) else f", nor does {runtime}"
        yield f"the chat template ends an answer with {_name(tokenizer, end)}, at which generation does not stop{also}"


def _name(tokenizer: Any, token: int) -> str:
    """A token's text, or its number where the vocabulary has no such token, as of a runtime that cannot split."""
    try:
        name = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, OverflowError):
        name = None
    return name or f"token {token}"
