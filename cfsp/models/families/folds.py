"""Model types that are loaded as a Llama or a Mistral, which computes the same.

Granite is a Llama with four factors: embeddings times m_e, what attention and FFN add times m_r, attention's scores
times m_a in place of 1 / sqrt(head_dim), logits over s. With

    E' = m_e E    o' = m_r o    down' = m_r down    q' = m_a sqrt(head_dim) q

and norm' = norm / (m_e s) of the last norm where the output matrix is E, else head' = head / s, a Llama computes the
same but for rounding. Granite 4's dense models are Granites whose FFN has other names. ERNIE 4.5 rotates rows 2i and
2i + 1 of a head together, where a Llama rotates i and i + head_dim / 2: another order of the rows of q and k. Phi-3
stores q, k and v in one matrix, gate and up in another; what it does to its rope is in `partial_rope`. Ministral 3 is a
Mistral up to the context that its rope is made for, and loaded as one of that context: beyond it queries grow with
their position, which a Mistral's do not.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cfsp.models.families.row import Fold, Positive, Settings, Size, head_dim_of, heads_of, split_rows
from cfsp.models.rope import partial_rope, partial_rows, split_pairs, stated_rope, yarn_magnitude

_YARN = ("rope_type", "factor", "beta_fast", "beta_slow", "truncate")
_MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_GRANITE_KINDS = dict.fromkeys(_MULTIPLIERS, Annotated[float, Field(gt=1e-6, lt=1e6)])
_SCALE = Annotated[float, Field(ge=0, lt=1e6)]  # 0 stands for none


def _granite(settings: Settings) -> dict[str, float]:
    embedding, residual, scaling = (
        settings[name] or 1.0 for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    )
    scores = settings["attention_multiplier"]
    last = {"norm": 1 / embedding / scaling} if settings["tie_word_embeddings"] else {"lm_head": 1 / scaling}
    blocks = {
        "o_proj": residual,
        "down_proj": residual,
        "q_proj": scores * head_dim_of(settings) ** 0.5 if scores else 1.0,
    }
    return {"embed_tokens": embedding} | last | blocks


def _granite4_tensors(name: str, tensor: Any, _: Settings) -> dict[str, Any]:
    if name.endswith(".shared_mlp.input_linear.weight"):
        return split_rows(name, "shared_mlp.input_linear", tensor, {"mlp.gate_proj": 1, "mlp.up_proj": 1})
    return {name.replace(".shared_mlp.output_linear.", ".mlp.down_proj."): tensor}


def _granite4_obstacle(settings: Settings) -> str | None:
    if settings.get("num_local_experts", 1):
        return "experts"
    if set(settings.get("layer_types") or ("mamba",)) - {"attention", "full_attention"}:
        return "blocks with a Mamba layer"
    return None if settings.get("position_embedding_type") == "rope" else "attention without a rope"


def _ernie_tensors(name: str, tensor: Any, settings: Settings) -> dict[str, Any]:
    return {name: split_pairs(tensor, heads) if (heads := heads_of(settings, name)) else tensor}


def _phi3_settings(settings: Settings) -> Settings:
    window, context = settings.get("sliding_window"), settings["max_position_embeddings"]
    rope = partial_rope(stated_rope(settings), head_dim_of(settings), context)
    return {**rope, "sliding_window": window if window and window < context else None}


def _phi3_tensors(name: str, tensor: Any, settings: Settings) -> dict[str, Any]:
    if name.endswith(".mlp.gate_up_proj.weight"):
        return split_rows(name, "gate_up_proj", tensor, {"gate_proj": 1, "up_proj": 1})
    if not name.endswith(".self_attn.qkv_proj.weight"):
        return {name: tensor}
    heads = settings["num_attention_heads"]
    kv_heads = settings.get("num_key_value_heads") or heads
    parts = split_rows(name, "qkv_proj", tensor, {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads})
    rope, context = stated_rope(settings), settings["max_position_embeddings"]
    return {
        part: partial_rows(rows, n, rope, context) if (n := heads_of(settings, part)) else rows
        for part, rows in parts.items()
    }


def _ministral3_settings(settings: Settings) -> Settings:
    rope, context = stated_rope(settings), settings["max_position_embeddings"]
    original = int(rope.get("original_max_position_embeddings") or context)
    scaling = None
    if rope["rope_type"] == "yarn":
        kept = {key: rope[key] for key in _YARN if rope.get(key) is not None}
        magnitude = yarn_magnitude(rope)
        scaling = {**kept, "attention_factor": magnitude, "original_max_position_embeddings": original}
    return {
        "max_position_embeddings": min(original, context),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
    }


FOLDS = (
    Fold(
        "granite",
        "llama",
        _granite,
        kinds=_GRANITE_KINDS,
        gguf_name="granite",
        gguf_keys=_MULTIPLIERS,
        gguf_kinds={**dict.fromkeys(_MULTIPLIERS.values(), _SCALE), "logit_scale": Positive},
    ),
    Fold(
        "granitemoehybrid",
        "llama",
        _granite,
        settings=lambda settings: {"intermediate_size": settings["shared_intermediate_size"]},
        tensors=_granite4_tensors,
        obstacle=_granite4_obstacle,
        kinds={
            **_GRANITE_KINDS,
            "shared_intermediate_size": Size,
            "num_local_experts": Annotated[int, Field(ge=0)] | None,
            "position_embedding_type": str | None,
        },
    ),
    Fold(
        "ernie4_5",
        "llama",
        settings=lambda settings: dict.fromkeys(("attention_bias", "mlp_bias"), bool(settings["use_bias"])),
        tensors=_ernie_tensors,
        kinds={"use_bias": bool | None},
        gguf_name="ernie4_5",
    ),
    Fold("phi3", "mistral", settings=_phi3_settings, tensors=_phi3_tensors),
    Fold("ministral3", "mistral", settings=_ministral3_settings),
)
