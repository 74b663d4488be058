"""Llama and the families that are it but for norms, biases, windows, or blocks without RoPE."""

from __future__ import annotations

from dataclasses import replace

from cfsp.models.families.row import (
    BIAS_OF_ATTENTION,
    BIASES,
    NORMS_BEHIND,
    QKV_LAYERS,
    Family,
    HeadNorms,
    Layout,
)

_ALL_LINEAR = QKV_LAYERS | {"o_proj", "gate_proj", "up_proj", "down_proj"}
_LLAMA = Layout("llama", interleaved_rope=True, biases=_ALL_LINEAR, rope_factors=True)
# Takes sizes for each block, and computes what a llama, a mistral and a qwen2 compute.
_DECI = replace(_LLAMA, architecture="deci", per_layer_sizes=True, attention_free=True)
# The same for a qwen3 with tied embeddings.
_OPENELM = Layout("openelm", per_layer_sizes=True, fused_qkv=True, untied=False)

# No norm before attention and MLP, but one behind each, and one of all heads' queries together.
_OLMO2 = Family(
    "olmo2",
    (Layout("olmo2", biases=QKV_LAYERS, free_head_dim=False, tied=False, full_step=4),),
    head_norms=HeadNorms(joint=True),
    bias_settings=BIAS_OF_ATTENTION,
    attention_norm="",
    ffn_norm="",
    added_norms=NORMS_BEHIND,
)
_EXAONE4 = Layout(
    "exaone4",
    rope_factors=True,
    free_head_dim=False,
    rotates_windowed=True,
    full_step=4,
    windowed_depth=64,
)

FAMILIES = (
    Family("llama", (_LLAMA, _DECI), bias_settings=BIASES),
    Family("mistral", (_LLAMA, _DECI), folders=("mistral3",)),
    Family("qwen2", (Layout("qwen2", biases=QKV_LAYERS, free_head_dim=False), _DECI)),
    Family(
        "qwen3",
        (Layout("qwen3", biases=QKV_LAYERS), _OPENELM),
        head_norms=HeadNorms(),
        bias_settings=BIAS_OF_ATTENTION,
    ),
    Family(
        "smollm3",
        (Layout("smollm3", interleaved_rope=True, biases=QKV_LAYERS, unrotated_step=4),),
        bias_settings=BIASES,
        rotated_setting="no_rope_layers",  # 1 if there is RoPE, for all its name
    ),
    _OLMO2,
    replace(_OLMO2, model_type="olmo3", plain_window_rope=True),
    Family(
        "exaone4",
        (_EXAONE4,),
        head_norms=HeadNorms(),
        rotates_windowed=True,
        attention_norm="",
        ffn_norm="",
        added_norms=NORMS_BEHIND,
    ),
    # Queries and keys are normed after they are rotated.
    Family(
        "hunyuan_v1_dense",
        (Layout("hunyuan-dense", biases=QKV_LAYERS),),
        head_norms=HeadNorms("query_layernorm", "key_layernorm", after_rope=True),
        bias_settings=BIAS_OF_ATTENTION,
        alpha_rope=True,
    ),
)
