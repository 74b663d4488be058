"""config.json and the other settings of a model folder, checked before transformers or llama.cpp sees them.

Either library takes some values on trust and then divides by zero, allocates without end, or aborts the process.
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

from cfsp.errors import InputError, look_up
from cfsp.models.shape import BlockShape, ModelShape
from cfsp.models.text_settings import text_settings
from cfsp.reading import as_input_error, parse_json, read_bytes, read_json_object
from cfsp.validation import Kinds, check_kinds, kinds

MAX_LAYERS = 512
"""As many as llama.cpp reads; more is no model but an attempt to fill the memory."""
LayerCount = Annotated[int, Field(ge=1, le=MAX_LAYERS)]
MAX_SIZE = 2**24
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
ContextLength = Annotated[int, Field(ge=1, lt=2**31)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Ids = TokenId | list[TokenId] | None
_PadId = Annotated[int, Field(ge=-1, lt=2**31)] | None
_Number = Positive | None
_Share = Annotated[float, Field(gt=0, le=1)]
_Factor = Annotated[float, Field(gt=1e-6, lt=1e6)]

PER_BLOCK_LISTS = ("layer_types", "no_rope_layers")
"""Settings with an entry for each block."""
_CONFIG = kinds(
    **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads"), Size),
    intermediate_size=Size,
    **dict.fromkeys(
        ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_sliding_window"),
        bool | None,
    ),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), dict[str, Any] | None),
    **dict.fromkeys(("layer_types", "architectures"), list[str] | None),
    **dict.fromkeys(("dtype", "torch_dtype"), Literal["float32", "float16", "bfloat16", "float64"] | None),
    num_hidden_layers=LayerCount,
    num_key_value_heads=Size | None,
    head_dim=Annotated[int, Field(ge=2, multiple_of=2)] | None,
    max_position_embeddings=ContextLength,
    sliding_window=ContextLength | None,
    max_window_layers=int | None,
    no_rope_layers=list[Annotated[int, Field(ge=0, le=1)]] | None,
    no_rope_layer_interval=Annotated[int, Field(ge=1)] | None,
    **dict.fromkeys(("rms_norm_eps", "norm_eps"), Epsilon),
    **dict.fromkeys(("conv_L_cache", "linear_conv_kernel_dim"), Annotated[int, Field(ge=2, le=2**10)]),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), Size),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), Size),
    **dict.fromkeys(("conv_bias", "block_auto_adjust_ff_dim", "tie_embedding"), bool),
    **dict.fromkeys(("block_ff_dim", "block_multiple_of"), Size),
    block_ffn_dim_multiplier=_Number,
    full_attn_idxs=list[int] | None,
    **dict.fromkeys(("hidden_act", "hidden_activation"), str),
    final_logit_softcapping=_Number,
    attn_logit_softcapping=None,
    **dict.fromkeys(("global_head_dim", "num_global_key_value_heads"), Annotated[int, Field(ge=2)] | None),
    **dict.fromkeys(
        ("hidden_size_per_layer_input", "num_kv_shared_layers"), Annotated[int, Field(ge=0)] | None
    ),
    vocab_size_per_layer_input=Size,
    **dict.fromkeys(("use_double_wide_mlp", "enable_moe_block", "attention_k_eq_v"), bool | None),
    use_bidirectional_attention=Literal[False] | None,
    **dict.fromkeys(("rope_local_base_freq", "query_pre_attn_scalar"), _Number),
    sliding_window_pattern=Annotated[int, Field(ge=0)] | str | None,
    _sliding_window_pattern=Annotated[int, Field(ge=1)],
    **dict.fromkeys(
        ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), _Factor
    ),
    shared_intermediate_size=Size,
    num_local_experts=Annotated[int, Field(ge=0)] | None,
    position_embedding_type=str | None,
    original_max_position_embeddings=ContextLength | None,
    partial_rotary_factor=_Share | None,
    rope_theta=_Number,
    bos_token_id=_Ids,
    eos_token_id=_Ids,
    pad_token_id=_PadId,
)
_PER_BLOCK = MappingProxyType({"intermediate_size": "ffn_width", "num_key_value_heads": "kv_groups"})
"""Hugging Face's name of what a block may have of its own -> ours."""
_PER_BLOCK_KINDS = kinds(
    **dict.fromkeys(_PER_BLOCK, Annotated[int, Field(ge=1)]),
    skip=Annotated[list[Literal["attention"]], Field(min_length=1, max_length=1)],
)
_ROPE = kinds(
    **dict.fromkeys(("rope_type", "type"), str | None),
    **dict.fromkeys(("rope_theta", "alpha", "factor", "low_freq_factor", "high_freq_factor"), _Number),
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _Number),
    **dict.fromkeys(("short_factor", "long_factor"), list[Positive] | None),
    mrope_section=Annotated[list[Annotated[int, Field(ge=0, le=2**16)]], Field(min_length=3, max_length=3)]
    | None,
    partial_rotary_factor=_Share | None,
    original_max_position_embeddings=ContextLength | None,
)
_GENERATION = kinds(
    bos_token_id=_Ids,
    eos_token_id=_Ids,
    pad_token_id=_PadId,
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), float | None),
    top_k=int | None,
)
_TOKENIZER = kinds(
    **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), str | dict[str, Any] | None),
    tokenizer_class=str | None,
    model_max_length=_Number,
    chat_template=str | list[dict[str, Any]] | None,
    added_tokens_decoder=dict[str, dict[str, Any]],
)
# Read by transformers when a folder's tokenizer is loaded.
_TOKENIZER_SETTINGS: Mapping[str, Kinds] = MappingProxyType(
    {"tokenizer_config.json": _TOKENIZER, "special_tokens_map.json": _TOKENIZER, "added_tokens.json": {}}
)
_MOST_GROWTH = 100
BlockSettings = Mapping[int, Mapping[str, Any]]
"""Index of a block -> the settings in which it differs."""


def read_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, or what it says of the text part, all keys that matter to us of sound kind and size.

    Raises:
        InputError: Missing or malformed, an adapter beside it, an architecture that is not in the table, quantized
            weights, or values that are of the wrong kind, out of range, or do not fit together; all are named.
    """
    # They bring torch, which readers of GGUF headers do without.
    from cfsp.models.architectures import ARCHITECTURES, unsupported
    from cfsp.models.folds import FOLDS, require_foldable

    file = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter, which fits the whole model alone",
            allowed="a model with the adapter merged into its weights (peft: merge_and_unload)",
        )
    if not file.exists():
        raise InputError(
            f"{folder} has no config.json", allowed="a Hugging Face model folder, or a .gguf file"
        )
    settings = text_settings(read_json_object(file), str(file))
    model_type = str(settings.get("model_type"))
    row = look_up(
        {**FOLDS, **ARCHITECTURES}, model_type, f"{file}: {unsupported(model_type)}", field="model_type"
    )
    check_kinds(settings, _CONFIG, str(file))
    require_foldable(settings, str(file))
    if getattr(row, "has_window_rope", False) and settings.get("sliding_window", 1) is None:
        raise InputError(
            f"{file}: transformers needs one for {model_type}", field="sliding_window", value=None
        )
    for key in ("rope_parameters", "rope_scaling"):
        for part in _ropes(settings.get(key) or {}):
            check_kinds(part, _ROPE, f"{file}: {key}")
    _refuse(settings, row, str(file))
    if problems := "; ".join(_contradictions(settings, row)):
        raise InputError(f"{file}: {problems}")
    if quantized := settings.get("quantization_config"):
        method = quantized.get("quant_method")
        raise InputError(f"{folder} holds quantized weights", value=method, allowed="float weights")
    return settings


def _refuse(settings: Mapping[str, Any], row: Any, where: str) -> None:
    """Raise InputError for a model of a known type with something that its row has no place for."""
    import transformers

    model_type = settings["model_type"]
    for key, reason in getattr(row, "refused", {}).items():
        if settings.get(key):
            raise InputError(f"{where}: unsupported, with {reason}", field=key, value=settings[key])
    if settings.get("final_logit_softcapping") and not getattr(row, "cap_setting", ""):
        key = "final_logit_softcapping"
        raise InputError(f"{where}: unsupported in {model_type}", field=key, value=settings[key])
    release = getattr(row, "release", 0)
    if model_type not in transformers.CONFIG_MAPPING or int(transformers.__version__.split(".")[0]) < release:
        raise InputError(
            f"{where}: transformers {transformers.__version__} does not know it as it is read here",
            field="model_type",
            value=model_type,
            allowed=f"transformers {release}",
        )


def dense_settings(settings: Mapping[str, Any], where: str) -> tuple[dict[str, Any], BlockSettings]:
    """Settings that transformers builds a dense model by, and what is stated of single blocks besides.

    Some model types have heads of unlike sizes, which transformers states under `per_layer_config`, too.

    Args:
        settings: Of config.json.
        where: File named in errors.

    Raises:
        InputError: A malformed `per_layer_config`.
    """
    from cfsp.models.architectures import ARCHITECTURES

    row = ARCHITECTURES.get(settings.get("model_type", ""))
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
    """Whether a folder has a generation_config.json; raises InputError where transformers cannot be given it."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return False
    check_kinds(read_json_object(file), _GENERATION, str(file))
    return True


def read_chat_template(file: Path) -> str | None:
    """The template of a chat_template.json; raises InputError for one of another kind."""
    settings = read_json_object(file)
    check_kinds(settings, kinds(chat_template=str | None), str(file))
    template: str | None = settings.get("chat_template")
    return template


def check_tokenizer_files(folder: Path) -> None:
    """Raise InputError where a folder's tokenizer, or what lies beside it, would harm the libraries that read it."""
    file = folder / "tokenizer.json"
    content = read_bytes(file) if file.is_file() else b""
    large = re.search(rb":\s*[0-9]{8}", content)
    if large or b'"Replace"' in content or b'"Precompiled"' in content:
        state = parse_json(content, str(file))
        _check_normalizer(state.get("normalizer") if isinstance(state, dict) else None, str(file))
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
    """The shape that a config.json states.

    Args:
        config: Its keys, with Hugging Face's defaults filled in.
        given: What it states of single blocks, by `dense_settings`.
        where: File named in errors.

    Raises:
        InputError: A block that does not exist, or a key that no block can have of its own.
    """
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
            raise InputError(
                f"{where}: per_layer_config of block {index}",
                field=unknown[0],
                value=own[unknown[0]],
                allowed=f"the same in all blocks; only {', '.join(_PER_BLOCK_KINDS)} may differ",
            )
        check_kinds(own, _PER_BLOCK_KINDS, f"{where}: malformed per_layer_config: block {index}")
        block = BlockShape(index, **{ours: (plain | own)[key] for key, ours in _PER_BLOCK.items()})
        block = replace(block, kv_groups=0) if index in keyless else block
        blocks.append(replace(block, kv_groups=0, has_attention=False) if "skip" in own else block)
    return ModelShape(config["vocab_size"], tuple(blocks))


def _check_normalizer(normalizer: Any, where: str) -> None:
    """Refuse replacements that blow a text up, and a table of characters that tokenizers would panic at."""
    growth, parts = 1, [normalizer]
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
            with as_input_error(f"{where}: the normalizer's precompiled_charsmap is damaged"):
                table = base64.b64decode(part["precompiled_charsmap"], validate=True)
                (size,) = struct.unpack_from(f"<I{struct.unpack_from('<I', table)[0]}x", table)
                table[4 + size :].decode("utf-8")
    if growth > _MOST_GROWTH:
        raise InputError(f"{where}: the normalizer makes a text up to {growth} times as long")


def _ropes(stated: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rope parameters: what is said of all blocks, and what of each kind (`full_attention`, `sliding_attention`)."""
    of_kinds = [
        name for name, part in stated.items() if name.endswith("_attention") and isinstance(part, dict)
    ]
    return [
        {name: part for name, part in stated.items() if name not in of_kinds},
        *(stated[name] for name in of_kinds),
    ]


def _contradictions(settings: Mapping[str, Any], row: Any) -> Iterator[str]:
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
    if keys and values and values % keys:
        yield f"linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}"
    for key in PER_BLOCK_LISTS:
        count = layers if said(key) is None else len(settings[key])
        # transformers reads no further in the second than there are blocks.
        if layers and count != layers and (key != "no_rope_layers" or count < layers):
            yield f"{key} has {count} entries for {layers} blocks"
    if heads and hidden:
        yield from _misshapen_ropes(settings, head_dim or hidden // heads)
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


def _misshapen_ropes(settings: Mapping[str, Any], head_dim: int) -> Iterator[str]:
    for key in ("rope_parameters", "rope_scaling"):
        rope = settings.get(key) or {}
        share = rope.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
        turned = int(head_dim * share)
        if turned < 2 or turned % 2:
            yield f"partial_rotary_factor {share} of head_dim {head_dim} is no even number"
        for name in ("short_factor", "long_factor"):
            if rope.get(name) is not None and len(rope[name]) != turned // 2:
                yield f"{name} has {len(rope[name])} entries for {turned // 2} frequencies"
