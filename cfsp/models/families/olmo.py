"""OLMo 2 and 3: no norm before attention and MLP, but one behind each, and one of all heads' queries together."""

from __future__ import annotations

from dataclasses import replace

from cfsp.models.families.row import BIAS_OF_ATTENTION, NORMS_BEHIND, QKV_LAYERS, Family, HeadNorms, Layout

_OLMO2 = Family(
    "olmo2",
    (Layout("olmo2", biases=QKV_LAYERS, free_head_dim=False, tied=False, full_step=4),),
    head_norms=HeadNorms(joint=True),
    bias_settings=BIAS_OF_ATTENTION,
    attention_norm="",
    ffn_norm="",
    added_norms=NORMS_BEHIND,
)
FAMILIES = (_OLMO2, replace(_OLMO2, model_type="olmo3", plain_window_rope=True))
