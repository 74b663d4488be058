"""A Hugging Face tokenizer as GGUF metadata, and the proof that llama.cpp splits text with it in the same way.

Two kinds exist in the architectures we export: byte-level BPE, as GPT-2 has it, where llama.cpp merges by rank; and
SentencePiece's BPE with byte fallback, where it merges by score, the best first, so that rank r becomes score -r.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import InputError, LimitError
from cfsp.models.gguf_tokenizer import BYTE_LEVEL, SENTENCEPIECE, pre_tokenizer_name
from cfsp.models.token_trees import merge_pairs
from cfsp.scratch import LargeScratch
from cfsp.text.conversations import turn_end
from cfsp.text.tokens import start_token
from exporters.gguf import runtime
from exporters.gguf.tokenizer_strings import check_strings

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Write tokenizer.*: vocabulary, merges or scores, special tokens, chat template.

    Args:
        writer: gguf.GGUFWriter.
        tokenizer: PreTrainedTokenizerFast.
        vocab_size: Rows of the embedding. Ids that the tokenizer does not use become [PADn], unused.

    Raises:
        InputError: More tokens than embeddings, or a kind of tokenizer that GGUF files of this family do not have.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _vocabulary(tokenizer, state, vocab_size)
    byte_fallback, merges = bool(state["model"].get("byte_fallback")), _merges(state)
    writer.add_tokenizer_model(SENTENCEPIECE if byte_fallback else BYTE_LEVEL)
    if byte_fallback:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(merges, tokens, types))
    else:
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_add_space_prefix(byte_fallback and _adds_space(state))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    end = turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)
    starts, ends = _added_around(tokenizer)
    writer.add_add_bos_token(starts)
    writer.add_add_eos_token(ends)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = [{"name": key, "template": value} for key, value in template.items()]
        writer.add_chat_template(template)


def tokenizer_bytes(tokenizer: Any, vocab_size: int) -> int:
    """Bytes that `add_tokenizer` adds to a file, and a constant."""
    import gguf

    with LargeScratch("tokenizer") as scratch:
        path = scratch.path / "tokenizer.gguf"
        writer = gguf.GGUFWriter(path, "")
        add_tokenizer(writer, tokenizer, vocab_size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path.stat().st_size


def check_tokenizer(path: Path, tokenizer: Any, strings: Sequence[str] | None = None) -> int:
    """Hold llama.cpp's token ids of a file against the tokenizer's.

    llama.cpp does not normalize text. Where the tokenizer does (Qwen's, to NFC), the strings are compared in NFC.

    Args:
        path: GGUF file.
        tokenizer: PreTrainedTokenizerFast.
        strings: Texts to compare, with and without the start and end tokens; `check_strings`' unless given.

    Returns:
        Number of strings compared.

    Raises:
        LimitError: They differ; the message has the first string and both lists of ids.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    texts = [*(check_strings() if strings is None else strings), f"{bos}a{eos}b", f"{eos}\n{bos}"]
    if normalizes_to_nfc(tokenizer):
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    with runtime.open_model(path, vocab_only=True) as model:
        for text in texts:
            for special in (False, True):
                ours = tokenizer.encode(text, add_special_tokens=special)
                theirs = model.tokenize(text, add_special=special)
                if ours != theirs:
                    raise LimitError(
                        f"llama.cpp's token ids of {text!r} are {theirs[:24]}, the checkpoint's are {ours[:24]}"
                    )
    return len(texts)


def normalizes_to_nfc(tokenizer: Any) -> bool:
    """Whether the tokenizer composes characters first, which llama.cpp does not do."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return '"NFC"' in json.dumps(state.get("normalizer") or {})


def _vocabulary(tokenizer: Any, state: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Texts and types of all ids."""
    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= vocab_size:
        raise InputError(
            "the tokenizer has more tokens than the model has embeddings",
            field="vocab_size",
            value=vocab_size,
            allowed=f">= {max(by_id) + 1}",
        )
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [_NORMAL if index in by_id else _UNUSED for index in range(vocab_size)]
    if state["model"].get("byte_fallback"):
        types = [
            _BYTE if _BYTE_TOKEN.fullmatch(text) else kind for text, kind in zip(tokens, types, strict=True)
        ]
    for added in state.get("added_tokens") or []:
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    unknown = state["model"].get("unk_token")
    if state["model"].get("byte_fallback") and unknown in tokenizer.get_vocab():
        types[tokenizer.get_vocab()[unknown]] = _UNKNOWN
    return tokens, types


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Best first; raises InputError for what is no BPE."""
    kind = state["model"]["type"]
    if kind != "BPE":
        raise InputError(
            "this kind of tokenizer cannot be exported", field="tokenizer", value=kind, allowed="BPE"
        )
    return merge_pairs(state["model"])


def _scores(merges: Sequence[tuple[str, str]], tokens: Sequence[str], types: Sequence[int]) -> list[float]:
    """Of SentencePiece's pieces; those of one character are never the result of a merge, so theirs decide nothing."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [
        -float(ranks.get(text, len(ranks))) if kind == _NORMAL else 0.0
        for text, kind in zip(tokens, types, strict=True)
    ]


def _adds_space(state: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, by the normalizer or the pre-tokenizer."""
    normalizer = json.dumps(state.get("normalizer") or {})
    pre_tokenizer = state.get("pre_tokenizer") or {}
    return '"Prepend"' in normalizer or pre_tokenizer.get("prepend_scheme") in ("first", "always")


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the start and the end token are added to a text.

    Raises:
        InputError: Other tokens are added, which a GGUF file cannot say.
    """
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    starts = [] if start_token(tokenizer) is None else full[:1]
    ends = full[len(starts) + len(plain) :]
    if full != [*starts, *plain, *ends] or ends not in ([], [tokenizer.eos_token_id]):
        raise InputError(f"the tokenizer adds tokens that a GGUF file cannot describe: {full} around {plain}")
    return bool(starts), bool(ends)
