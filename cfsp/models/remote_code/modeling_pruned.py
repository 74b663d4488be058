"""Causal language models whose decoder blocks have FFNs of different widths, and some of them no attention.

config.json says so as transformers 5 documents it,

    "per_layer_config": {"0": {"intermediate_size": 1024}, "1": {"intermediate_size": 768, "skip": ["attention"]}, ...}

and everything else is the model of the same `model_type`. This file is self-contained, stored beside
the weights and used by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, under
transformers 4 and 5 alike.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)


def layer_widths(config: Any) -> list[int]:
    """intermediate_size of every block that a configuration asks for, first to last.

    transformers 5 offers `per_layer_config` as a sequence of configurations, transformers 4 as a mapping.
    """
    layers = getattr(config, "per_layer_config", None)
    if layers is None or isinstance(layers, Mapping):
        given = {int(index): entry for index, entry in (layers or {}).items()}
        wrong = sorted(set(given) - set(range(config.num_hidden_layers)))
        if wrong:
            raise ValueError(f"per_layer_config names blocks that do not exist: {wrong}")
        return [
            given.get(index, {}).get("intermediate_size") or config.intermediate_size
            for index in range(config.num_hidden_layers)
        ]
    return [layer.intermediate_size for layer in layers]


def layers_without_attention(config: Any) -> set[int]:
    """Blocks that a configuration wants without attention."""
    layers = getattr(config, "per_layer_config", None)
    if layers is None or isinstance(layers, Mapping):
        return {int(index) for index, entry in (layers or {}).items() if "attention" in entry.get("skip", ())}
    return {index for index, layer in enumerate(layers) if "attention" in getattr(layer, "skip", ())}


def per_layer_settings(
    widths: Sequence[int], without_attention: Collection[int]
) -> dict[str, dict[str, Any]]:
    """`per_layer_config` of blocks of these widths, some of them without attention."""
    return {
        str(index): {"intermediate_size": width}
        | ({"skip": ["attention"]} if index in without_attention else {})
        for index, width in enumerate(widths)
    }


def uniform_config(config: Any, width: int) -> Any:
    """A copy of a configuration in which every block has the same width."""
    plain = copy.deepcopy(config)
    if isinstance(getattr(type(plain), "per_layer_config", None), property):
        plain.per_layer_config = None
    else:
        plain.__dict__.pop("per_layer_config", None)
    plain.intermediate_size = width
    return plain


class NoAttention(nn.Module):
    """In the place of a block's attention: it adds nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """(zeros, no attention weights)."""
        return torch.zeros_like(hidden_states), None


class PerLayerWidths:
    """Builds each block's FFN as wide as the configuration says, and some without attention; saves what it has.

    The model's own `config` is uniform, with the widest block as its `intermediate_size`: transformers 5 refuses
    to read a per-layer value from a configuration, and much code reads `intermediate_size`.
    """

    # Makes transformers store this file, and name it in config.json, whenever the model is saved.
    _auto_class = "AutoModelForCausalLM"
    model: Any
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        widths, without = layer_widths(config), layers_without_attention(config)
        super().__init__(uniform_config(config, max(widths)), *args, **kwargs)  # type: ignore[call-arg]
        for layer, width in zip(self.model.layers, widths, strict=True):
            if width != max(widths):
                layer.mlp = type(layer.mlp)(uniform_config(self.config, width))
        for index in without:
            self.model.layers[index].self_attn = NoAttention()
            self.model.layers[index].input_layernorm = nn.Identity()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, with what differs in config.json and this file beside the weights."""
        widths = [layer.mlp.down_proj.weight.shape[1] for layer in self.model.layers]
        without = [i for i, layer in enumerate(self.model.layers) if isinstance(layer.self_attn, NoAttention)]
        uniform = self.config
        stored = uniform_config(uniform, max(widths))
        if len(set(widths)) > 1 or without:
            stored.per_layer_config = per_layer_settings(widths, without)
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
