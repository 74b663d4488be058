"""Unquantized GGUF files, written tensor by tensor, and their tokenizers; the same input gives the same bytes."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import torch

from cfsp.errors import InputError, LimitError
from cfsp.models.checkpoint import read_generation_config
from cfsp.models.gguf_model import SAMPLING
from cfsp.models.gguf_tokenizer import BYTE_LEVEL, SENTENCEPIECE, pre_tokenizer_name
from cfsp.models.token_trees import merge_pairs
from cfsp.progress import Progress, no_progress
from cfsp.records import tool_version
from cfsp.text.conversations import turn_end
from cfsp.text.settings import BUILTIN_TEXT
from cfsp.text.tokens import load_documents, start_token
from exporters.checkpoint_reader import open_tensors
from exporters.gguf import runtime
from exporters.gguf.architecture import ChosenLayout, add_hyperparameters, read_layout, rope_tensors
from exporters.gguf.quants import find_quant
from exporters.gguf.tensors import FloatArray, tensor_specs
from exporters.job import Provenance
from exporters.recipe import Recipe

# numpy has no bfloat16, whose bits are those of whole numbers.
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_TOKENS_OF_PHI3 = ("</s>", "<unk>", "<s>", "<|endoftext|>")


class PlainTensor(NamedTuple):
    """A tensor that is stored unquantized."""

    name: str  # llama.cpp's
    shape: tuple[int, ...]  # outermost dimension first
    kind: str  # F32, F16 or BF16
    values: Callable[[], FloatArray]  # float32; called when it is written, so that one is in memory

    def stored(self) -> npt.NDArray[Any]:
        """What the file gets; raises InputError: a number is too large for float16."""
        values = self.values()
        if self.kind == "BF16":
            return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        if self.kind == "F16" and values.size and float(np.abs(values).max()) > float(np.finfo("f2").max):
            raise InputError("values too large for float16; export f32 or a quantized type", field=self.name)
        return values.astype(_DTYPES[self.kind])


def write_gguf(
    checkpoint: Path,
    path: Path,
    tokenizer: Any,
    provenance: Provenance,
    recipe: Recipe,
    *,
    progress: Progress = no_progress,
) -> ChosenLayout:
    """Write a checkpoint folder as "f32", or with matrices as "f16" or "bf16", as the recipe says.

    Raises InputError: llama.cpp cannot hold it.
    """
    row, chosen = find_quant(recipe.format), read_layout(checkpoint)
    lacked = [token for token in _TOKENS_OF_PHI3 if token not in tokenizer.get_vocab()]
    if lacked and any(part in provenance.name.lower() for part in ("phi3", "phi-3")):
        raise InputError(
            f"llama.cpp takes a model of this name for Phi-3, whose tokens {', '.join(lacked)} it lacks",
            field="name",
            value=provenance.name,
            allowed="another one (--set name)",
        )

    stated = provenance.metadata() | {"phoneready.tool_version": tool_version()} | recipe.metadata()

    def add_metadata(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(provenance.name)
        if provenance.license:
            writer.add_license(provenance.license)
        if provenance.base_model:
            writer.add_base_model_count(1)
            organization, _, name = provenance.base_model.rpartition("/")
            writer.add_base_model_name(0, name)
            if organization:
                writer.add_base_model_organization(0, organization)
                writer.add_base_model_repo_url(0, f"https://huggingface.co/{provenance.base_model}")
        writer.add_file_type(row.ftype)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in stated.items():
            writer.add_string(key, value)
        if provenance.seed is not None:
            writer.add_int64("phoneready.seed", provenance.seed)
        _add_sampling(writer, read_generation_config(checkpoint))
        add_hyperparameters(writer, chosen)
        add_tokenizer(writer, tokenizer, chosen.config.vocab_size)

    with open_tensors(checkpoint) as opened:
        tensors = [
            PlainTensor(
                spec.name,
                spec.shape,
                row.base_type if spec.is_matrix else "F32",
                partial(spec.build, opened.read),
            )
            for spec in tensor_specs(chosen)
        ]
        tensors = [*plain_rope_tensors(chosen), *tensors]
        write_tensors(
            path, chosen.layout.architecture, add_metadata, tensors, f"writing {row.name}", progress=progress
        )
    return chosen


def plain_rope_tensors(chosen: ChosenLayout) -> Iterator[PlainTensor]:
    """The divisors of rotary frequencies that llama.cpp reads from tensors."""
    for name, values in rope_tensors(chosen.config).items():
        yield PlainTensor(name, values.shape, "F32", partial(np.asarray, values))


def write_tensors(
    path: Path,
    architecture: str,
    add_metadata: Callable[[Any], None],
    tensors: Sequence[PlainTensor],
    what: str,
    *,
    progress: Progress = no_progress,
) -> None:
    """Write a file with what `add_metadata` gives a gguf.GGUFWriter, and tensors in their order."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        add_metadata(writer)
        for tensor in tensors:
            kind, dtype = gguf.GGMLQuantizationType[tensor.kind], np.dtype(_DTYPES[tensor.kind])
            n_bytes = math.prod(tensor.shape) * dtype.itemsize
            writer.add_tensor_info(tensor.name, tensor.shape, dtype, n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(tensors, start=1):
            writer.write_tensor_data(tensor.stored())
            progress(what, done, len(tensors))
    finally:
        writer.close()


_MOST = {"temperature": 1000, "top_k": 2**31 - 1, "top_p": 1, "min_p": 1, "repetition_penalty": 1000}


def _add_sampling(writer: Any, generation_config: Any) -> None:
    """Write how a generation config (or None) says to sample, as far as it is in range; llama.cpp's programs do so."""
    stated = generation_config.to_diff_dict() if generation_config is not None else {}
    values = {name: stated[name] for name in SAMPLING.values() if stated.get(name) is not None}
    if not values and stated.get("do_sample"):
        values = {"temperature": 1.0}  # transformers'
    for key, name in SAMPLING.items():
        value: Any = values.get(name)
        kinds = (int,) if name == "top_k" else (int, float)
        may_be_zero = name in ("top_k", "min_p")
        if type(value) in kinds and (0 < value <= _MOST[name] or (value == 0 and may_be_zero)):
            getattr(writer, f"add_sampling_{key}")(value)


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LINES = 240
CHECK_STRINGS = (
    *("", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "a", " a", "a ", "'", "''''"),
    " \n \n\t x  y   z    ",
    "\r\nline\r\n\r\nline\t\t\tx  b",
    "Hello world, hello HeLLo! ALLCAPS123abc",
    " Hello, world!",
    "It's we're they'll I'd I've I'm don't won't 'tis",
    "IT'S WE'RE THEY'LL I'D I'VE I'M DON'T",
    "it\u2019s \u201cquoted\u201d \u2013 dashed \u2014 and\u2026",
    "0 1 12 123 1234 12345 123456 1234567 x1y22z333",
    "3.14159 1,000,000 -273.15 1e-9 0xFF 50% 2024-11-24T16:30:00Z v1.2.3-rc4+build5",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u00b2\u00b3 \u00bd \u2163",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    'for (int i = 0; i < n; ++i) { printf("%d\\n", a[i]); }',
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}} <div class="x">text</div><!-- note --><br/>',
    "https://example.org/path?query=1&other=%20#fragment name.surname@example.org +44 (0)20 7946 0000",
    "$100 \u20ac99 \u00a31 \u00a55 #tag @user ~^`|\\",
    "!!! ??? ... ,,, ;;; ::: --- ___ *** === +++ ((nested [brackets] {here}))",
    "caf\u00e9 na\u00efve \u00fcber Stra\u00dfe \u0142\u00f3d\u017a \u011facek cafe\u0301 a\u0300\u0301\u0302",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0417\u0434\u0440\u0430\u0432\u043e.",
    "\u039a\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1 \u03ba\u03cc\u03c3\u03bc\u03b5",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u8fd9\u662f\u4e00\u4e2a\u6d4b\u8bd5\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u30c6\u30b9\u30c8\u3067\u3059\u3002",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 mixed\u4e2d\u6587and123numbers\u0440\u0443\u0441",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\U0001f600 \U0001f680\U0001f680 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u2764\ufe0f",
    "\u00a0no\u00a0\u2003wide\u3000space\u200bzero \u2200x\u2208\u211d: x\u00b2 \u2265 0 \u222b\u03b1\u03b2 \u221e",
    "\ufeffbyte order mark \x01\x02 control \x7f",
    *("word" * 40, "a" * 100, " " * 33 + "x", "\n" * 17 + "x", "end with newline\n", " end with space "),
    "Dr. Smith's 3rd try (2nd edition) cost $1.50/kg; see p. 42ff.",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    '"""docstring"""\ttab\tseparated\tvalues\t1\t2',
)
"""What pre-tokenizers disagree about."""


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Give a gguf.GGUFWriter tokenizer.*: vocabulary, merges or scores, special tokens, chat template.

    Rows of the embedding without a token become [PADn]. Raises InputError: the file cannot hold this tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _vocabulary(tokenizer, state, vocab_size)
    if (kind := state["model"]["type"]) != "BPE":
        raise InputError(
            "this kind of tokenizer cannot be exported", field="tokenizer", value=kind, allowed="BPE"
        )
    byte_fallback, merges = bool(state["model"].get("byte_fallback")), merge_pairs(state["model"])
    writer.add_tokenizer_model(SENTENCEPIECE if byte_fallback else BYTE_LEVEL)
    if byte_fallback:
        writer.add_tokenizer_pre("default")
        # Pieces of one character are never the result of a merge, so theirs decide nothing.
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        scored = zip(tokens, types, strict=True)
        writer.add_token_scores(
            [-float(ranks.get(text, len(ranks))) if kind == _NORMAL else 0.0 for text, kind in scored]
        )
    else:
        writer.add_tokenizer_pre(pre_tokenizer_name(tokenizer))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    normalizer, pre_tokenizer = json.dumps(state.get("normalizer") or {}), state.get("pre_tokenizer") or {}
    adds_space = '"Prepend"' in normalizer or pre_tokenizer.get("prepend_scheme") in ("first", "always")
    writer.add_add_space_prefix(byte_fallback and adds_space)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    end = turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token_id:
        writer.add_eot_token_id(end)
    plain, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    starts = [] if start_token(tokenizer) is None else full[:1]
    ends = full[len(starts) + len(plain) :]
    if full != [*starts, *plain, *ends] or ends not in ([], [tokenizer.eos_token_id]):
        raise InputError(f"the tokenizer adds tokens that a GGUF file cannot describe: {full} around {plain}")
    writer.add_add_bos_token(bool(starts))
    writer.add_add_eos_token(bool(ends))
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        if isinstance(template, Mapping):
            template = [{"name": key, "template": value} for key, value in template.items()]
        writer.add_chat_template(template)


def check_tokenizer(path: Path, tokenizer: Any, strings: Sequence[str] | None = None) -> int:
    """Hold llama.cpp's token ids of a file against the tokenizer's, with and without the start and end tokens.

    Strings are CHECK_STRINGS and lines of English prose unless some are given, in NFC if the tokenizer composes, as
    llama.cpp does not. Returns their number. Raises LimitError: ids differ.
    """
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    if strings is None:
        prose = "\n".join(document.text or "" for document in load_documents(BUILTIN_TEXT))
        lines = dict.fromkeys(line for line in prose.splitlines() if line.strip())
        strings = (*CHECK_STRINGS, *islice(lines, _LINES))
    texts = [*strings, f"{bos}a{eos}b", f"{eos}\n{bos}"]
    if normalizes_to_nfc(tokenizer):
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    with runtime.open_vocabulary(path) as model:
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
    known, model = tokenizer.get_vocab(), state["model"]
    by_id = {index: text for text, index in known.items()}
    if by_id and max(by_id) >= vocab_size:
        raise InputError(
            "the tokenizer has more tokens than the model has embeddings",
            field="vocab_size",
            value=vocab_size,
            allowed=f">= {max(by_id) + 1}",
        )
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    types = [_NORMAL if index in by_id else _UNUSED for index in range(vocab_size)]
    if model.get("byte_fallback"):
        is_byte = re.compile(r"<0x[0-9A-Fa-f]{2}>").fullmatch
        types = [_BYTE if is_byte(text) else kind for text, kind in zip(tokens, types, strict=True)]
    for added in state.get("added_tokens") or []:
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if model.get("byte_fallback") and model.get("unk_token") in known:
        types[known[model["unk_token"]]] = _UNKNOWN
    return tokens, types
