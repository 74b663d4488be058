"""Quantizing a model's layers for a variant, block after block, on text.

The model is run as far as it is quantized already: every layer is rounded for the inputs that it will really get.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from cfsp.models.architectures import block_linears, decoder_layers
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.streaming import GramSum, enter_blocks, input_hook, run_layer
from exporters.onnx.block_quantize import Rounded, gptq, joined, round_to_nearest
from exporters.onnx.layers import (
    TABLE,
    Embedding,
    Layer,
    NBitsEmbedding,
    NBitsLinear,
    StackedEmbedding,
    StackedLinear,
)
from exporters.onnx.refine import refine
from exporters.onnx.variants import HEAD, INT8, BlockFormat, FormatOf
from exporters.onnx.weights import HEAD_PARTS, Weights, group_of, head_parts, packed_names

_SINK_SHARE = 0.25
"""The first token's weight over that of all tokens. Measured: 0.25 and 1 lose least, 0.03 a little more."""


@dataclass(frozen=True)
class QuantizedModel(Weights):
    """A model in few bits.

    Attributes:
        layers: Every Linear of the blocks and the output matrix's parts, by `quantize_linears`.
        losses: The divergence that the few bits of each cost, alone; empty where text did not tell.
        apart: What could be one layer is several all the same.
    """

    layers: Mapping[str, Rounded]
    losses: Mapping[str, float] = field(default_factory=dict)
    apart: bool = False

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
        """See `Weights`; the output matrix in one or in two."""
        names = packed_names(name)
        parts = [self.layers[part] for part in names]
        if len(parts) == 1 or self.packs(names):
            return NBitsLinear(joined(parts), None if bias is None else bias.numpy())
        sizes = [len(part.q) for part in parts]
        biases = [None] * len(parts) if bias is None else [b.numpy() for b in torch.split(bias, sizes)]
        return StackedLinear(tuple(map(NBitsLinear, parts, biases)))

    def embedding(self, table: torch.Tensor, *, tied: bool) -> Embedding:
        """See `Weights`; the output matrix where they are one, else the nearest of eight bits.

        Rows of a table that does not multiply are looked up one by one: no input weighs more, and its size costs no
        time.
        """
        if not tied:
            return NBitsEmbedding(round_to_nearest(table, INT8))
        parts = [self.layers[name] for name in HEAD_PARTS]
        if self.packs(HEAD_PARTS):
            return NBitsEmbedding(joined(parts))
        prefix, _, last = TABLE.rpartition(".")
        return StackedEmbedding(
            *(NBitsEmbedding(part, f"{prefix}.{index}.{last}") for index, part in enumerate(parts))
        )

    def packs(self, names: Sequence[str]) -> bool:
        """See `Weights`; layers of unlike formats cannot."""
        return not self.apart and len({self.layers[name].form for name in names}) == 1


def quantize_linears(
    model: Any,
    format_of: FormatOf,
    input_ids: torch.Tensor | None,
    *,
    progress: Progress = no_progress,
) -> dict[str, Rounded]:
    """Quantize every Linear of the blocks, and the output matrix.

    Args:
        model: A causal LM of the architecture table, float32; unchanged.
        format_of: How each is stored.
        input_ids: Text to quantize for, (nsamples, seqlen): GPTQ; None rounds to nearest.
        progress: Told after each block, and after the output matrix.

    Returns:
        Module name -> its weight; the output matrix's is in the two parts of `HEAD_PARTS`. A tied embedding is that
        matrix, and rounded for what it multiplies.
    """
    layers, linears = decoder_layers(model), block_linears(model)
    result: dict[str, Rounded] = {}
    with torch.no_grad():
        hidden, calls = ([], []) if input_ids is None else enter_blocks(model, layers, input_ids)
        for index, layer in enumerate(layers):
            with products_in("auto"):
                grams = _input_grams(linears[index], layer, hidden, calls[index]) if hidden else {}
            forms = {name: format_of(name, index, len(layers)) for name in linears[index]}
            block = _rounded_block(linears[index], forms, grams)
            result |= block
            with products_in("auto"), _replaced(linears[index], block):
                hidden = [run_layer(layer, h, calls[index]) for h in hidden]
            progress("quantizing", index + 1, len(layers) + 1)
        head = format_of(HEAD, len(layers), len(layers))
        gram = _head_gram(model, hidden) if hidden else None
        stored = _rounded(model.get_output_embeddings().weight, head, gram)
        result |= {name: stored.rows(rows) for name, rows in head_parts(len(stored.q)).items()}
        progress("quantizing", len(layers) + 1, len(layers) + 1)
    return result


def _with_attention_sink(x: torch.Tensor) -> torch.Tensor:
    """Attention's inputs (windows, seqlen, hidden_size), with the first token as large as its part in what comes out.

    Heads that have nothing to say attend to the first token (Xiao et al., arXiv 2309.17453), so an error in its key or
    value reaches every other token. Where it counts as one of hundreds, GPTQ moves the others' errors to it: on
    SmolLM2-135M in four bits, one v_proj then made 30 % of the whole divergence.
    """
    weighted = x.clone()
    weighted[:, 0] *= max(1.0, _SINK_SHARE * x.shape[1]) ** 0.5
    return weighted


def _head_gram(model: Any, hidden: list[torch.Tensor]) -> torch.Tensor:
    """X^T X / T of the output matrix's inputs, from the last block's outputs."""
    norm, total = model.get_decoder().norm, GramSum(hidden[0].shape[-1])
    for h in hidden:
        total.add(norm(h).flatten(0, -2).float())
    return total.total() / sum(h.shape[:-1].numel() for h in hidden)


def _input_grams(
    linears: Mapping[str, nn.Linear],
    layer: nn.Module,
    hidden: list[torch.Tensor],
    arguments: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """Module name -> X^T X / T of its input; attention's, with the first token's weight."""
    sums: dict[str, GramSum] = {}
    seen: dict[int, tuple[str, torch.Tensor]] = {}  # holds the tensor, or its id could belong to another one
    same_as: dict[str, str] = {}
    n_tokens = sum(h.shape[0] * h.shape[1] for h in hidden)

    def add(name: str, x: torch.Tensor) -> None:
        # q, k and v read the same tensor, as gate and up do: it is multiplied once.
        first, _ = seen.setdefault(id(x), (name, x))
        same_as[name] = first
        if first == name:
            counted = _with_attention_sink(x) if len(group_of(name)) > 1 else x
            sums.setdefault(name, GramSum(x.shape[-1])).add(counted.reshape(-1, x.shape[-1]).float())

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(input_hook(linear, partial(add, name)))
        for h in hidden:
            seen.clear()
            run_layer(layer, h, arguments)
    totals = {name: total.total() / n_tokens for name, total in sums.items()}
    return {name: totals[first] for name, first in same_as.items()}


@contextmanager
def _replaced(linears: Mapping[str, nn.Linear], rounded: Mapping[str, Rounded]) -> Iterator[None]:
    """Let a block compute with what the runtime will compute with."""
    weights = {name: linear.weight.data for name, linear in linears.items()}
    for name, linear in linears.items():
        linear.weight.data = rounded[name].dequantized()
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.weight.data = weights[name]


def _rounded_block(
    linears: Mapping[str, nn.Linear], forms: Mapping[str, BlockFormat], grams: Mapping[str, torch.Tensor]
) -> dict[str, Rounded]:
    """Every Linear of a block; those of one format that read the same are rounded as one matrix."""
    alike: dict[tuple[BlockFormat, int], list[str]] = {}
    for name, form in forms.items():
        alike.setdefault((form, id(grams.get(name, name))), []).append(name)
    found = {}
    for (form, _), names in alike.items():
        weights = [linears[name].weight for name in names]
        whole, start = _rounded(torch.cat(weights), form, grams.get(names[0])), 0
        for name, weight in zip(names, weights, strict=True):
            found[name] = whole.rows(slice(start, start := start + len(weight)))
    return {name: found[name] for name in linears}


def _rounded(weight: torch.Tensor, form: BlockFormat, gram: torch.Tensor | None) -> Rounded:
    # Eight bits lose nothing that compensation could win back.
    if gram is None or form.bits == 8:
        return round_to_nearest(weight, form)
    return refine(weight, gram, gptq(weight, gram, form))
