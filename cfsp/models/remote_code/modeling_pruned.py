"""Causal language models whose decoder blocks have FFNs and attentions of different sizes, and some no attention.

config.json says so as transformers 5 documents it,

    "per_layer_config": {"0": {"intermediate_size": 1024, "num_key_value_heads": 2}, "1": {"skip": ["attention"]}, ...}

A block with fewer key-value heads has fewer query heads in proportion: each key-value head is read by as many as in the
whole model, num_attention_heads / num_key_value_heads. (transformers 5 refuses a num_attention_heads for each block.)
Everything else is the model of the same `model_type`. This file is self-contained, stored beside
the weights and used by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, under
transformers 4 and 5 alike.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    Exaone4ForCausalLM,
    Gemma3ForCausalLM,
    HunYuanDenseV1ForCausalLM,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Olmo2ForCausalLM,
    Olmo3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)

_PRUNED = ("intermediate_size", "num_key_value_heads", "skip")


def layer_sizes(config: Any, name: str) -> list[int]:
    """A size of every block that a configuration asks for, such as its intermediate_size, first to last.

    transformers 5 offers `per_layer_config` as a sequence of configurations, transformers 4 as a mapping.
    """
    layers = getattr(config, "per_layer_config", None)
    if layers is None or isinstance(layers, Mapping):
        given = {int(index): entry for index, entry in (layers or {}).items()}
        wrong = sorted(set(given) - set(range(config.num_hidden_layers)))
        if wrong:
            raise ValueError(f"per_layer_config names blocks that do not exist: {wrong}")
        return [
            given.get(index, {}).get(name) or getattr(config, name)
            for index in range(config.num_hidden_layers)
        ]
    return [getattr(layer, name) for layer in layers]


def layers_without_attention(config: Any) -> set[int]:
    """Blocks that a configuration wants without attention."""
    layers = getattr(config, "per_layer_config", None)
    if layers is None or isinstance(layers, Mapping):
        return {int(index) for index, entry in (layers or {}).items() if "attention" in entry.get("skip", ())}
    return {index for index, layer in enumerate(layers) if "attention" in getattr(layer, "skip", ())}


def per_layer_settings(
    widths: Sequence[int], kv_heads: Sequence[int], most: int
) -> dict[str, dict[str, Any]]:
    """`per_layer_config` of blocks of these widths and key-value heads, 0 being no attention.

    Args:
        widths: intermediate_size of every block.
        kv_heads: num_key_value_heads of every block.
        most: num_key_value_heads of the configuration, which a block that has as many does not repeat.
    """
    return {
        str(index): {"intermediate_size": width}
        | ({} if heads else {"skip": ["attention"]})
        | ({"num_key_value_heads": heads} if heads not in (0, most) else {})
        for index, (width, heads) in enumerate(zip(widths, kv_heads, strict=True))
    }


def joined_settings(theirs: Any, ours: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`per_layer_config` with what transformers states of single blocks of this model type, and `ours`."""
    stated = {str(int(index)): dict(entry) for index, entry in (theirs or {}).items()}
    return {index: {**stated.get(index, {}), **entry} for index, entry in ours.items()}


def stated_settings(config: Any) -> dict[str, dict[str, Any]]:
    """What transformers states of single blocks of a model type under `per_layer_config`."""
    stated = config.to_dict().get("per_layer_config") or {}
    entries = {
        str(int(index)): {name: value for name, value in entry.items() if name not in _PRUNED}
        for index, entry in stated.items()
    }
    return {index: entry for index, entry in entries.items() if entry}


def uniform_config(config: Any, width: int) -> Any:
    """A copy of a configuration in which every block has the same width, and heads as the configuration says."""
    plain = copy.deepcopy(config)
    if isinstance(getattr(type(plain), "per_layer_config", None), property):
        plain.per_layer_config = stated_settings(config) or None
    else:
        plain.__dict__.pop("per_layer_config", None)
    plain.intermediate_size = width
    if getattr(plain, "use_double_wide_mlp", False):
        plain.use_double_wide_mlp = False  # of some blocks it would be twice that
    return plain


def with_kv_heads(attention: Any, config: Any, kv_heads: int) -> Any:
    """A new attention of the same kind with so many key-value heads, and the query heads that read them."""
    smaller = copy.deepcopy(config)
    smaller.head_dim = attention.head_dim
    smaller.num_key_value_heads = kv_heads
    smaller.num_attention_heads = kv_heads * attention.num_key_value_groups
    made = type(attention)(smaller, attention.layer_idx)
    made.config = config  # of which it reads what is the same in all blocks, and may be changed
    return made


class NoAttention(nn.Module):
    """In the place of a block's attention: it adds nothing."""

    # Asked by blocks and models of transformers 4 that choose a rope and a mask by it.
    is_sliding, attention_type = False, "full_attention"

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """(zeros, no attention weights)."""
        return torch.zeros_like(hidden_states), None


def leave_out_attention(layer: Any, norms: Sequence[str]) -> None:
    """Take a block's attention out, and the norms before and after it."""
    layer.self_attn = NoAttention()
    for name in norms:
        setattr(layer, name, nn.Identity())


def kv_heads_of(attention: Any, otherwise: int) -> int:
    """Key-value heads of a block's attention; `otherwise` in a block that never had one, or no keys of its own."""
    if isinstance(attention, NoAttention):
        return 0
    return (
        otherwise
        if not hasattr(attention, "k_proj")
        else attention.k_proj.weight.shape[0] // attention.head_dim
    )


class PerLayerWidths:
    """Builds each block's FFN and attention as large as the configuration says, or none; saves what it has.

    The model's own `config` is uniform, with the widest block as its `intermediate_size` and the heads that the dense
    model has: transformers 5 refuses to read a per-layer value from a configuration, and much code reads these.
    """

    # Makes transformers store this file, and name it in config.json, whenever the model is saved.
    _auto_class = "AutoModelForCausalLM"
    _of_attention: tuple[str, ...] = ("input_layernorm",)
    """What else of a block has nothing to do where it does not attend."""
    _ffn: tuple[str, str] = ("mlp", "down_proj")
    """Of a block its FFN, and of that the last matrix."""
    _told: tuple[str, ...] = ()
    """What an FFN is told beside the configuration, by the names of its arguments."""
    model: Any
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        widths, kv_heads = (layer_sizes(config, n) for n in ("intermediate_size", "num_key_value_heads"))
        without = layers_without_attention(config)
        super().__init__(uniform_config(config, max(widths)), *args, **kwargs)  # type: ignore[call-arg]
        for index, layer in enumerate(self.model.layers):
            if widths[index] != max(widths):
                mlp = type(getattr(layer, self._ffn[0]))
                known = {"intermediate_size": widths[index], "layer_idx": index}
                arguments = {name: known[name] for name in self._told}
                setattr(layer, self._ffn[0], mlp(uniform_config(self.config, widths[index]), **arguments))
            if index in without:
                leave_out_attention(layer, self._of_attention)
            elif kv_heads[index] != self.config.num_key_value_heads:
                layer.self_attn = with_kv_heads(layer.self_attn, self.config, kv_heads[index])

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, with what differs in config.json and this file beside the weights."""
        ffn, down = self._ffn
        widths = [getattr(getattr(layer, ffn), down).weight.shape[1] for layer in self.model.layers]
        uniform = self.config
        kv_heads = [
            kv_heads_of(getattr(layer, "self_attn", None), uniform.num_key_value_heads)
            for layer in self.model.layers
        ]
        stored = uniform_config(uniform, max(widths))
        if len(set(widths)) > 1 or set(kv_heads) != {uniform.num_key_value_heads}:
            ours = per_layer_settings(widths, kv_heads, uniform.num_key_value_heads)
            stored.per_layer_config = joined_settings(stated_settings(uniform), ours)
        self.config = stored
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.config = uniform


class PrunedLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):  # type: ignore[misc]
    """Llama with blocks of different widths."""


class PrunedMistralForCausalLM(PerLayerWidths, MistralForCausalLM):  # type: ignore[misc]
    """Mistral with blocks of different widths."""


class PrunedQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen 2 with blocks of different widths."""


class PrunedQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen 3 with blocks of different widths."""


class PrunedSmolLM3ForCausalLM(PerLayerWidths, SmolLM3ForCausalLM):  # type: ignore[misc]
    """SmolLM 3 with blocks of different widths."""


class PrunedGemma3ForCausalLM(PerLayerWidths, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma 3 with blocks of different widths."""

    _of_attention = ("input_layernorm", "post_attention_layernorm")


class PrunedOlmo2ForCausalLM(PerLayerWidths, Olmo2ForCausalLM):  # type: ignore[misc]
    """OLMo 2 with blocks of different widths."""

    _of_attention = ("post_attention_layernorm",)


class PrunedOlmo3ForCausalLM(PerLayerWidths, Olmo3ForCausalLM):  # type: ignore[misc]
    """OLMo 3 with blocks of different widths."""

    _of_attention = ("post_attention_layernorm",)


class PrunedExaone4ForCausalLM(PerLayerWidths, Exaone4ForCausalLM):  # type: ignore[misc]
    """EXAONE 4 with blocks of different widths."""

    _of_attention = ("post_attention_layernorm",)


class PrunedHunYuanDenseV1ForCausalLM(PerLayerWidths, HunYuanDenseV1ForCausalLM):  # type: ignore[misc]
    """Hunyuan's dense models with blocks of different widths."""


class PrunedLfm2ForCausalLM(PerLayerWidths, Lfm2ForCausalLM):  # type: ignore[misc]
    """LFM 2 with blocks of different widths."""

    _ffn = ("feed_forward", "w2")


if hasattr(transformers, "Gemma4ForCausalLM"):  # not in transformers 4

    class PrunedGemma4ForCausalLM(PerLayerWidths, transformers.Gemma4ForCausalLM):  # type: ignore[misc]
        """Gemma 4 with blocks of different widths."""

        _told = ("layer_idx",)


if hasattr(transformers, "Qwen3_5ForCausalLM"):  # not in transformers 4

    class PrunedQwen3_5ForCausalLM(  # noqa: N801  # transformers' name
        PerLayerWidths,
        transformers.Qwen3_5ForCausalLM,  # type: ignore[misc]
    ):
        """Qwen 3.5's text models with blocks of different widths."""

        _told = ("intermediate_size",)
