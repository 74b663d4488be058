"""What mixes tokens in attention's place and keeps of a text what does not grow with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from exporters.onnx.graph_builder import GraphBuilder, Numbers


@dataclass(frozen=True, eq=False)
class NewTokens:
    """Those of a call.

    Attributes:
        count: Of each row, how many are no padding, (batch_size,) int64.
        length: sequence_length, () int64.
    """

    count: ir.Value
    length: ir.Value


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

    def mix(
        self,
        builder: GraphBuilder,
        hidden: ir.Value,
        pasts: Mapping[str, ir.Value],
        tokens: NewTokens,
        prefix: str,
        presents: Mapping[str, str],
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Add its nodes.

        Args:
            builder: Of the graph.
            hidden: (batch_size, sequence_length, hidden_size), normed.
            pasts: What is kept of the text before, by its kind.
            tokens: Of this call.
            prefix: The module's name, which begins those of the nodes.
            presents: Names of what is kept of the text then, by its kind.

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
