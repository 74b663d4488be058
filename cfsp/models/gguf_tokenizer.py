"""Tokenizers of GGUF files, faithful to llama.cpp.

A GGUF file names the splitting before merges (`tokenizer.ggml.pre`). PRE_TOKENIZERS has what each name means, and is
read in both directions: to build a tokenizer from a file, and to find the name for a Hugging Face tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from cfsp.errors import InputError, look_up
from cfsp.models.gguf_file import GGUFFile, read_gguf
from cfsp.reading import as_input_error

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # what GGUF files call the two kinds of tokenizer
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS_AND_SPACE}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NOT_LOWER, _NOT_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _SYMBOLS_AND_LINES = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (
    rf"{_BEFORE}{_NOT_LOWER}*{_NOT_UPPER}+{_CONTRACTIONS}?|{_BEFORE}{_NOT_LOWER}+{_NOT_UPPER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SYMBOLS_AND_LINES}"
)
_TEKKEN = (
    rf"{_BEFORE}{_NOT_LOWER}*{_NOT_UPPER}+|{_BEFORE}{_NOT_LOWER}+{_NOT_UPPER}*|\p{{N}}|{_SYMBOLS_AND_LINES}"
)
_MARKED_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_HUNYUAN = rf"{_MARKED_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (behavior, invert) of splits that throw nothing away.
_KEEPING = (("Isolated", False), ("Removed", True))
_CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_CHINESE_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"


class PreTokenizer(NamedTuple):
    """How text is split before byte-pair merging."""

    steps: tuple[
        str, ...
    ]  # regular expressions: each cuts the pieces of the one before into matches and the rest
    ignore_merges: bool = False  # a piece that is a token as a whole is taken without merging
    add_bos: bool = False  # whether the start token is added if the file does not say


# The first of several names is the one given to a Hugging Face tokenizer.
_ROWS = {
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4": PreTokenizer((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": PreTokenizer((_DIGIT, _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 pixtral midm-2.0 lfm2": PreTokenizer(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "smaug-bpe dbrx": PreTokenizer((_LLAMA3,)),
    "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan solar-open": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,)),
    "gpt-4o llama4": PreTokenizer((_GPT4O,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, _DIGIT)),
    "hunyuan-dense": PreTokenizer((r"\p{N}{1,3}", _CHINESE_AND_KANA, _HUNYUAN)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {name: row for names, row in _ROWS.items() for name in names.split()}
)

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# llama.cpp takes these for control tokens whatever type the file gives them.
_ALWAYS_CONTROL = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
        "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
    }
)  # fmt: skip
_SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
_SPM_DEFAULT_IDS = {"bos": 1, "eos": 2, "unknown": 0}


def tokenizer_from_gguf(source: Path | GGUFFile) -> Any:
    """A PreTrainedTokenizerFast that gives the token ids llama.cpp gives for the same file; raises InputError."""
    file = source if isinstance(source, GGUFFile) else read_gguf(source)
    stated, kind = file.metadata.get, file.require("tokenizer.ggml.model")
    build = look_up(_BUILDERS, kind, f"{file.path}: unsupported tokenizer", field="tokenizer.ggml.model")
    tokens = [text or f"[EMPTY_{n}]" for n, text in enumerate(file.require("tokenizer.ggml.tokens"))]
    types = list(stated("tokenizer.ggml.token_type") or [1] * len(tokens))
    if len(set(tokens)) != len(tokens) or len(types) < len(tokens):
        raise InputError(f"{file.path}: damaged vocabulary (repeated tokens or missing token types)")
    # Tokens that are found in text before anything else is done to it.
    added = [
        tokenizers.AddedToken(
            text, special=what != _USER_DEFINED or text in _ALWAYS_CONTROL, normalized=False
        )
        for text, what in zip(tokens, types, strict=False)
        if what in (_CONTROL, _UNKNOWN, _USER_DEFINED) or text in _ALWAYS_CONTROL
    ]
    with as_input_error(f"{file.path}: the tokenizer cannot be built"):
        backend, add_bos = build(file, tokens, types)
        backend.add_tokens(added)
    special = {}
    for role, key in _SPECIAL_KEYS.items():
        default = _SPM_DEFAULT_IDS.get(key) if kind == SENTENCEPIECE else None
        index = stated(f"tokenizer.ggml.{key}_token_id", default)
        if index is not None and 0 <= index < len(tokens):
            special[f"{role}_token"] = tokens[index]
    bos = special.get("bos_token") if stated("tokenizer.ggml.add_bos_token", add_bos) else None
    eos = special.get("eos_token") if stated("tokenizer.ggml.add_eos_token", False) else None
    if bos or eos:
        around = [part for part in (bos, "$A", eos) if part]
        backend.post_processor = processors.TemplateProcessing(
            single=around,
            pair=around + [f"{part}:1" for part in (bos, "$B", eos) if part],
            special_tokens=[(text, backend.token_to_id(text)) for text in {bos, eos} if text],
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=file.hyperparameter("context_length"),
        **special,
    )
    tokenizer.chat_template = stated("tokenizer.chat_template")
    return tokenizer


def _build_bpe(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """Byte-level BPE, as GPT-2 has it; and whether a start token is added if the file does not say."""
    name = file.metadata.get("tokenizer.ggml.pre", "default")
    row = look_up(PRE_TOKENIZERS, name, f"{file.path}: unknown pre-tokenizer", field="tokenizer.ggml.pre")
    vocabulary = {text: n for n, text in enumerate(tokens)}
    merges = []
    for merge in file.require("tokenizer.ggml.merges"):
        # The first part may itself begin with a space, so the separating one is looked for after it.
        at = merge.index(" ", 1)
        merges.append((merge[:at], merge[at + 1 :]))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=row.ignore_merges))
    backend.pre_tokenizer = build_pre_tokenizer(row.steps)
    backend.decoder = decoders.ByteLevel()
    return backend, row.add_bos


def _build_spm(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> tuple[Any, bool]:
    """SentencePiece BPE: of all neighbours that form a token, the highest score is merged first."""
    scores = file.require("tokenizer.ggml.scores")
    vocabulary = {text: n for n, text in enumerate(tokens)}
    unknown = tokens[file.metadata.get("tokenizer.ggml.unknown_token_id", _SPM_DEFAULT_IDS["unknown"])]
    merges = []
    for text, index in vocabulary.items():
        for cut in range(1, len(text)) if types[index] not in (_CONTROL, _BYTE, _UNKNOWN) else ():
            left, right = vocabulary.get(text[:cut]), vocabulary.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-scores[index], index, left, right, (text[:cut], text[cut:])))
    pairs = [pair for *_, pair in sorted(merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


_BUILDERS = MappingProxyType({BYTE_LEVEL: _build_bpe, SENTENCEPIECE: _build_spm})


def pre_tokenizer_name(tokenizer: Any) -> str:
    """llama.cpp's `tokenizer.ggml.pre` for a byte-level BPE tokenizer, by its structure; raises InputError."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps, ignore_merges = _steps_of(state), bool(state["model"].get("ignore_merges"))
    matches = [name for name, row in PRE_TOKENIZERS.items() if row.steps == steps]
    if not matches:
        problem = "llama.cpp has no pre-tokenizer known to us that splits text as this tokenizer does"
        raise InputError(problem, field="pre_tokenizer", allowed=", ".join(PRE_TOKENIZERS))
    # The flag matters only for tokens that merging cannot reach: a row that differs only in it is next best.
    return min(matches, key=lambda name: PRE_TOKENIZERS[name].ignore_merges != ignore_merges)


def build_pre_tokenizer(steps: Sequence[str]) -> Any:
    """The tokenizers object that splits by a row's steps and maps bytes to letters as GPT-2 does."""
    parts: list[Any] = []
    for step in steps:
        if step == _DIGIT:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != _GPT2 or step != steps[-1]:
            parts.append(pre_tokenizers.Split(tokenizers.Regex(step), "isolated"))
    # ByteLevel has GPT-2's expression built in, and tokenizers that end with it are usually written so.
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=steps[-1] == _GPT2))
    return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


def _steps_of(state: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions a tokenizer.json splits by; None if it does something else besides."""
    normalizer = state.get("normalizer")
    # llama.cpp does not normalize; NFC changes nothing in text that is composed already, as most is.
    if state["model"]["type"] != "BPE" or (
        normalizer and _flat(normalizer, "normalizers") != [{"type": "NFC"}]
    ):
        return None
    parts = _flat(state.get("pre_tokenizer") or {}, "pretokenizers")
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    steps: list[str] = []
    for part in parts:
        kind = part.get("type")
        if kind == "Digits":
            steps.append(_DIGIT if part["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel":
            steps += [_GPT2] if part.get("use_regex", True) else []
        elif (
            kind == "Split" and "Regex" in part["pattern"] and (part["behavior"], part["invert"]) in _KEEPING
        ):
            # Some files have line ends themselves in the place of their escapes.
            steps.append(part["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n"))
        else:
            return None
    return tuple(steps)


def _flat(part: Mapping[str, Any], children: str) -> list[Mapping[str, Any]]:
    if part.get("type") != "Sequence":
        return [part] if part else []
    return [leaf for child in part[children] for leaf in _flat(child, children)]
