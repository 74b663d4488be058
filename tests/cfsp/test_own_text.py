"""A model's own texts, of which those that loop are left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfsp.models.source import LoadedModel, ModelSource
from cfsp.text.self_sampling import chat_frame, without_loops
from cfsp.text.tokens import encode

LOOP = "the pears are ripe and " * 12
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
"""Of chats in which no token ends what the user says."""


def author(tiny_model: Any, *, chats: bool) -> LoadedModel:
    model, tokenizer = tiny_model("llama")
    if not chats:
        tokenizer.chat_template = None
    return LoadedModel(model, tokenizer, ModelSource(reference="tiny", kind="folder", name="tiny"))


def written(loaded: LoadedModel, said: list[tuple[str, str]]) -> list[list[int]]:
    """Texts as `sample_windows` has them: a question and an answer, or one text, and the token that ends each."""
    tokenizer, frame = loaded.tokenizer, chat_frame(loaded.tokenizer)
    end = [tokenizer.eos_token_id]
    if frame is None:
        return [[tokenizer.bos_token_id, *encode(tokenizer, a + b), *end] for a, b in said]
    before, between = frame
    return [[*before, *encode(tokenizer, a), *between, *encode(tokenizer, b), *end] for a, b in said]


def windows(texts: list[list[int]], seqlen: int = 8) -> torch.Tensor:
    stream = torch.tensor([token for text in texts for token in text])
    return stream[: len(stream) // seqlen * seqlen].view(-1, seqlen)


@pytest.mark.parametrize(
    ("template", "looping"),
    [
        (None, ("Name a pear.", LOOP)),
        (None, (LOOP, " A pear.")),
        (INST, (LOOP, " It is one that is ripe, as all of them are in August.")),
        ("", ("", LOOP)),
    ],
    ids=["answer", "question", "question that no token ends", "text"],
)
def test_texts_that_loop_are_left_out_whole_and_counted(
    tiny_model: Any, template: str | None, looping: tuple[str, str]
) -> None:
    loaded = author(tiny_model, chats=template != "")
    loaded.tokenizer.chat_template = template or loaded.tokenizer.chat_template
    good = [(f"Name pear {n}.", f" It is the {word} one.") for n, word in enumerate("abcdefg")]
    texts = written(loaded, [*good[:3], looping, *good[3:5], looping, *good[5:]])
    left, *counts = without_loops(windows(texts), loaded)
    assert counts == [9, 2]
    assert torch.equal(left, windows(written(loaded, good))[: len(left)])
    assert len(left) >= len(windows(written(loaded, good))) - 1


@pytest.mark.parametrize("chats", [True, False])
def test_texts_without_loops_stay_as_they_are(tiny_model: Any, chats: bool) -> None:
    loaded = author(tiny_model, chats=chats)
    ids = windows(written(loaded, [("Count.", " 1, 2, 3, 4, 5, 6, 7, 8."), ("Say it.", " ha ha ha")]))
    left, _, n_loops = without_loops(ids, loaded)
    assert n_loops == 0
    assert torch.equal(left, ids)


def test_one_token_may_begin_and_end_texts(tiny_model: Any) -> None:
    loaded = author(tiny_model, chats=False)
    loaded.tokenizer.bos_token = loaded.tokenizer.eos_token
    good = [("A pear.", ""), ("Two pears.", ""), ("Three pears.", "")]
    left, *counts = without_loops(windows(written(loaded, [*good[:1], (LOOP, ""), *good[1:]]), 4), loaded)
    assert counts == [4, 1]
    assert torch.equal(left, windows(written(loaded, good), 4)[: len(left)])
