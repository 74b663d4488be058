"""A model in few bits for a variant: which layers get eight of them, what each is rounded to, what training leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cfsp.devices import CPU, moved
from cfsp.errors import InputError
from cfsp.models.architectures import block_linears, decoder_layers, spec_for
from cfsp.models.checkpoint import RoundedFormat, RoundedNumbers, load_pruned
from cfsp.models.offload import at_hand
from cfsp.progress import Progress, no_progress
from exporters.checkpoint_reader import read_config
from exporters.onnx.layers import (
    HEAD_PARTS,
    TABLE,
    Matrix,
    NBits,
    Stacked,
    Weights,
    check_blocks,
    group_of,
    head_parts,
    is_tied,
    packed_names,
    read_weight,
    weight_of,
)
from exporters.onnx.matrix import Rounded, joined, round_to_nearest
from exporters.onnx.variants import HEAD, INT4, INT8, VARIANTS, BlockFormat, Variant, find_variant
from exporters.quantize import Placed, stands_for
from exporters.quantize.mixture import GRADIENT_WINDOWS, Option, predict_divergence, solve
from exporters.quantize.rounding import fit
from exporters.quantize.training import RoundedModel, tune_scales
from exporters.quantize.walk import CORRECTION, Readings, alike, round_blocks

FormatOf = Callable[[str, int, int], BlockFormat]
"""(name of a Linear, index of its block, number of blocks) -> its format; the output matrix follows the last block."""
Losses = Mapping[str, float]
"""Layer -> nats a token that rounding it to the nearest of a format costs."""
_EIGHT_BITS_LOSE = 1 / 256  # of what four bits lose: their steps are 16 times as small
_AT_ONCE = 2**24
"""Numbers that are rounded together: rows do not depend on each other, and each number takes 20 bytes meanwhile."""
_LEARNING_RATE = 1e-3  # of scales and norms
_Q4_0_RATIO = 1.1
_FEW = 0.03
"""Of the bytes that a token reads. On SmolLM2-135M, a fifth less is lost than without such layers."""
_APART_BYTES = 180_000
"""Two products more: 22 microseconds of one core that reads 8 GB/s, measured on SmolLM2-135M in ONNX Runtime 1.32."""


@dataclass(frozen=True)
class QuantizedModel(Weights):
    """A model in few bits."""

    # Every Linear of the blocks, the output matrix's parts, and as `TABLE` a token embedding that is not tied to it.
    layers: Mapping[str, Rounded]
    apart: bool = False  # what could be one layer is several all the same

    def layer(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Matrix:
        names = packed_names(name)
        parts = [self.layers[part] for part in names]
        if len(parts) == 1 or self.packs(names):
            return NBits(joined(parts), bias)
        sizes = [len(part.q) for part in parts]
        biases = [None] * len(parts) if bias is None else torch.split(bias, sizes)
        return Stacked(tuple(map(NBits, parts, biases)))

    def table(self, weight: torch.Tensor, *, tied: bool) -> Matrix:
        if not tied:
            return NBits(self.layers[TABLE], stored_name=TABLE)
        parts = [self.layers[name] for name in HEAD_PARTS]
        if self.packs(HEAD_PARTS):
            return NBits(joined(parts), stored_name=TABLE)
        prefix, _, last = TABLE.rpartition(".")
        names = (f"{prefix}.{index}.{last}" for index in range(len(parts)))
        return Stacked(tuple(NBits(part, None, name) for part, name in zip(parts, names, strict=True)))

    def packs(self, names: Sequence[str]) -> bool:
        """Layers of unlike formats cannot be one."""
        return not self.apart and len({self.layers[name].form for name in names}) == 1


def quantize_linears(
    model: Any,
    format_of: FormatOf,
    input_ids: torch.Tensor | None,
    *,
    correction: float = CORRECTION,
    progress: Progress = no_progress,
) -> dict[str, Rounded]:
    """Quantize every matrix of a model, without text (nsamples, seqlen) to the nearest: see `QuantizedModel.layers`.

    An embedding of its own costs no time, and gets eight bits; `correction` is `round_blocks`'s.
    """
    linears = block_linears(model)
    result: dict[str, Rounded] = {}

    def visit(index: int, readings: Readings) -> dict[str, torch.Tensor]:
        """Round Linears of a block; those of one format that read the same as one matrix."""
        forms = {name: format_of(name, index, len(linears)) for name in readings or linears[index]}
        found = {}
        for names in alike(forms, readings):
            each = [
                readings[name].weight if readings else linears[index][name].weight.detach() for name in names
            ]
            gram = readings[names[0]].gram if readings else None
            whole, start = rounded(torch.cat(each), forms[names[0]], gram), 0
            for name, weight in zip(names, each, strict=True):
                found[name] = whole.rows(slice(start, start := start + len(weight)))
        result.update((name, found[name]) for name in forms)
        return {name: found[name].dequantize() for name in forms} if readings else {}

    gram = None
    if input_ids is not None:
        gram = round_blocks(model, input_ids, visit, correction=correction, progress=progress)
    else:
        for index, layer in enumerate(decoder_layers(model)):
            with at_hand(layer):
                visit(index, {})
            progress("quantizing", index + 1, len(linears) + 1)
    head = format_of(HEAD, len(linears), len(linears))
    output = model.get_output_embeddings()
    with at_hand(output):
        stored = rounded(output.weight.detach(), head, gram)
    result |= {name: stored.rows(rows) for name, rows in head_parts(len(stored.q)).items()}
    if not is_tied(model):
        result[TABLE] = rounded(read_weight(model, TABLE), INT8)
    progress("quantizing", len(linears) + 1, len(linears) + 1)
    return result


def rounded(weight: torch.Tensor, form: BlockFormat, gram: torch.Tensor | None = None) -> Rounded:
    """The nearest numbers, or for inputs (X^T X / T) those that `fit` finds."""
    parts = torch.split(weight, max(1, _AT_ONCE // weight.shape[1]))
    # Eight bits lose nothing that compensation could win back.
    if gram is None or form.bits == 8:
        return joined([round_to_nearest(part, form) for part in parts])
    each = (part.to(gram.device) for part in parts)
    importance = gram.diagonal()
    return joined([fit(one, round_to_nearest(one, form, importance), gram) for one in each]).to(weight.device)


def formats_without_text(form: BlockFormat, down: str) -> FormatOf:
    """`form` for all layers, but eight bits where rounding costs most; `down`: an FFN's last matrix.

    Of SmolLM2-135M v_proj, 3 % of the blocks' weights, makes half of the divergence, then down_proj at both ends.
    """

    def format_of(name: str, block: int, blocks: int) -> BlockFormat:
        outer = name.endswith(f".{down}") and (block < 2 or block >= blocks - 2)
        return INT8 if outer or name == HEAD or name.endswith("v_proj") else form

    return format_of


def outline_in(model: Any, form: BlockFormat) -> QuantizedModel:
    """A model in few bits, all apart that can be one layer: as large as it is, without numbers."""
    names = [name for block in block_linears(model) for name in block]
    shapes = {name: weight_of(model, name).shape for name in (*names, *HEAD_PARTS)}
    layers = {name: Rounded.unwritten(shape, form) for name, shape in shapes.items()}
    table = Rounded.unwritten(weight_of(model, TABLE).shape, INT8)
    return QuantizedModel(layers | {TABLE: table}, apart=True)


def measure(
    model: Any,
    form: BlockFormat,
    input_ids: torch.Tensor,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Losses:
    """What each Linear of the blocks, and each part of the output matrix, loses in a format on a few of the windows."""
    rows = head_parts(model.config.vocab_size)
    with moved(model, device):
        layers = quantize_linears(model, lambda *_: form, None)

        def changed(name: str, some: slice) -> torch.Tensor:
            return layers[name].rows(some).dequantize() - weight_of(model, name)[some]

        changes = {
            name: (HEAD if name in rows else name, rows.get(name, slice(None)), partial(changed, name))
            for name in layers
            if name != TABLE
        }
        return predict_divergence(model, changes, input_ids[:GRADIENT_WINDOWS], progress=progress)


def choose_eight_bits(
    model: Any, form: BlockFormat, losses: Losses, left_bytes: int | None = None
) -> tuple[str, ...]:
    """The layers to store in eight bits, of the least loss together; others are of `form`.

    `left_bytes` is what eight bits may take more; None is few, until a token takes 3 % longer, the time to read the
    weights. Layers that read the same are one if they have one format; two products more cost `_APART_BYTES`.
    """
    shapes = {name: weight_of(model, name).shape for name in losses}
    few = left_bytes is None
    if left_bytes is None:
        left_bytes = int(_FEW * sum(bytes_of(shape, form) for shape in shapes.values()))
    # With normed heads, q, k and v are apart already.
    normed = spec_for(model.config).head_norms is not None
    options: dict[str, list[Option[tuple[str, ...]]]] = {}
    for name in losses:
        group = group_of(name)
        if name != group[0]:
            continue
        for formats in product((form, INT8), repeat=len(group)):
            stored = dict(zip(group, formats, strict=True))
            n_bytes = sum(bytes_of(shapes[one], each) for one, each in stored.items())
            if few and len({*formats}) > 1 and not (normed and name not in HEAD_PARTS):
                n_bytes += _APART_BYTES
            eight = tuple(one for one, each in stored.items() if each == INT8)
            loss = sum(
                losses[one] * (_EIGHT_BITS_LOSE if each == INT8 else 1) for one, each in stored.items()
            )
            options.setdefault(name, []).append(Option(eight, n_bytes, loss))
    least = sum(min(option.n_bytes for option in each) for each in options.values())
    chosen = {one for option in solve(options, least + left_bytes).values() for one in option.kind}
    return tuple(name for name in losses if name in chosen)


def default_budget(model: Any) -> int:
    """1.1 times what weights take in GGUF's Q4_0: 4.5 bits in the blocks' matrices, 8.5 in the embedding and a head."""
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    n_bytes = sum(
        bytes_of(each.shape, INT8 if any(each is table for table in tables) else INT4)
        if each.ndim == 2
        else 4 * each.numel()
        for each in model.parameters()
    )
    return int(_Q4_0_RATIO * n_bytes)


def bytes_of(shape: Sequence[int], form: BlockFormat) -> int:
    """Of a matrix: its numbers, and a float16 scale a block."""
    rows, columns = shape
    return rows * -(-columns // form.block_size) * (form.block_size * form.bits // 8 + 2)


def rounded_model(
    model: Any,
    form: BlockFormat,
    eight_bits: Sequence[str],
    input_ids: torch.Tensor,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> QuantizedModel:
    """Round all layers on a device for a text, some to the nearest of eight bits; see `quantize_linears`."""
    with moved(model, device):
        layers = quantize_linears(
            model, lambda name, *_: INT8 if name in eight_bits else form, input_ids, progress=progress
        )
    parts = [name for name in HEAD_PARTS if name in eight_bits]
    nearest = {name: round_to_nearest(weight_of(model, name), INT8) for name in parts}
    return QuantizedModel({name: rounded.to(CPU) for name, rounded in layers.items()} | nearest)


def tune(
    model: Any, quantized: QuantizedModel, input_ids: torch.Tensor, *, progress: Progress = no_progress
) -> QuantizedModel:
    """It with the scales and norms that `tune_scales` finds on a text; arguments as there."""
    stored = {
        name: rounded.dequantize().to(model.device)
        for name, rounded in quantized.layers.items()
        if name != TABLE
    }
    head = torch.cat([stored.pop(part) for part in HEAD_PARTS])
    table = head if is_tied(model) else model.get_input_embeddings().weight.detach()
    rows, norms = tune_scales(model, stored, head, table, input_ids, _LEARNING_RATE, progress=progress)
    scaled = {name: quantized.layers[name].scaled(factors[:, None]) for name, factors in rows.items()}
    return replace(quantized, layers={**quantized.layers, **scaled}, norms=norms)


class OnnxRounding:
    """See `cfsp.recovery.rounding.Rounding`."""

    def check(self, name: str) -> None:
        """What is chosen for a size, or loses nothing to speak of, is not trained through."""
        known = [row.name for row in VARIANTS.values() if row.needs_text and not row.mixed]
        if find_variant(name).name not in known:
            allowed = ", ".join(known)
            raise InputError("cannot be trained through", field="for_quant", value=name, allowed=allowed)

    def start(
        self, checkpoint: Path, name: str, input_ids: torch.Tensor, device: str, progress: Progress
    ) -> RoundedModel:
        """Numbers and which layers get eight bits are chosen for a text, as export chooses them."""
        variant = find_variant(name)
        check_blocks(read_config(checkpoint).spec)
        assert variant.form is not None
        model = load_pruned(checkpoint, torch.float32)
        losses = measure(model, variant.form, input_ids, device=device, progress=progress)
        names = choose_eight_bits(model, variant.form, losses)
        few = rounded_model(model, variant.form, names, input_ids, device=device, progress=progress)
        types = {name: str(layer.form.bits) for name, layer in few.layers.items()}
        placed = {name: _placed(name, layer) for name, layer in few.layers.items()}
        return RoundedModel(RoundedFormat(variant.name, types, None), placed)


def _placed(name: str, layer: Rounded) -> Placed:
    def hold(model: Any, values: torch.Tensor) -> None:
        weight_of(model, name).copy_(values)

    modules = () if name in (*HEAD_PARTS, TABLE) else (name,)
    return Placed(layer, hold, lambda factors: factors[0], modules, layer.form.block_size)


def trained_layers(model: Any, variant: Variant, numbers: RoundedNumbers) -> dict[str, Rounded]:
    """The layers of a checkpoint that has a variant's numbers; InputError if its weights are not those."""
    assert variant.form is not None
    forms: dict[str, BlockFormat] = {str(form.bits): form for form in (variant.form, INT8)}
    layers = {}
    for name, bits in numbers.format.types.items():
        weight = weight_of(model, name).float()
        q, scales = (numbers.tensors.get(f"{name}.{part}") for part in ("q", "scales"))
        if q is None or scales is None or bits not in forms or scales.shape != q.shape[:2]:
            raise InputError(f"the checkpoint's rounded numbers are not whole: {name}")
        layer = Rounded(q, scales, weight.shape[1], forms[bits])
        fits = q.shape[0] == len(weight) and q[0].numel() >= weight.shape[1]
        if not fits or not stands_for(layer.dequantize(), weight):
            raise InputError(f"the checkpoint's rounded numbers are not what its weights stand for: {name}")
        layers[name] = layer
    if TABLE not in layers and not is_tied(model):
        raise InputError(
            f"the checkpoint's rounded numbers are not whole: {TABLE}; train it anew with this version"
        )
    return layers
