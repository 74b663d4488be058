"""Which transformers architectures can be pruned, where their FFN lives, and what llama.cpp calls their files.

One frozen row a model type, keyed by `config.model_type`; docs/extending.md says what else a new one needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from cfsp.errors import InputError, look_up
from cfsp.models.shape import BlockShape, ModelShape


@dataclass(frozen=True)
class ArchitectureSpec:
    """A model type: its modules, and the GGUF files that hold such models.

    Attributes:
        model_type: transformers' name.
        layers: Module of the decoder blocks.
        attention: Of a block, its attention.
        mlp: Of a block, its gated MLP.
        gate: Projection of the MLP.
        up: Projection of the MLP.
        down: Projection of the MLP.
        head_norms: Whether attention norms each head's query and key (q_norm, k_norm).
        bias_settings: Keys of the configuration that say whether there are biases -> a module of block 0 that has one
            if so, by llama.cpp's name.
        rotated_setting: Key of the configuration that says of every block whether its queries and keys are rotated;
            empty where all are.
        gguf_name: llama.cpp's architecture whose files are read as this model type; None where another's are.
        gguf_interleaved: Whether rows of q and k are stored there with the rotary halves interleaved.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    head_norms: bool = False
    bias_settings: Mapping[str, str] = field(default_factory=dict)
    rotated_setting: str = ""
    gguf_name: str | None = None
    gguf_interleaved: bool = False


@dataclass(frozen=True)
class FeedForward:
    """A block's gated MLP: down(act(gate(h)) * up(h)).

    gate.weight and up.weight are (intermediate_size, hidden_size), down.weight is (hidden_size, intermediate_size).
    """

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def width(self) -> int:
        """Number of intermediate channels."""
        return int(self.down.weight.shape[1])


_ATTENTION_BIAS = {"attention_bias": "attn_q"}
_EVERY_BIAS = _ATTENTION_BIAS | {"mlp_bias": "ffn_up"}
_ROWS = (
    ArchitectureSpec(
        "llama",
        bias_settings=_EVERY_BIAS,
        gguf_name="llama",
        gguf_interleaved=True,
    ),
    ArchitectureSpec("mistral"),
    ArchitectureSpec("qwen2", gguf_name="qwen2"),
    ArchitectureSpec("qwen3", head_norms=True, bias_settings=_ATTENTION_BIAS, gguf_name="qwen3"),
    ArchitectureSpec(
        "smollm3",
        bias_settings=_EVERY_BIAS,
        rotated_setting="no_rope_layers",  # 1 where there is a rope, for all its name
        gguf_name="smollm3",
        gguf_interleaved=True,
    ),
)
ARCHITECTURES: Mapping[str, ArchitectureSpec] = MappingProxyType({row.model_type: row for row in _ROWS})


def spec_for(config: Any) -> ArchitectureSpec:
    """Row for a transformers config.

    Raises:
        InputError: The model type is not in the table; the message names the known ones.
    """
    model_type = str(getattr(config, "model_type", None))
    return look_up(ARCHITECTURES, model_type, "unsupported architecture", field="model_type")


def rotated_blocks(config: Any) -> tuple[bool, ...]:
    """Of every block of a transformers config, whether attention rotates its queries and keys."""
    key = spec_for(config).rotated_setting
    count = config.num_hidden_layers
    return tuple(map(bool, getattr(config, key)[:count])) if key else (True,) * count


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks of a causal LM, first to last."""
    return list(model.get_submodule(spec_for(model.config).layers).children())


def block_linears(model: nn.Module) -> tuple[dict[str, nn.Linear], ...]:
    """The Linear layers of every block by their names in the model, first block to last."""
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(
        {names[id(module)]: module for module in layer.modules() if isinstance(module, nn.Linear)}
        for layer in decoder_layers(model)
    )


def feed_forward(model: nn.Module, layer: nn.Module) -> FeedForward:
    """The gated MLP of one of `model`'s decoder blocks."""
    spec = spec_for(model.config)
    mlp = layer.get_submodule(spec.mlp)
    return FeedForward(mlp, *(_linear(mlp, name) for name in (spec.gate, spec.up, spec.down)))


def attention_of(model: nn.Module, layer: nn.Module) -> Any:
    """The attention of one of `model`'s decoder blocks; None in a block that has none."""
    attention = layer.get_submodule(spec_for(model.config).attention)
    return attention if hasattr(attention, "k_proj") else None


def model_shape(model: Any) -> ModelShape:
    """The shape that a model's weights have; every block counts as the dense model's of the same index."""
    blocks = []
    for index, layer in enumerate(decoder_layers(model)):
        attention, width = attention_of(model, layer), feed_forward(model, layer).width
        kv_groups = attention.k_proj.out_features // attention.head_dim if attention else 0
        blocks.append(BlockShape(index, width, kv_groups, has_attention=attention is not None))
    return ModelShape(model.get_input_embeddings().weight.shape[0], tuple(blocks))


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    projection = mlp.get_submodule(name)
    if not isinstance(projection, nn.Linear):
        raise InputError(
            "projections must be plain torch Linear layers (load the model unquantized)",
            field=name,
            value=type(projection).__name__,
        )
    return projection
