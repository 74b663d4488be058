"""Where a model's blocks and their parts are, and what its configuration says of them, whatever its family."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from cfsp.errors import InputError, look_up
from cfsp.models.families import FAMILIES
from cfsp.models.families.row import WINDOWED, Family
from cfsp.models.shape import BlockShape, ModelShape


class FeedForward(NamedTuple):
    """A block's gated MLP: down(act(gate(h)) * up(h)); gate, up: (intermediate_size, hidden_size)."""

    module: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def width(self) -> int:
        """Number of intermediate channels."""
        return int(self.down.weight.shape[1])


def spec_for(config: Any) -> Family:
    """The family of a transformers config; raises InputError for an unknown one, naming the known."""
    model_type = str(getattr(config, "model_type", None))
    return look_up(FAMILIES, model_type, "unsupported architecture", field="model_type")


def state_size(config: Any) -> int:
    """Numbers held of a token while blocks run: its hidden state, and what every block gets beside it."""
    spec = spec_for(config)
    beside = (
        getattr(config, spec.block_inputs.size_setting) * config.num_hidden_layers if spec.block_inputs else 0
    )
    return int(config.hidden_size + beside)


def rotated_blocks(config: Any) -> tuple[bool, ...]:
    """Of every block, whether it has RoPE."""
    spec, count = spec_for(config), config.num_hidden_layers
    if spec.rotates_windowed and config.sliding_window is not None:
        return tuple(window is not None for window in windows_of_blocks(config))
    key = spec.rotated_setting
    return tuple(map(bool, getattr(config, key)[:count])) if key else (True,) * count


def windows_of_blocks(config: Any) -> tuple[int | None, ...]:
    """Of every block, its sliding window in tokens, the current one included; None if it sees all."""
    window, count = getattr(config, "sliding_window", None), int(config.num_hidden_layers)
    if not window or not getattr(config, "use_sliding_window", True):
        return (None,) * count
    kinds = getattr(config, "layer_types", None) or (WINDOWED,) * count
    return tuple(int(window) if kind == WINDOWED else None for kind in kinds)


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
    mlp, linears = layer.get_submodule(spec.mlp), []
    for name in (spec.gate, spec.up, spec.down):
        projection = mlp.get_submodule(name)
        if not isinstance(projection, nn.Linear):
            problem = "projections must be plain torch Linear layers (load the model unquantized)"
            raise InputError(problem, field=name, value=type(projection).__name__)
        linears.append(projection)
    return FeedForward(mlp, *linears)


def added_norms(model: nn.Module, layer: nn.Module) -> tuple[Any, Any]:
    """The norms behind a block's attention and its MLP, if it has them."""
    names = spec_for(model.config).added_norms
    return tuple(map(layer.get_submodule, names)) if names else (None, None)  # type: ignore[return-value]


def attention_of(model: nn.Module, layer: nn.Module) -> Any:
    """The attention of one of `model`'s decoder blocks; None in a block that has none, or no keys of its own."""
    attention = getattr(layer, spec_for(model.config).attention, None)
    return attention if hasattr(attention, "k_proj") else None


def mixer_of(model: nn.Module, layer: nn.Module) -> Any:
    """What takes attention's place in one of `model`'s decoder blocks; None in any other block."""
    mixer = spec_for(model.config).mixer
    return getattr(layer, mixer.module, None) if mixer else None


def token_tables(model: Any) -> list[Any]:
    """The embedding, and the table of block inputs if there is one."""
    inputs = spec_for(model.config).block_inputs
    further = getattr(model.get_decoder(), inputs.table, None) if inputs else None
    return [model.get_input_embeddings(), *([] if further is None else [further])]


def last_norm(model: Any) -> Any:
    """The norm behind the blocks, whose output the output matrix reads."""
    return model.get_decoder().get_submodule(spec_for(model.config).last_norm)


def norm_epsilon(config: Any) -> float:
    """What norms add to the mean of squares."""
    return float(getattr(config, spec_for(config).epsilon_setting))


def keyless_blocks(settings: Mapping[str, Any]) -> frozenset[int]:
    """Blocks without keys of their own: another mixer, or another block's keys; settings: with defaults filled in."""
    row = FAMILIES.get(settings.get("model_type", ""))
    mixer, kinds = row.mixer if row else None, settings.get("layer_types") or ()
    mixed = (index for index, one in enumerate(kinds) if mixer and one == mixer.kind)
    return frozenset((*mixed, *_sharing_blocks(row, settings)))


def stated_widths(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """FFN widths of all blocks if none is stated of single ones; settings: with defaults filled in."""
    row, width = FAMILIES.get(settings.get("model_type", "")), settings["intermediate_size"]
    sharing: Collection[int] = ()
    if row and row.shared_keys and settings.get(row.shared_keys.wide_setting):
        sharing = _sharing_blocks(row, settings)
    return tuple(width * (2 if index in sharing else 1) for index in range(settings["num_hidden_layers"]))


def width_settings(settings: Mapping[str, Any], widths: Sequence[int]) -> dict[str, Any]:
    """Settings from which the widths of all blocks follow, or else with the widest in every block."""
    row = FAMILIES[settings["model_type"]]
    one = {"intermediate_size": widths[0]}
    if stated_widths({**settings, **one}) == tuple(widths):
        return one
    alike = {row.shared_keys.wide_setting: False} if row.shared_keys else {}
    return {"intermediate_size": max(widths), **alike}


def _sharing_blocks(row: Family | None, settings: Mapping[str, Any]) -> range:
    count = settings.get("num_hidden_layers", 0)
    shared = settings.get(row.shared_keys.count_setting) or 0 if row and row.shared_keys else 0
    return range(count - shared, count)


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """c tanh(z / c) of logits z, or z if there is no cap c."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_cap(config: Any) -> float | None:
    """The cap of a configuration's logits; None if there is none."""
    key = spec_for(config).cap_setting
    return getattr(config, key) if key else None


def output_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """A model's logits (..., vocab_size) float32, of the output matrix's inputs (..., hidden_size)."""
    return capped(model.get_output_embeddings()(hidden).float(), logit_cap(model.config))


def model_shape(model: Any) -> ModelShape:
    """The shape of a model's weights; every block counts as the dense model's of the same index."""
    blocks = []
    attention_name = spec_for(model.config).attention
    for index, layer in enumerate(decoder_layers(model)):
        attention, width = attention_of(model, layer), feed_forward(model, layer).width
        kv_groups = attention.k_proj.out_features // attention.head_dim if attention else 0
        attends = hasattr(getattr(layer, attention_name, None), "q_proj")
        mixes = attends or mixer_of(model, layer) is not None
        blocks.append(BlockShape(index, width, kv_groups, has_attention=mixes))
    return ModelShape(model.get_input_embeddings().weight.shape[0], tuple(blocks))
