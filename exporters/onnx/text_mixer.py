"""What mixes tokens in attention's place and keeps of a text what does not grow with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from exporters.onnx.graph_builder import GraphBuilder, Numbers


@dataclass(frozen=True, eq=False)
class NewTokens:
    """Those of a call."""

    count: ir.Value  # of each row, how many are no padding, (batch_size,) int64
    length: ir.Value  # sequence_length, () int64


@dataclass(frozen=True, eq=False)
class MixerCall:
    """Where a mixer's nodes go, and what of the text they read and leave."""

    builder: GraphBuilder  # of the graph
    prefix: str  # the module's name, which begins those of the nodes
    tokens: NewTokens  # of this call
    pasts: Mapping[str, ir.Value]  # what is kept of the text before, by its kind
    presents: Mapping[str, str]  # names of what is kept of the text then, by its kind


class TextMixer(Protocol):
    """A block's, with the norm before it."""

    @property
    def module(self) -> str:
        """Of the block, the module that mixes."""

    @property
    def input_norm(self) -> Numbers | None:
        """(hidden_size,) norm before it; None where it reads the residual sum as it is."""

    @property
    def kept(self) -> Mapping[str, ir.Shape]:
        """What is kept of a text: its kind, which is `past_<kind>` among the inputs -> its shape."""

    def mix(self, call: MixerCall, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """Add its nodes.

        Args:
            call: The graph, and what is kept of the text.
            hidden: (batch_size, sequence_length, hidden_size), normed.

        Returns:
            What it adds to the residual sum, and what is kept of the text then, as `kept` has it.
        """


def count_column(builder: GraphBuilder, count: ir.Value) -> ir.Value:
    """`NewTokens.count` as (batch_size, 1)."""
    last = builder.constant("last_axis", [-1])
    return builder.op("Unsqueeze", [count, last], "new_tokens.column", shape=["batch_size", 1])


def token_places(builder: GraphBuilder, length: ir.Value) -> ir.Value:
    """0, 1, ... of the tokens of a call, (sequence_length,) int64."""
    ends = [builder.constant("range_start", 0), length, builder.constant("range_step", 1)]
    return builder.op("Range", ends, "steps", shape=["sequence_length"])
