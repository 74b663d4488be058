"""Tokenizers of both kinds, written to a file and read back by llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from cfsp.errors import InputError, LimitError
from exporters.gguf import runtime
from exporters.gguf.tokenizer_metadata import check_tokenizer

VocabularyFile = Callable[[Path, Any], Path]
TEXT = [
    "The quick brown fox jumps over the lazy dog, then it sleeps for 12345 hours.",
    "It's what they'll say: we've counted 1, 22 and 333 of them.",
    "def add(a, b):\n    return a + b  # the sum\n",
    "Der Fu\u00df, \u00fcber caf\u00e9 und na\u00efve \u4f60\u597d \u4e16\u754c.",
] * 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(*, add_bos: bool = True, nfc: bool = False) -> Any:
    """As Llama 3 has it, trained on a few sentences."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )


def sentencepiece(*, prefix: bool) -> Any:
    """As Llama 2 has it: byte fallback, spaces as U+2581."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    import json

    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m)
        for m in json.loads(trained.to_str())["model"]["merges"]
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {name: index for index, name in enumerate(names)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix else space
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize(("add_bos", "nfc"), [(True, False), (False, True)])
def test_byte_level(vocabulary_file: VocabularyFile, tmp_path: Path, add_bos: bool, nfc: bool) -> None:
    tokenizer = byte_level(add_bos=add_bos, nfc=nfc)
    path = vocabulary_file(tmp_path / "v.gguf", tokenizer)
    assert check_tokenizer(path, tokenizer) > 60
    with runtime.open_vocabulary(path) as opened:
        assert (opened.tokenize("x", add_special=True)[0] == opened.bos_token) is add_bos
        assert opened.bos_token == tokenizer.bos_token_id
        assert opened.is_end_of_generation(tokenizer.eos_token_id)
        text = "It's 12345 caf\u00e9s \U0001f600\n"
        assert opened.detokenize(opened.tokenize(text)) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(vocabulary_file: VocabularyFile, tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece(prefix=prefix)
    path = vocabulary_file(tmp_path / "v.gguf", tokenizer)
    assert check_tokenizer(path, tokenizer) > 60
    assert check_tokenizer(path, tokenizer, TEXT) > 4


def test_another_vocabulary_is_noticed(vocabulary_file: VocabularyFile, tmp_path: Path) -> None:
    path = vocabulary_file(tmp_path / "v.gguf", byte_level())
    with pytest.raises(LimitError, match="token ids"):
        check_tokenizer(path, byte_level(add_bos=False))


def test_other_kinds_are_refused(vocabulary_file: VocabularyFile, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(InputError, match=r"WordLevel.*BPE"):
        vocabulary_file(tmp_path / "v.gguf", tokenizer)
