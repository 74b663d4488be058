"""Qwen 3.5's text models: a gated delta net in attention's place in most blocks, and a gate on attention."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cfsp.models.families.row import (
    BIAS_OF_ATTENTION,
    Count,
    Family,
    HeadNorms,
    KernelLength,
    Layout,
    Mixer,
    Size,
)

_SIZES = ("ssm.group_count", "ssm.time_step_rank", "ssm.state_size", "full_attention_interval")
FAMILIES = (
    Family(
        "qwen3_5_text",
        (Layout("qwen35"),),
        release=5,
        folders=("qwen3_5",),
        kinds={
            "linear_conv_kernel_dim": KernelLength,
            "linear_key_head_dim linear_value_head_dim": Size,
            "linear_num_key_heads linear_num_value_heads": Size,
        },
        mixer=Mixer(
            "linear_attn",
            "linear_attention",
            "a gated delta net",
            {
                "key_heads": "linear_num_key_heads",
                "value_heads": "linear_num_value_heads",
                "key_head_dim": "linear_key_head_dim",
                "value_head_dim": "linear_value_head_dim",
                "length": "linear_conv_kernel_dim",
            },
            step_key="full_attention_interval",
        ),
        head_norms=HeadNorms(),
        bias_settings=BIAS_OF_ATTENTION,
        norm_offset=1.0,
        gated=True,
        partial_rope=True,
        left_out=("mtp.",),
        gguf_settings={
            "linear_conv_kernel_dim": "ssm.conv_kernel",
            "linear_num_key_heads": "ssm.group_count",
            "linear_num_value_heads": "ssm.time_step_rank",
            # llama.cpp knows only heads of one size.
            **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), "ssm.state_size"),
        },
        gguf_kinds={
            "ssm.conv_kernel": KernelLength,
            **dict.fromkeys(_SIZES, Annotated[int, Field(ge=1, lt=2**16)]),
            "attention.recurrent_layers": list[bool | int],
            "rope.dimension_sections": list[Count],
        },
    ),
)
