"""Tokenizers of GGUF files, faithful to llama.cpp.

A GGUF file stores vocabulary and merges, but of the splitting that comes before merging only a name
(`tokenizer.ggml.pre`), which `cfsp.models.pre_tokenizer` knows the meaning of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, processors

from cfsp.errors import InputError, look_up
from cfsp.models.gguf_file import GGUFFile, read_gguf
from cfsp.models.pre_tokenizer import BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE, build_pre_tokenizer
from cfsp.reading import as_input_error

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# llama.cpp takes these for control tokens whatever type the file gives them.
_ALWAYS_CONTROL = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
        "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
    }
)  # fmt: skip
_SPECIAL_KEYS = MappingProxyType(
    {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
        "sep_token": "seperator",
    }
)
_SPM_DEFAULT_IDS = MappingProxyType({"bos": 1, "eos": 2, "unknown": 0})


def tokenizer_from_gguf(source: Path | GGUFFile) -> Any:
    """A PreTrainedTokenizerFast that gives the token ids llama.cpp gives for the same file.

    Args:
        source: The file, or what `read_gguf` made of it.

    Raises:
        InputError: Damaged file, no tokenizer in it, or an unknown tokenizer kind.
    """
    file = source if isinstance(source, GGUFFile) else read_gguf(source)
    kind = file.require("tokenizer.ggml.model")
    build = look_up(_BUILDERS, kind, f"{file.path}: unsupported tokenizer", field="tokenizer.ggml.model")
    tokens = [text or f"[EMPTY_{n}]" for n, text in enumerate(file.require("tokenizer.ggml.tokens"))]
    types = list(file.metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens))
    if len(set(tokens)) != len(tokens) or len(types) < len(tokens):
        raise InputError(f"{file.path}: damaged vocabulary (repeated tokens or missing token types)")
    with as_input_error(f"{file.path}: the tokenizer cannot be built"):
        backend, add_bos = build(file, tokens, types)
        backend.add_tokens(_added_tokens(tokens, types))
    special = _special_tokens(file, tokens, kind)
    _add_post_processor(backend, file, special, add_bos=add_bos)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=file.hyperparameter("context_length"),
        **special,
    )
    tokenizer.chat_template = file.metadata.get("tokenizer.chat_template")
    return tokenizer


def _build_bpe(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """Byte-level BPE, as GPT-2 has it."""
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    row = look_up(PRE_TOKENIZERS, name, f"{file.path}: unknown pre-tokenizer", field="tokenizer.ggml.pre")
    vocabulary = {text: n for n, text in enumerate(tokens)}
    merges = [_split_merge(merge) for merge in file.require("tokenizer.ggml.merges")]
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=row.ignore_merges))
    backend.pre_tokenizer = build_pre_tokenizer(row.steps)
    backend.decoder = decoders.ByteLevel()
    return backend, row.add_bos


def _split_merge(merge: str) -> tuple[str, str]:
    # The first part may itself begin with a space, so the separating one is looked for after it.
    at = merge.index(" ", 1)
    return merge[:at], merge[at + 1 :]


def _build_spm(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """SentencePiece BPE: of all neighbours that form a token, the highest score is merged first."""
    scores = file.require("tokenizer.ggml.scores")
    vocabulary = {text: n for n, text in enumerate(tokens)}
    unknown = tokens[file.metadata.get("tokenizer.ggml.unknown_token_id", _SPM_DEFAULT_IDS["unknown"])]
    merges = _merges_from_scores(vocabulary, scores, types)
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges_from_scores(
    vocabulary: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    merges = []
    for text, index in vocabulary.items():
        if types[index] in (_CONTROL, _BYTE, _UNKNOWN):
            continue
        for cut in range(1, len(text)):
            left, right = vocabulary.get(text[:cut]), vocabulary.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-scores[index], index, left, right, (text[:cut], text[cut:])))
    return [pair for *_, pair in sorted(merges)]


_BUILDERS = MappingProxyType({BYTE_LEVEL: _build_bpe, SENTENCEPIECE: _build_spm})


def _added_tokens(tokens: Sequence[str], types: Sequence[int]) -> list[Any]:
    """Tokens that are found in text before anything else is done to it."""
    return [
        tokenizers.AddedToken(
            text, special=kind != _USER_DEFINED or text in _ALWAYS_CONTROL, normalized=False
        )
        for text, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) or text in _ALWAYS_CONTROL
    ]


def _special_tokens(file: GGUFFile, tokens: Sequence[str], kind: str) -> dict[str, str]:
    by_role = {}
    for role, key in _SPECIAL_KEYS.items():
        default = _SPM_DEFAULT_IDS.get(key) if kind == SENTENCEPIECE else None
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id", default)
        if index is not None and 0 <= index < len(tokens):
            by_role[role] = tokens[index]
    return by_role


def _add_post_processor(backend: Any, file: GGUFFile, special: Mapping[str, str], *, add_bos: bool) -> None:
    """Start and end tokens around a text, where the file (or its kind of tokenizer) asks for them."""
    bos = special.get("bos_token") if file.metadata.get("tokenizer.ggml.add_bos_token", add_bos) else None
    eos = special.get("eos_token") if file.metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if bos is None and eos is None:
        return
    around = [part for part in (bos, "$A", eos) if part]
    backend.post_processor = processors.TemplateProcessing(
        single=around,
        pair=around + [f"{part}:1" for part in (bos, "$B", eos) if part],
        special_tokens=[(text, backend.token_to_id(text)) for text in {bos, eos} if text],
    )
