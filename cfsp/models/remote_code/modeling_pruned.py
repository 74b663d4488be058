"""Causal language models whose decoder blocks have FFNs and attentions of different sizes, and some no attention.

config.json says so as transformers 5 documents it,

    "per_layer_config": {"0": {"intermediate_size": 1024, "num_key_value_heads": 2}, "1": {"skip": ["attention"]}, ...}

Each key-value head is read by as many query heads as in the whole model. (transformers 5 refuses a num_attention_heads
for each block.) Everything else is the model of the same `model_type`: `PrunedLlamaForCausalLM` of transformers'
`LlamaForCausalLM`, and so on. This file is self-contained, stored beside the weights and used by
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, under transformers 4 and 5 alike.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

_PRUNED = ("intermediate_size", "num_key_value_heads", "skip")
_FFNS = {"mlp": "down_proj", "feed_forward": "w2"}
"""What a block's FFN can be called -> its last matrix."""


def _of_blocks(config: Any) -> list[Mapping[str, Any]]:
    """What a configuration asks for in every block; transformers 5 offers it as configurations."""
    layers = getattr(config, "per_layer_config", None)
    if layers is not None and not isinstance(layers, Mapping):
        return [{name: getattr(layer, name, ()) for name in _PRUNED} for layer in layers]
    given = {int(index): entry for index, entry in (layers or {}).items()}
    wrong = sorted(set(given) - set(range(config.num_hidden_layers)))
    if wrong:
        raise ValueError(f"per_layer_config names blocks that do not exist: {wrong}")
    plain = {name: getattr(config, name) for name in _PRUNED[:2]}
    return [plain | dict(given.get(index, {})) for index in range(config.num_hidden_layers)]


def per_layer_settings(
    widths: Sequence[int], kv_heads: Sequence[int], most: int
) -> dict[str, dict[str, Any]]:
    """`per_layer_config` of blocks with these widths and key-value heads: 0 is no attention, `most` is not repeated."""
    return {
        str(index): {"intermediate_size": width}
        | ({} if heads else {"skip": ["attention"]})
        | ({"num_key_value_heads": heads} if heads not in (0, most) else {})
        for index, (width, heads) in enumerate(zip(widths, kv_heads, strict=True))
    }


def joined_settings(theirs: Any, ours: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`per_layer_config` with what transformers states of single blocks, and `ours`."""
    stated = {str(int(index)): dict(entry) for index, entry in (theirs or {}).items()}
    return {index: {**stated.get(index, {}), **entry} for index, entry in ours.items()}


def stated_settings(config: Any) -> dict[str, dict[str, Any]]:
    """What transformers states of single blocks of a model type under `per_layer_config`."""
    stated = (config.to_dict().get("per_layer_config") or {}).items()
    entries = {str(int(n)): {key: own[key] for key in own if key not in _PRUNED} for n, own in stated}
    return {index: entry for index, entry in entries.items() if entry}


def uniform_config(config: Any, width: int) -> Any:
    """A copy of a configuration in which every block has the same width and heads."""
    plain = copy.deepcopy(config)
    if isinstance(getattr(type(plain), "per_layer_config", None), property):
        plain.per_layer_config = stated_settings(config) or None
    else:
        plain.__dict__.pop("per_layer_config", None)
    plain.intermediate_size = width
    if getattr(plain, "use_double_wide_mlp", False):
        plain.use_double_wide_mlp = False  # of some blocks it would be twice that
    return plain


class NoAttention(nn.Module):
    """In the place of a block's attention: it adds nothing."""

    is_sliding, attention_type = False, "full_attention"  # by which transformers 4 chooses RoPE and mask

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """(zeros, no attention weights)."""
        return torch.zeros_like(hidden_states), None


def leave_out_attention(layer: Any) -> None:
    """Take a block's attention out, and the norms before and after it."""
    layer.self_attn = NoAttention()
    # The norm of this name is the FFN's where no other one stands behind the FFN.
    behind = ("post_attention_layernorm",) if hasattr(layer, "post_feedforward_layernorm") else ()
    for name in ("input_layernorm", *behind):
        if hasattr(layer, name):
            setattr(layer, name, nn.Identity())


def _ffn_of(layer: Any) -> tuple[str, Any]:
    """Of a block its FFN, by its name."""
    return next((name, getattr(layer, name)) for name in _FFNS if hasattr(layer, name))


class PerLayerWidths:
    """Builds each block's FFN and attention as large as the configuration says, or none; saves what it has.

    The model's own `config` has the widest block's `intermediate_size` and the dense model's heads, which much code
    reads: transformers 5 refuses to read them from one with values for each block.
    """

    # Makes transformers store this file, and name it in config.json, whenever the model is saved.
    _auto_class = "AutoModelForCausalLM"
    model: Any
    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        blocks = _of_blocks(config)
        widest = max(block["intermediate_size"] for block in blocks)
        super().__init__(uniform_config(config, widest), *args, **kwargs)  # type: ignore[call-arg]
        for index, (layer, block) in enumerate(zip(self.model.layers, blocks, strict=True)):
            width, kv_heads = block["intermediate_size"], block["num_key_value_heads"]
            if width != widest:
                name, ffn = _ffn_of(layer)
                known = {"intermediate_size": width, "layer_idx": index}
                told = known.keys() & inspect.signature(type(ffn).__init__).parameters.keys()
                narrow = uniform_config(self.config, width)
                setattr(layer, name, type(ffn)(narrow, **{key: known[key] for key in told}))
            if "attention" in block.get("skip", ()):
                leave_out_attention(layer)
            elif kv_heads != self.config.num_key_value_heads:
                attention, smaller = layer.self_attn, copy.deepcopy(self.config)
                smaller.head_dim, smaller.num_key_value_heads = attention.head_dim, kv_heads
                smaller.num_attention_heads = kv_heads * attention.num_key_value_groups
                layer.self_attn = type(attention)(smaller, attention.layer_idx)
                layer.self_attn.config = self.config  # of which it reads what is the same in all blocks

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does it, with what differs in config.json and this file beside the weights."""
        uniform, widths, kv_heads = self.config, [], []
        for layer in self.model.layers:
            name, ffn = _ffn_of(layer)
            widths.append(getattr(ffn, _FFNS[name]).weight.shape[1])
            attention: Any = getattr(layer, "self_attn", None)
            heads = uniform.num_key_value_heads
            if isinstance(attention, NoAttention):
                heads = 0
            elif hasattr(attention, "k_proj"):  # not in a block that has no attention, or no keys of its own
                heads = attention.k_proj.weight.shape[0] // attention.head_dim
            kv_heads.append(heads)
        stored = uniform_config(uniform, max(widths))
        if len(set(widths)) > 1 or set(kv_heads) != {uniform.num_key_value_heads}:
            ours = per_layer_settings(widths, kv_heads, uniform.num_key_value_heads)
            stored.per_layer_config = joined_settings(stated_settings(uniform), ours)
        self.config = stored
        try:
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.config = uniform


def __getattr__(name: str) -> Any:
    """`Pruned<X>`: transformers' class X with blocks of different widths."""
    native = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if native is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = type(name, (PerLayerWidths, native), {"__module__": __name__, "__doc__": __getattr__.__doc__})
    return globals().setdefault(name, made)
