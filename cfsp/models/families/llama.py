"""Llama and the families that are it but for norms of heads, biases, or blocks that do not rotate."""

from __future__ import annotations

from dataclasses import replace

from cfsp.models.families.row import BIAS_OF_ATTENTION, BIASES, QKV_LAYERS, Family, HeadNorms, Layout

_ALL_LINEAR = QKV_LAYERS | {"o_proj", "gate_proj", "up_proj", "down_proj"}
_LLAMA = Layout("llama", interleaved_rope=True, biases=_ALL_LINEAR, rope_factors=True)
# Takes sizes for each block, and computes what a llama, a mistral and a qwen2 compute.
_DECI = replace(_LLAMA, architecture="deci", per_layer_sizes=True, attention_free=True)
# The same for a qwen3 with tied embeddings.
_OPENELM = Layout("openelm", per_layer_sizes=True, fused_qkv=True, untied=False)

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
        rotated_setting="no_rope_layers",  # 1 where there is a rope, for all its name
    ),
)
