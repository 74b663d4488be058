"""Which transformers architectures can be pruned, and where their FFN lives.

One frozen row a model type, keyed by `config.model_type`. A row says where the decoder blocks are and what the
gated MLP's three projections are called; adding an architecture with a gated MLP is adding a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from cfsp.errors import InputError
from cfsp.models.shape import BlockShape, ModelShape


@dataclass(frozen=True)
class ArchitectureSpec:
    """Where a model type keeps its blocks and the three projections of its gated MLP."""

    model_type: str
    layers: str = "model.layers"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


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


ARCHITECTURES = MappingProxyType(
    {name: ArchitectureSpec(name) for name in ("llama", "mistral", "qwen2", "qwen3")}
)


def spec_for(config: Any) -> ArchitectureSpec:
    """Row for a transformers config.

    Raises:
        InputError: The model type is not in the table; the message names the known ones.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in ARCHITECTURES:
        raise InputError(
            "unsupported architecture", field="model_type", value=model_type, allowed=", ".join(ARCHITECTURES)
        )
    return ARCHITECTURES[model_type]


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


def model_shape(model: Any) -> ModelShape:
    """The shape that a model's weights have; every block counts as the dense model's of the same index."""
    blocks = []
    for index, layer in enumerate(decoder_layers(model)):
        attention: Any = layer.get_submodule("self_attn")
        kv_groups = attention.k_proj.out_features // attention.head_dim
        blocks.append(BlockShape(index, feed_forward(model, layer).width, kv_groups))
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
