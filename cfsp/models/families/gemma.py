"""Gemma 3 and 4: norms behind attention and MLP, windows, and in Gemma 4 much that no other family has."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cfsp.models.families.row import (
    BIAS_OF_ATTENTION,
    NORMS_BEHIND,
    BlockInputs,
    Count,
    Family,
    HeadNorms,
    Layout,
    Positive,
    SharedKeys,
    Size,
)

FAMILIES = (
    Family(
        "gemma3_text",
        (Layout("gemma3", activation="gelu_tanh", window_base=True, full_step=6),),
        folders=("gemma3",),
        kinds={
            "rope_local_base_freq query_pre_attn_scalar": Positive | None,
            "hidden_activation": str,
        },
        head_norms=HeadNorms(),
        bias_settings=BIAS_OF_ATTENTION,
        ffn_norm="pre_feedforward_layernorm",
        added_norms=NORMS_BEHIND,
        norm_offset=1.0,
        scaled_embedding=True,
        activation_setting="hidden_activation",
        window_rope_setting="rope_local_base_freq",
        scale_setting="query_pre_attn_scalar",
    ),
    Family(
        "gemma4_text",
        (
            Layout(
                "gemma4",
                per_layer_sizes=True,
                rope_factors=True,
                activation="gelu_tanh",
                window_base=True,
                full_step=1,
                plain_scores=True,
                own_heads=True,
                shares_keys=True,
                needs_window=True,
                takes_inputs=True,
                caps_logits=True,
            ),
        ),
        release=5,
        folders=("gemma4",),
        kinds={
            "global_head_dim num_global_key_value_heads": Annotated[int, Field(ge=2)] | None,
            "hidden_size_per_layer_input num_kv_shared_layers": Annotated[int, Field(ge=0)] | None,
            "use_double_wide_mlp enable_moe_block attention_k_eq_v": bool | None,
            "vocab_size_per_layer_input": Size,
            "hidden_activation": str,
        },
        head_norms=HeadNorms(),
        bias_settings=BIAS_OF_ATTENTION,
        ffn_norm="pre_feedforward_layernorm",
        added_norms=NORMS_BEHIND,
        scaled_embedding=True,
        activation_setting="hidden_activation",
        plain_window_rope=True,
        plain_scores=True,
        own_heads="global_head_dim",
        cap_setting="final_logit_softcapping",
        scalar="layer_scalar",
        block_inputs=BlockInputs(),
        shared_keys=SharedKeys(),
        refused={
            "enable_moe_block": "experts beside the FFN",
            "attention_k_eq_v": "values that are the keys",
        },
        gguf_settings={
            "hidden_size_per_layer_input": "embedding_length_per_layer_input",
            "num_kv_shared_layers": "attention.shared_kv_layers",
            "global_head_dim": "attention.key_length",
        },
        gguf_kinds={"embedding_length_per_layer_input attention.shared_kv_layers": Count},
    ),
)
