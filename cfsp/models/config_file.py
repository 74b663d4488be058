"""config.json and other settings of a model folder, checked before transformers or llama.cpp sees them.

Both take some values on trust, and then divide by zero, allocate without end, or abort the process.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field

from cfsp.errors import InputError
from cfsp.models.families import FAMILIES, family_of, fold_of, text_model_of
from cfsp.models.families.row import MAX_SIZE, Family, Fold, Positive, Size
from cfsp.models.shape import BlockShape, ModelShape
from cfsp.reading import as_input_error, parse_json, read_bytes, read_json_object
from cfsp.validation import Kinds, check_kinds, kinds

LayerCount = Annotated[int, Field(ge=1, le=512)]  # llama.cpp reads no more
ContextLength = Annotated[int, Field(ge=1, lt=2**31)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Ids = TokenId | list[TokenId] | None
_PadId = Annotated[int, Field(ge=-1, lt=2**31)] | None
_Number = Positive | None
_Share = Annotated[float, Field(gt=0, le=1)]
_Section = Annotated[int, Field(ge=0, le=2**16)]

PER_BLOCK_LISTS = ("layer_types", "no_rope_layers")  # settings with an entry for each block
_CONFIG = kinds(
    {
        "vocab_size hidden_size intermediate_size num_attention_heads": Size,
        "tie_word_embeddings attention_bias mlp_bias use_sliding_window": bool | None,
        "rope_scaling rope_parameters quantization_config": dict[str, Any] | None,
        "layer_types architectures": list[str] | None,
        "dtype torch_dtype": Literal["float32", "float16", "bfloat16", "float64"] | None,
        "num_hidden_layers": LayerCount,
        "num_key_value_heads": Size | None,
        "head_dim": Annotated[int, Field(ge=2, multiple_of=2)] | None,
        "max_position_embeddings": ContextLength,
        "sliding_window original_max_position_embeddings": ContextLength | None,
        "max_window_layers": int | None,
        "no_rope_layers": list[Annotated[int, Field(ge=0, le=1)]] | None,
        "no_rope_layer_interval": Annotated[int, Field(ge=1)] | None,
        "_sliding_window_pattern": Annotated[int, Field(ge=1)],
        "sliding_window_pattern": Annotated[int, Field(ge=0)] | str | None,
        "rms_norm_eps norm_eps": Epsilon,
        "hidden_act": str,
        "final_logit_softcapping rope_theta": _Number,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": Literal[False] | None,
        "partial_rotary_factor": _Share | None,
        "bos_token_id eos_token_id": _Ids,
        "pad_token_id": _PadId,
    }
)
_PER_BLOCK = MappingProxyType({"intermediate_size": "ffn_width", "num_key_value_heads": "kv_groups"})
"""Hugging Face's name of what a block may have of its own -> ours."""
_PER_BLOCK_KINDS = kinds(
    **dict.fromkeys(_PER_BLOCK, Annotated[int, Field(ge=1)]),
    skip=Annotated[list[Literal["attention"]], Field(min_length=1, max_length=1)],
)
_ROPE = kinds(
    {
        "rope_type type": str | None,
        "rope_theta alpha factor low_freq_factor high_freq_factor": _Number,
        "attention_factor beta_fast beta_slow mscale mscale_all_dim": _Number,
        "short_factor long_factor": list[Positive] | None,
        "mrope_section": Annotated[list[_Section], Field(min_length=3, max_length=3)] | None,
        "partial_rotary_factor": _Share | None,
        "original_max_position_embeddings": ContextLength | None,
    }
)
_GENERATION = kinds(
    {
        "bos_token_id eos_token_id": _Ids,
        "pad_token_id": _PadId,
        "temperature top_p min_p repetition_penalty": float | None,
        "top_k": int | None,
    }
)
_TOKENIZER = kinds(
    {"bos_token eos_token unk_token pad_token": str | dict[str, Any] | None},
    tokenizer_class=str | None,
    model_max_length=_Number,
    chat_template=str | list[dict[str, Any]] | None,
    added_tokens_decoder=dict[str, dict[str, Any]],
)
# Read by transformers when a folder's tokenizer is loaded.
_TOKENIZER_SETTINGS: Mapping[str, Kinds] = MappingProxyType(
    {"tokenizer_config.json": _TOKENIZER, "special_tokens_map.json": _TOKENIZER, "added_tokens.json": {}}
)
_OF_THE_WHOLE = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("dtype", "torch_dtype", "quantization_config"),
)
"""Settings of a multimodal folder that its text part need not repeat."""
_MOST_GROWTH = 100
BlockSettings = Mapping[int, Mapping[str, Any]]  # index of a block -> the settings in which it differs


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, or of its text part, checked; raises InputError, which names all problems."""
    file, where = folder / "config.json", str(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter, which fits only the whole model",
            allowed="a model with the adapter merged into its weights (peft: merge_and_unload)",
        )
    if not file.exists():
        raise InputError(
            f"{folder} has no config.json", allowed="a Hugging Face model folder, or a .gguf file"
        )
    settings = read_json_object(file)
    if text_type := text_model_of(str(settings.get("model_type"))):
        own = settings.get("text_config")
        if not isinstance(own, dict):
            kind = type(own).__name__
            raise InputError(f"{where}: nothing is said of the text model", field="text_config", value=kind)
        whole = {key: settings[key] for key in _OF_THE_WHOLE if settings.get(key) is not None}
        settings = {"model_type": text_type} | whole | own
    model_type = str(settings.get("model_type"))
    row = family_of(model_type, f"{where}: ")
    check_kinds(settings, {**_CONFIG, **kinds(row.kinds)}, where)
    fold = fold_of(settings)
    if fold is not None and (obstacle := fold.obstacle(settings)):
        raise InputError(
            f"{where}: {model_type} models with {obstacle} are not supported",
            allowed=f"those that are a {fold.target} but for names and factors",
        )
    for key in ("rope_parameters", "rope_scaling"):
        stated = settings.get(key) or {}
        # Parameters of all blocks, and of each kind (`full_attention`, `sliding_attention`).
        of_kinds = {n for n, part in stated.items() if n.endswith("_attention") and isinstance(part, dict)}
        for part in ({n: stated[n] for n in stated.keys() - of_kinds}, *(stated[n] for n in of_kinds)):
            check_kinds(part, _ROPE, f"{where}: {key}")
    release, refused = (row.release, row.refused) if isinstance(row, Family) else (0, {})
    if isinstance(row, Family) and row.has_window_rope and settings.get("sliding_window", 1) is None:
        raise InputError(f"{where}: transformers needs one for {model_type}", field="sliding_window")
    for key, reason in refused.items():
        if settings.get(key):
            raise InputError(f"{where}: unsupported, with {reason}", field=key, value=settings[key])
    if (cap := settings.get("final_logit_softcapping")) and not getattr(row, "cap_setting", ""):
        raise InputError(f"{where}: unsupported in {model_type}", field="final_logit_softcapping", value=cap)
    import transformers

    if model_type not in transformers.CONFIG_MAPPING or int(transformers.__version__.split(".")[0]) < release:
        raise InputError(
            f"{where}: transformers {transformers.__version__} does not know it as it is read here",
            field="model_type",
            value=model_type,
            allowed=f"transformers {release}",
        )
    if problems := "; ".join(_contradictions(settings, row)):
        raise InputError(f"{where}: {problems}")
    if quantized := settings.get("quantization_config"):
        method = quantized.get("quant_method")
        raise InputError(f"{folder} holds quantized weights", value=method, allowed="float weights")
    return settings


def dense_settings(settings: Mapping[str, Any], where: str) -> tuple[dict[str, Any], BlockSettings]:
    """Settings by which transformers builds a dense model, and what else single blocks have; raises InputError."""
    row = FAMILIES.get(settings.get("model_type", ""))
    native = ("head_dim",) if row and row.own_heads else ()
    try:
        stated = {int(n): dict(own) for n, own in (settings.get("per_layer_config") or {}).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: malformed per_layer_config: {error}") from error
    plain = {key: value for key, value in settings.items() if key != "per_layer_config"}
    dense = {n: {key: own[key] for key in native if key in own} for n, own in stated.items()}
    if native and "per_layer_config" in settings:
        # Without it transformers takes sizes of its own for granted.
        plain["per_layer_config"] = {str(n): own for n, own in dense.items() if own}
    rest = {n: {key: own[key] for key in own if key not in native} for n, own in stated.items()}
    return plain, {n: own for n, own in rest.items() if own or not stated[n]}


def check_generation_config(folder: Path) -> bool:
    """Whether a folder has a generation_config.json; raises InputError for an unsound one."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return False
    check_kinds(read_json_object(file), _GENERATION, str(file))
    return True


def check_tokenizer_files(folder: Path) -> None:
    """Raise InputError if a folder's tokenizer, or settings beside it, would harm the libraries that read it."""
    file = folder / "tokenizer.json"
    content = read_bytes(file) if file.is_file() else b""
    large = re.search(rb":\s*[0-9]{8}", content)
    if large or b'"Replace"' in content or b'"Precompiled"' in content:
        state = parse_json(content, str(file))
        # Replacements that blow a text up, and a table of characters at which tokenizers would panic.
        growth, parts = 1, [state.get("normalizer") if isinstance(state, dict) else None]
        while parts:
            part = parts.pop()
            if isinstance(part, list):
                parts += part
            if not isinstance(part, dict):
                continue
            parts += part.values()
            if part.get("type") == "Replace" and isinstance(part.get("content"), str):
                growth *= max(1, len(part["content"]))
            if part.get("type") == "Precompiled":
                with as_input_error(f"{file}: the normalizer's precompiled_charsmap is damaged"):
                    table = base64.b64decode(part["precompiled_charsmap"], validate=True)
                    (size,) = struct.unpack_from(f"<I{struct.unpack_from('<I', table)[0]}x", table)
                    table[4 + size :].decode("utf-8")
        if growth > _MOST_GROWTH:
            raise InputError(f"{file}: the normalizer makes a text up to {growth} times as long")
        model = state.get("model") if isinstance(state, dict) else None
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        ids = vocabulary.values() if large and isinstance(vocabulary, dict) else ()
        highest = max((one for one in ids if isinstance(one, int)), default=0)
        if highest >= MAX_SIZE:  # tokenizers allocates that many entries
            raise InputError(f"{file}: id of a token", value=highest, allowed=f"less than {MAX_SIZE}")
    for name, expected in _TOKENIZER_SETTINGS.items():
        if (folder / name).is_file():
            check_kinds(read_json_object(folder / name), expected, str(folder / name))


def shape_from_config(config: Mapping[str, Any], given: BlockSettings, where: str) -> ModelShape:
    """The shape that a config.json states, `given` of single blocks by `dense_settings`; raises InputError."""
    count = config["num_hidden_layers"]
    if any(not 0 <= index < count for index in given):
        raise InputError(
            f"{where}: per_layer_config names blocks that do not exist: num_hidden_layers is {count}"
        )
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    from cfsp.models.architectures import keyless_blocks, stated_widths

    keyless, blocks = keyless_blocks(config), []
    for index, width in enumerate(stated_widths(config)):
        plain = {"intermediate_size": width, "num_key_value_heads": heads}
        own = {
            key: value for key, value in given.get(index, {}).items() if value != {**config, **plain}.get(key)
        }
        unknown = sorted(own.keys() - _PER_BLOCK_KINDS.keys())
        if unknown:
            allowed = f"the same in all blocks; only {', '.join(_PER_BLOCK_KINDS)} may differ"
            problem, key = f"{where}: per_layer_config of block {index}", unknown[0]
            raise InputError(problem, field=key, value=own[key], allowed=allowed)
        check_kinds(own, _PER_BLOCK_KINDS, f"{where}: malformed per_layer_config: block {index}")
        block = BlockShape(index, **{ours: (plain | own)[key] for key, ours in _PER_BLOCK.items()})
        block = replace(block, kv_groups=0) if index in keyless else block
        blocks.append(replace(block, kv_groups=0, has_attention=False) if "skip" in own else block)
    return ModelShape(config["vocab_size"], tuple(blocks))


def _contradictions(settings: Mapping[str, Any], row: Family | Fold) -> Iterator[str]:
    """What values say of each other that cannot be."""
    said = settings.get
    heads, hidden, layers = said("num_attention_heads"), said("hidden_size"), said("num_hidden_layers")
    kv_heads, head_dim, vocabulary = said("num_key_value_heads"), said("head_dim"), said("vocab_size")
    if heads and kv_heads and heads % kv_heads:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
    if heads and hidden and not head_dim and (hidden % heads or hidden // heads % 2):
        yield f"hidden_size {hidden} divided by num_attention_heads {heads} is no even head_dim"
    mixer = getattr(row, "mixer", None)
    if mixer and set(said("layer_types") or ()) == {mixer.kind}:
        yield "no block attends (layer_types)"
    keys, values = said("linear_num_key_heads"), said("linear_num_value_heads")
    if mixer and "key_heads" in mixer.sizes and keys and values and values % keys:
        yield f"linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}"
    for key in PER_BLOCK_LISTS:
        count = layers if said(key) is None else len(settings[key])
        # transformers reads no further in the second than there are blocks.
        if layers and count != layers and (key != "no_rope_layers" or count < layers):
            yield f"{key} has {count} entries for {layers} blocks"
    for key in ("rope_parameters", "rope_scaling") if heads and hidden else ():
        rope, width = said(key) or {}, head_dim or settings["hidden_size"] // settings["num_attention_heads"]
        share = rope.get("partial_rotary_factor") or said("partial_rotary_factor") or 1.0
        turned = int(width * share)
        if turned < 2 or turned % 2:
            yield f"partial_rotary_factor {share} of head_dim {width} is no even number"
        for name in ("short_factor", "long_factor"):
            if rope.get(name) is not None and len(rope[name]) != turned // 2:
                yield f"{name} has {len(rope[name])} entries for {turned // 2} frequencies"
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids: list[Any] = settings[key] if isinstance(said(key), list) else [said(key, -1)]
        if vocabulary is not None and None not in ids and max(ids, default=-1) >= vocabulary:
            yield f"{key} {max(ids)} is not below vocab_size {vocabulary}"
    if inputs := getattr(row, "block_inputs", None):
        rows = said(inputs.rows_setting)
        if said(inputs.size_setting) != 0 and None not in (vocabulary, rows) and vocabulary != rows:
            yield f"{inputs.rows_setting} {rows} is not vocab_size {vocabulary}"
    if shared := getattr(row, "shared_keys", None):
        sharing = said(shared.count_setting) or 0
        if sharing and layers and sharing >= layers:
            yield f"{shared.count_setting} {sharing} leaves none of {layers} blocks to read from"
