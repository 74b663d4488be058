"""LFM 2: a short convolution in attention's place in most blocks."""

from __future__ import annotations

from cfsp.models.families.row import (
    Family,
    Fold,
    HeadNorms,
    KernelLength,
    Layout,
    Mixer,
    Positive,
    Settings,
    Size,
)


def _adjusted(settings: Settings) -> Settings:
    """What transformers makes of a width that it adjusts."""
    width, factor = int(2 * settings["intermediate_size"] / 3), settings["block_ffn_dim_multiplier"]
    if factor is not None:
        multiple = settings["block_multiple_of"]
        width = int(multiple * -(-int(factor * width) // multiple))
    return {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


FAMILIES = (
    Family(
        "lfm2",
        (Layout("lfm2", free_head_dim=False),),
        kinds={
            "conv_L_cache": KernelLength,
            "conv_bias block_auto_adjust_ff_dim tie_embedding": bool,
            "block_ff_dim block_multiple_of": Size,
            "block_ffn_dim_multiplier": Positive | None,
            "full_attn_idxs": list[int] | None,
        },
        output="out_proj",
        mixer=Mixer("conv", "conv", "a short convolution", {"length": "conv_L_cache"}),
        mlp="feed_forward",
        gate="w1",
        up="w3",
        down="w2",
        head_norms=HeadNorms("q_layernorm", "k_layernorm"),
        attention_norm="operator_norm",
        ffn_norm="ffn_norm",
        last_norm="embedding_norm",
        epsilon_setting="norm_eps",
        activation_setting="",
        gguf_settings={"conv_L_cache": "shortconv.l_cache", "block_auto_adjust_ff_dim": False},
        gguf_kinds={"shortconv.l_cache": KernelLength},
    ),
)
FOLDS = (
    Fold(
        "lfm2",
        "lfm2",
        settings=_adjusted,
        applies=lambda settings: settings.get("block_auto_adjust_ff_dim", True),
    ),
)
