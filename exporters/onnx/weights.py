"""A checkpoint's matrices as a graph has them: which of them can be one layer, and how each is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.families.row import Family
from cfsp.models.offload import at_hand
from exporters.onnx.layers import TABLE, Floats, Int8, Matrix
from exporters.onnx.matrix import round_rows
from exporters.onnx.variants import HEAD

PACKED, QKV = "qkv_proj", ("q_proj", "k_proj", "v_proj")
HEAD_PARTS = (f"{HEAD}.frequent", f"{HEAD}.rest")
"""The output matrix's first rows and all others: tokenizers number tokens as they learn them, common ones first."""
_FREQUENT_SHARE, _ROWS_ALIGN = 16, 32


def check_blocks(spec: Family) -> None:
    """Raise InputError for a model type whose blocks no graph computes."""
    if reason := spec.not_in_graphs:
        what, value = f"no graph is written yet of blocks {reason}", spec.model_type
        raise InputError(what, field="model_type", value=value, allowed="GGUF")


def check_rope(rope_type: str) -> None:
    """Raise InputError for a rope that the graph cannot compute."""
    if rope_type == "dynamic":
        raise InputError(
            "a rope whose frequencies change with the text's length is not supported by the fused graph",
            field="rope_type",
            value=rope_type,
            allowed="default, linear, llama3, longrope, yarn",
        )


def head_parts(vocab_size: int) -> dict[str, slice]:
    """Rows of the output matrix by the part's name: the first sixteenth of the tokens, and the rest."""
    rows = _ROWS_ALIGN * -(-vocab_size // (_FREQUENT_SHARE * _ROWS_ALIGN))
    return dict(zip(HEAD_PARTS, (slice(0, rows), slice(rows, vocab_size)), strict=True))


def group_of(name: str) -> tuple[str, ...]:
    """What can be one layer with a module, itself included: q, k and v; the output matrix's parts."""
    if name in HEAD_PARTS:
        return HEAD_PARTS
    prefix, _, last = name.rpartition(".")
    return tuple(f"{prefix}.{part}" for part in QKV) if last in QKV else (name,)


def packed_names(name: str) -> tuple[str, ...]:
    """The modules whose rows a layer holds: itself, or q, k and v of a packed one, or the output matrix's parts."""
    if name == HEAD:
        return HEAD_PARTS
    prefix, _, last = name.rpartition(".")
    return group_of(f"{prefix}.{QKV[0]}") if last == PACKED else (name,)


def weight_of(model: Any, name: str) -> torch.Tensor:
    """The weight of a Linear, of a part of the output matrix, or of `TABLE`, (rows, in_features); a view."""
    weight: torch.Tensor = _module_of(model, name).weight.detach()
    return weight[head_parts(len(weight))[name]] if name in HEAD_PARTS else weight


def read_weight(model: Any, name: str) -> torch.Tensor:
    """`weight_of` as float32, wherever the model keeps it."""
    with at_hand(_module_of(model, name)):
        return weight_of(model, name).float()


def _module_of(model: Any, name: str) -> Any:
    if name in HEAD_PARTS:
        return model.get_output_embeddings()
    return model.get_input_embeddings() if name == TABLE else model.get_submodule(name)


def is_tied(model: Any) -> bool:
    """Whether the token embedding is the output matrix."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How a model's weights are stored: as the checkpoint has them, unless a variant overrides it."""

    dtype: torch.dtype = torch.float32  # of norms, rotary tables, what is computed, and here of all
    # Parameter name -> the weight of a norm that is not the checkpoint's.
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        """A Linear, W (out_features, in_features) float32; `...qkv_proj` for q, k and v in one."""
        return Floats(self.stored(weight), None if bias is None else self.stored(bias))

    def table(self, weight: torch.Tensor, *, tied: bool) -> Matrix:
        """The token embedding (vocab_size, hidden_size) float32; a tied one is the output matrix, too."""
        return Floats(self.stored(weight), stored_name=TABLE)

    def packs(self, names: Sequence[str]) -> bool:
        """Whether q, k and v, or the output matrix's parts, are one layer, which is faster."""
        return True

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """It in the dtype of what is computed."""
        return tensor.detach().to(self.dtype)


class Int8Weights(Weights):
    """Everything in int8, with a scale for each row."""

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8:
        return Int8(round_rows(weight), bias)

    def table(self, weight: torch.Tensor, *, tied: bool) -> Int8:
        return Int8(round_rows(weight), stored_name=TABLE)
