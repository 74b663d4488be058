"""Hunyuan's dense models: queries and keys are normed after they are rotated."""

from __future__ import annotations

from cfsp.models.families.row import BIAS_OF_ATTENTION, QKV_LAYERS, Family, HeadNorms, Layout

FAMILIES = (
    Family(
        "hunyuan_v1_dense",
        (Layout("hunyuan-dense", biases=QKV_LAYERS),),
        head_norms=HeadNorms("query_layernorm", "key_layernorm", after_rope=True),
        bias_settings=BIAS_OF_ATTENTION,
        alpha_rope=True,
    ),
)
