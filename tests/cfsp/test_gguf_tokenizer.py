"""Tokenizers from GGUF files give llama.cpp's own ids, and pre-tokenizers are known by name."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from cfsp.errors import InputError
from cfsp.models.gguf_file import read_gguf
from cfsp.models.gguf_tokenizer import (
    PRE_TOKENIZERS,
    build_pre_tokenizer,
    pre_tokenizer_name,
    tokenizer_from_gguf,
)

VOCABULARIES = (
    pytest.param("command-r", marks=pytest.mark.everything),
    "deepseek-coder",
    "falcon",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "qwen2",
    pytest.param("qwen35", marks=pytest.mark.everything),
    "refact",
    "starcoder",
)

# Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, Georgian, Hangul, Hiragana, Han, mathematical, emoji.
SCRIPTS = (
    *((0x41, 0x24F), (0x391, 0x3C9), (0x410, 0x44F), (0x5D0, 0x5EA), (0x620, 0x64A), (0x904, 0x94D)),
    *((0xE01, 0xE3A), (0x10D0, 0x10FA), (0xAC00, 0xD7A3), (0x3041, 0x3096), (0x4E00, 0x9FA5)),
    *((0x1D400, 0x1D454), (0x1F600, 0x1F64F)),
)
HANDMADE = [
    "",
    " ",
    "   leading and trailing   ",
    "tabs\t\tand\nnewlines\n\n\r\n end",
    "I'll don't we've he's I'm they're you'd 'tis",
    "I'LL DON'T WE'VE HE'S I'M THEY'RE YOU'D 'TIS",
    "e\u0301 a\u0308\u0327 n\u0303o\u0302 \u0915\u094d\u0937\u0947 \u0e2a\u0e33",
    "family \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 hand \U0001f44b\U0001f3fd",
    "flags \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1eb\U0001f1f7",
    "digits 0 12 345 6789 1234567890 3.14159 1e-10 0x1F \u0663\u0664\u0665 \u0967\u0968 \u00bd \u2167 \u00b2",
    "nul\x00 bell\x07 escape\x1b[0m delete\x7f unit\x1f",
    "spaces \u00a0\u2003\u3000\u200b\u2028\u2029\ufeff end",
    "def f(x):\n    if x != 0:\n        return {'a': [1, 2]}  # done\n",
    '<div class="x">&amp;</div> SELECT * FROM t WHERE a>=3; a->b::c /* ** */ $HOME/${x} `ls -la`',
    "https://example.org/a_b?c=d&e=%20#f user@example.com C:\\temp\\new",
    "\ue000 private \U0010fffd \ufffd",
    "\u00a1Hola! \u00bfQu\u00e9 tal? na\u00efve co\u00f6perate \u00dfa\u00dfe \u0131\u0130",
    "mixed\u4e2d\u6587english\u65e5\u672c\u8a9e123\ud55c\uae00",
]


def varied_texts(special: Sequence[str], count: int = 400) -> list[str]:
    """At least `count` strings: scripts, digits, code, white space, and special tokens amid text; always the same."""
    chance = random.Random(7)
    texts = list(HANDMADE)
    texts += [f"{token}user\nHi {token}{token} there{token}" for token in special]
    fillers = [*(" ", "  ", "\n", "\n\n", "\t", " \n ", ".", ", ", "'s "), *"-_(0\u0301\u200d", ");\n", "42"]
    while len(texts) < count:
        scripts = chance.sample(SCRIPTS, 2)
        pieces = []
        for _ in range(chance.randint(2, 9)):
            low, high = chance.choice(scripts)
            pieces.append("".join(chr(chance.randint(low, high)) for _ in range(chance.randint(1, 6))))
            pieces.append(chance.choice(fillers) * chance.choice((1, 1, 1, 2, 17)))
        if special and chance.random() < 0.2:
            pieces.insert(chance.randrange(len(pieces)), chance.choice(special))
        texts.append("".join(pieces))
    return texts


def llama_cpp_ids(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """What llama.cpp makes of texts, special tokens recognized, none added."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs the gguf extra")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def hf_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_built_in_model_tokenizes_as_llama_cpp(smollm2_gguf: Path) -> None:
    tokenizer = tokenizer_from_gguf(smollm2_gguf)
    texts = varied_texts([*tokenizer.all_special_tokens, "<repo_name>", "<file_sep>"])
    ids = hf_ids(tokenizer, texts)
    assert ids == llama_cpp_ids(smollm2_gguf, texts)
    assert [tokenizer.decode(one) for one in ids] == texts


@pytest.mark.parametrize("name", VOCABULARIES)
def test_other_vocabularies_tokenize_as_llama_cpp(name: str, llama_cpp_vocabularies: Path) -> None:
    path = llama_cpp_vocabularies / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_from_gguf(path)
    published = (
        path.with_name(f"{path.name}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    )
    lines = path.with_name(f"{path.name}.out").read_text(encoding="utf-8").splitlines()
    expected = [[int(number) for number in line.split()] for line in lines]
    # The files that both lists were made with close the last text with the separator.
    assert hf_ids(tokenizer, published)[: len(expected)] == expected[: len(published)]
    texts = varied_texts(sorted(set(tokenizer.all_special_tokens)))
    assert hf_ids(tokenizer, texts) == llama_cpp_ids(path, texts)


def with_splitting(tokenizer: Any, **parts: Any) -> Any:
    """The same tokenizer with other parts."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.model.ignore_merges = parts.pop("ignore_merges", False)
    for name, part in parts.items():
        setattr(backend, name, part)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def test_every_row_is_found_again_by_its_structure(tiny_tokenizer: Any) -> None:
    for row in PRE_TOKENIZERS.values():
        splitting = build_pre_tokenizer(row.steps)
        made = with_splitting(tiny_tokenizer, pre_tokenizer=splitting, ignore_merges=row.ignore_merges)
        found = PRE_TOKENIZERS[pre_tokenizer_name(made)]
        assert (found.steps, found.ignore_merges) == (row.steps, row.ignore_merges)
    # A normalizer that composes does not hide the name.
    composing = with_splitting(tiny_tokenizer, normalizer=tokenizers.normalizers.NFC())
    assert pre_tokenizer_name(composing) == "smollm"


def test_unknown_structure_names_the_known(tiny_tokenizer: Any) -> None:
    cut = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    for unknown in (
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence(cut),
    ):
        with pytest.raises(InputError, match="smollm"):
            pre_tokenizer_name(with_splitting(tiny_tokenizer, pre_tokenizer=unknown))


def test_unusable_tokenizer_metadata(tiny_gguf: Any) -> None:
    file = read_gguf(tiny_gguf())
    for key, value, message in (
        ("tokenizer.ggml.model", "bert", "unsupported tokenizer.*gpt2, llama"),
        ("tokenizer.ggml.pre", "never-heard-of", "unknown pre-tokenizer.*smollm"),
        ("tokenizer.ggml.tokens", None, "lacks the GGUF metadata key tokenizer.ggml.tokens"),
        ("tokenizer.ggml.tokens", ["a", "a"], "damaged vocabulary"),
        ("tokenizer.ggml.merges", ["q zzz"], "cannot be built"),
    ):
        metadata = {k: v for k, v in file.metadata.items() if k != key} | (
            {} if value is None else {key: value}
        )
        with pytest.raises(InputError, match=message):
            tokenizer_from_gguf(replace(file, metadata=metadata))
