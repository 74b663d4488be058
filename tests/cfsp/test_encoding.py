"""Long texts are tokenized piece by piece and give the tokens of the whole; chat templates come to an end."""

from __future__ import annotations

import random
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers

from cfsp.errors import InputError
from cfsp.text import tokens
from cfsp.text.tokens import encode, encode_long, render_chat


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 2000 characters, so that a short text has many."""
    monkeypatch.setattr(tokens, "WHOLE", 2000)
    monkeypatch.setattr(tokens, "_PIECE", 2000)
    monkeypatch.setattr(tokens, "_OVERLAP", 400)


def _text(seed: int) -> str:
    rnd = random.Random(seed)
    words = ["fox", "telephone", "é", "12", "\n", "\n\n", "   ", "👩‍👩‍👧", "<|im_end|>", "list:", "Ünï", "\t"]
    return " ".join(rnd.choice(words) for _ in range(4000))


def _sentencepiece() -> Any:
    """BPE over whole texts in which spaces are letters, as Llama 2 has it."""
    letters = sorted({*_text(0).replace(" ", "▁"), "▁"})
    vocabulary = {text: n for n, text in enumerate(["<unk>", *letters, "▁f", "▁fo", "▁fox"])}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("▁", "f"), ("▁f", "o"), ("▁fo", "x")], unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_pieces_give_the_tokens_of_the_whole(kind: str, tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer if kind == "byte-level" else _sentencepiece()
    for seed in range(4):
        text = _text(seed)
        assert len(text) > 5 * tokens.WHOLE
        assert list(encode_long(tokenizer, text)) == encode(tokenizer, text)
    whole = encode(tokenizer, text)
    for limit in (1, 37, 100, 1000, 10**6):
        some = list(encode_long(tokenizer, text, limit=limit))
        assert some[:limit] == whole[:limit]
        if limit <= 100:
            assert limit <= len(some) < len(whole) / 2, "no more pieces are tokenized than are needed"


@pytest.mark.usefixtures("small_pieces")
def test_a_text_of_one_endless_word_is_tokenized_too(tiny_tokenizer: Any) -> None:
    for text in ("a" * 9001, "na" * 5000, "👩" * 5000):
        ids = list(encode_long(tiny_tokenizer, text))
        assert tiny_tokenizer.decode(ids).replace("�", "")[:100] == text[:100]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    ],
)
def test_a_template_that_does_not_end_is_refused(
    template: str, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_MOST_SECONDS", 0.3)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    with pytest.raises(InputError, match="chat template refuses"):
        render_chat(tiny_tokenizer, [{"role": "user", "content": "hi"}])
