"""Model types that are another one but for factors, order or names of weights: they are loaded as that one.

Granite is a Llama with four factors: embeddings times m_e, what attention and FFN add times m_r, attention's scores
times m_a in place of 1 / sqrt(head_dim), logits over s. With

    E' = m_e E    o' = m_r o    down' = m_r down    q' = m_a sqrt(head_dim) q

and norm' = norm / (m_e s) of the last norm where the output matrix is E, else head' = head / s, a Llama computes the
same but for rounding. So it is pruned, exported and run as one. Granite 4's dense models are Granites whose FFN has
other names. ERNIE 4.5 rotates rows 2i and 2i + 1 of a head together, where a Llama rotates i and i + head_dim / 2:
another order of the rows of q and k. Phi-3 stores q, k and v in one matrix, gate and up in another; what it does to
its rope is in `partial_rope`. Ministral 3 is a Mistral up to the context that its rope is made for, and loaded as one
of that context: beyond it queries grow with their position, which a Mistral's do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.rope import partial_rope, partial_rows, split_pairs, stated_rope, yarn_magnitude
from cfsp.models.text_settings import TEXT_PARTS
from cfsp.models.weights import OUTPUT_MATRIX, model_from_weights
from cfsp.reading import read_json_object

_OF_THE_TYPE = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
"""Settings that say which type it is, or were made for it."""
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
_YARN = ("rope_type", "factor", "beta_fast", "beta_slow", "truncate")
Settings = Mapping[str, Any]
Factors = Mapping[str, float]
"""Last part of a module's name -> what its weight and bias are multiplied by."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fold:
    """A model type that is loaded as another one.

    Attributes:
        target: That one; the same, of a model whose settings can be said in a way that has one meaning.
        factors: From all settings to the factors; those of `gguf_keys` may be 0 or None, which stands for what the
            other has.
        settings: From all settings to those of the other type that do not have the same name and meaning in both.
        tensors: From a parameter's name in a block, the parameter, and all settings, to the other type's.
        obstacle: From all settings to why such a model is none of the other type; None where it is.
        gguf_name: llama.cpp's architecture whose files are read as this model type; None where none are.
        gguf_keys: Settings of the factors -> where a GGUF file has them, behind the architecture's name.
        applies: From all settings to whether such a model is loaded as the other one at all.
    """

    target: str
    factors: Callable[[Settings], Factors] = lambda _: {}
    settings: Callable[[Settings], Settings] = lambda _: {}
    tensors: Callable[[str, torch.Tensor, Settings], Tensors] = lambda name, tensor, _: {name: tensor}
    obstacle: Callable[[Settings], str | None] = lambda _: None
    gguf_name: str | None = None
    gguf_keys: Mapping[str, str] = field(default_factory=dict)
    applies: Callable[[Settings], bool] = lambda _: True


def _granite(settings: Settings) -> Factors:
    embedding, residual, scaling = (
        settings[name] or 1.0 for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    )
    scores = settings["attention_multiplier"]
    last = {"norm": 1 / embedding / scaling} if settings["tie_word_embeddings"] else {"lm_head": 1 / scaling}
    blocks = {
        "o_proj": residual,
        "down_proj": residual,
        "q_proj": scores * _head_dim(settings) ** 0.5 if scores else 1.0,
    }
    return {"embed_tokens": embedding} | last | blocks


def _head_dim(settings: Settings) -> int:
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def _heads(settings: Settings, name: str) -> int:
    """Heads whose rows a parameter of q or k has; 0 of any other."""
    heads: int = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    return {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2], 0)


def _granite4_tensors(name: str, tensor: torch.Tensor, _: Settings) -> Tensors:
    if name.endswith(".shared_mlp.input_linear.weight"):
        return _split(name, "shared_mlp.input_linear", tensor, {"mlp.gate_proj": 1, "mlp.up_proj": 1})
    return {name.replace(".shared_mlp.output_linear.", ".mlp.down_proj."): tensor}


def _granite4_obstacle(settings: Settings) -> str | None:
    if settings.get("num_local_experts", 1):
        return "experts"
    if set(settings.get("layer_types") or ("mamba",)) - {"attention", "full_attention"}:
        return "blocks with a Mamba layer"
    return None if settings.get("position_embedding_type") == "rope" else "attention without a rope"


def _ernie_tensors(name: str, tensor: torch.Tensor, settings: Settings) -> Tensors:
    return {name: split_pairs(tensor, heads) if (heads := _heads(settings, name)) else tensor}


def _phi3_settings(settings: Settings) -> Settings:
    window, context = settings.get("sliding_window"), settings["max_position_embeddings"]
    rope = partial_rope(stated_rope(settings), _head_dim(settings), context)
    return {**rope, "sliding_window": window if window and window < context else None}


def _phi3_tensors(name: str, tensor: torch.Tensor, settings: Settings) -> Tensors:
    if name.endswith(".mlp.gate_up_proj.weight"):
        return _split(name, "gate_up_proj", tensor, {"gate_proj": 1, "up_proj": 1})
    if not name.endswith(".self_attn.qkv_proj.weight"):
        return {name: tensor}
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    parts = _split(name, "qkv_proj", tensor, {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads})
    rope, context = stated_rope(settings), settings["max_position_embeddings"]
    return {
        part: partial_rows(rows, n, rope, context) if (n := _heads(settings, part)) else rows
        for part, rows in parts.items()
    }


def _split(name: str, module: str, tensor: torch.Tensor, parts: Mapping[str, int]) -> Tensors:
    """The rows of a matrix as several matrices, in the proportion of the numbers."""
    unit = len(tensor) // sum(parts.values())
    rows = torch.split(tensor, [unit * count for count in parts.values()])
    return {name.replace(module, part): own for part, own in zip(parts, rows, strict=True)}


def _ministral3_settings(settings: Settings) -> Settings:
    rope, context = stated_rope(settings), settings["max_position_embeddings"]
    original = int(rope.get("original_max_position_embeddings") or context)
    scaling = None
    if rope["rope_type"] == "yarn":
        kept = {key: rope[key] for key in _YARN if rope.get(key) is not None}
        scaling = {
            **kept,
            "attention_factor": yarn_magnitude(rope),
            "original_max_position_embeddings": original,
        }
    return {
        "max_position_embeddings": min(original, context),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
    }


def _lfm2_width(settings: Settings) -> int:
    """What transformers makes of a width that it adjusts."""
    width = int(2 * settings["intermediate_size"] / 3)
    if settings["block_ffn_dim_multiplier"] is None:
        return width
    multiple = settings["block_multiple_of"]
    return int(multiple * -(-int(settings["block_ffn_dim_multiplier"] * width) // multiple))


_GRANITE_KEYS = MappingProxyType(
    {
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "attention_multiplier": "attention.scale",
        "logits_scaling": "logit_scale",
    }
)
FOLDS: Mapping[str, Fold] = MappingProxyType(
    {
        "granite": Fold("llama", _granite, gguf_name="granite", gguf_keys=_GRANITE_KEYS),
        "granitemoehybrid": Fold(
            "llama",
            _granite,
            settings=lambda settings: {"intermediate_size": settings["shared_intermediate_size"]},
            tensors=_granite4_tensors,
            obstacle=_granite4_obstacle,
        ),
        "ernie4_5": Fold(
            "llama",
            settings=lambda settings: dict.fromkeys(
                ("attention_bias", "mlp_bias"), bool(settings["use_bias"])
            ),
            tensors=_ernie_tensors,
            gguf_name="ernie4_5",
        ),
        "phi3": Fold("mistral", settings=_phi3_settings, tensors=_phi3_tensors),
        "ministral3": Fold("mistral", settings=_ministral3_settings),
        "lfm2": Fold(
            "lfm2",
            applies=lambda settings: settings.get("block_auto_adjust_ff_dim", True),
            settings=lambda settings: {
                "intermediate_size": _lfm2_width(settings),
                "block_auto_adjust_ff_dim": False,
            },
        ),
    }
)


def is_folded(folder: Path) -> bool:
    """Whether a folder's model is loaded as one of another type, or a part of what it holds."""
    file = folder / "config.json"
    settings = read_json_object(file) if file.is_file() else {}
    return str(settings.get("model_type")) in TEXT_PARTS or fold_of(settings) is not None


def fold_of(settings: Settings) -> Fold | None:
    """How a model of these settings is loaded as another one; None of one that is loaded as it is."""
    fold = FOLDS.get(str(settings.get("model_type")))
    return fold if fold is not None and fold.applies(settings) else None


def require_foldable(settings: Settings, where: str) -> None:
    """Raise InputError for a model of a type in FOLDS that is none of the type which these are loaded as.

    Args:
        settings: Of config.json.
        where: File named in the error.
    """
    fold = fold_of(settings)
    if fold is not None and (obstacle := fold.obstacle(settings)):
        raise InputError(
            f"{where}: {settings['model_type']} models with {obstacle} are not supported",
            allowed=f"those that are a {fold.target} but for names and factors",
        )


def folded_config(config: Any) -> Any:
    """The configuration of the other type; a configuration of any type that is none in FOLDS is returned."""
    settings = config.to_dict()
    fold = fold_of(settings)
    if fold is None:
        return config
    changed = fold.settings(settings)
    known = transformers.CONFIG_MAPPING[fold.target]().to_dict().keys() - {*_OF_THE_TYPE}
    if not changed.keys().isdisjoint(_ROPE):
        known -= {*_ROPE}
    kept = {key: value for key, value in settings.items() if key in known}
    return transformers.AutoConfig.for_model(fold.target, **{**kept, **changed})


def folded(model: Any, where: str) -> Any:
    """A model of the other type that computes what this one does, in eval mode; this one is of no more use.

    Args:
        model: A causal LM of a type in FOLDS.
        where: File or folder named in errors.
    """
    fold, settings = FOLDS[model.config.model_type], model.config.to_dict()
    config = folded_config(model.config)
    factors = fold.factors(settings)
    check_factors(factors, where)
    tied = settings["tie_word_embeddings"]
    weights: Tensors = {}
    for name, tensor in model.state_dict().items():
        if not tied or name != OUTPUT_MATRIX:
            weights |= fold.tensors(name, tensor, settings)
    for name, tensor in weights.items():
        times_(name, tensor, factors)
    made = model_from_weights(config, weights, dtype=model.dtype, where=where)
    made.generation_config = model.generation_config
    return made


def times_(name: str, tensor: torch.Tensor, factors: Factors) -> None:
    """Multiply a parameter, by its name, in its place; one without a factor is left alone."""
    factor = factors.get(name.split(".")[-2])
    if factor is not None:
        with torch.no_grad():
            tensor.mul_(factor)


def check_factors(factors: Factors, where: str) -> None:
    """Raise InputError for a factor that no model can have."""
    for name, factor in factors.items():
        if not 1e-6 < factor < 1e6:
            raise InputError(
                f"{where}: {name} would be multiplied by this", value=factor, allowed="1e-6 to 1e6"
            )
