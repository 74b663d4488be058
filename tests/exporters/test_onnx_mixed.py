"""Eight bits go where four cost most, budgets are held, and int4-mixed is closer than int4."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import safetensors.torch
import torch

from cfsp.errors import InputError
from cfsp.models.architectures import block_linears
from cfsp.models.checkpoint import load_pruned
from cfsp.text.tokens import tokens_sha256
from exporters.export_record import ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.onnx import export_onnx
from exporters.onnx.matrix import round_to_nearest
from exporters.onnx.quantize import (
    Losses,
    bytes_of,
    choose_eight_bits,
    default_budget,
    measure,
    rounded_model,
)
from exporters.onnx.variants import HEAD, INT4, INT8
from exporters.onnx.weights import HEAD_PARTS, group_of, head_parts, packed_names, read_weight, weight_of

MakeCheckpoint = Callable[..., Path]
WINDOWS = torch.randint(0, 384, (4, 96), generator=torch.Generator().manual_seed(0))
LOOSE = {name: ParityLimits(kl_mean=5.0) for name in ("int4", "int4-b128", "int4-mixed", "int8")}


def export(checkpoint: Path, output: Path, *variants: str, **settings: Any) -> dict[str, ExportRecord]:
    settings = {
        "limits": LOOSE,
        "parity_windows": WINDOWS[:2],
        "calibration": WINDOWS,
        "n_threads": 1,
    } | settings
    return {
        record.quant: record
        for record in export_onnx(checkpoint, output, variants, ExportOptions(**settings))
    }


def measured(model: Any) -> Losses:
    return measure(model, INT4, WINDOWS)


def test_more_bytes_never_make_the_predicted_loss_larger(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model()
    losses = measured(model)
    names = list(losses)
    assert names == [*(name for block in block_linears(model) for name in block), *HEAD_PARTS]
    sizes = []
    for budget in (10_000, 60_000, 10**7):
        chosen = choose_eight_bits(model, INT4, losses, budget)
        sizes.append(len(chosen))
        forms = {
            name: stored.form for name, stored in rounded_model(model, INT4, chosen, WINDOWS).layers.items()
        }
        assert forms == {name: INT8 if name in chosen else INT4 for name in names}
    assert 0 < sizes[0] < sizes[1] < sizes[2] == len(names)
    assert choose_eight_bits(model, INT4, losses, 300) == ()


def test_few_layers_in_eight_bits_cost_little_time(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model()
    chosen = choose_eight_bits(model, INT4, measured(model))
    assert chosen
    shapes = {name: weight_of(model, name).shape for name in measured(model)}
    least = sum(bytes_of(shape, INT4) for shape in shapes.values())
    more = sum(bytes_of(shapes[name], INT8) - bytes_of(shapes[name], INT4) for name in chosen)
    assert 0 < more <= 0.03 * least
    # Of a model so small, a product more costs more than all else: what can be one layer stays one.
    assert all(len(group_of(name)) == 1 for name in chosen)


def test_layers_are_ordered_as_their_true_losses_order_them(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model()
    predicted, found = measured(model), {}
    with torch.inference_mode():
        before = model(WINDOWS).logits.log_softmax(-1)
        for name, form in product(predicted, (INT4, INT8)):
            weight = weight_of(model, name)
            kept = weight.clone()
            weight.copy_(round_to_nearest(read_weight(model, name), form).dequantize())
            after = model(WINDOWS).logits.log_softmax(-1)
            weight.copy_(kept)
            found[name, form] = float((before.exp() * (before - after)).sum(-1).mean())
    losses = (list(predicted.values()), [found[name, INT4] for name in predicted])
    ranks = [torch.tensor(each).argsort().argsort().double() for each in losses]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.85
    assert all(found[name, INT8] < 0.05 * found[name, INT4] for name in predicted)


def test_a_mixture_keeps_to_its_size_and_is_closer_than_int4(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", widths=(96, 64, 128, 40), attention_bias=True)
    plain = export(checkpoint, tmp_path / "plain", "int4")["int4"]
    allowed = plain.file_bytes + 20_000
    mixed = export(checkpoint, tmp_path / "mixed", "int4-mixed", mixed_bytes=allowed)["int4-mixed"]
    assert plain.file_bytes < mixed.file_bytes <= allowed == mixed.budget_bytes
    assert any(len(group_of(name)) > 1 for name in mixed.eight_bit_layers)  # the graph grows, too
    assert mixed.parity.kl_mean < plain.parity.kl_mean
    assert plain.budget_bytes is None
    assert len(plain.eight_bit_layers) < len(mixed.eight_bit_layers)
    for folder, record in (("plain", plain), ("mixed", mixed)):
        assert record.calibration_sha256 == tokens_sha256(WINDOWS)
        assert record.calibration_tokens == WINDOWS.numel()
        bits = bits_in(tmp_path / folder / record.file)
        names = [name for block in block_linears(load_pruned(checkpoint)) for name in block]
        assert bits == {name: 8 if name in record.eight_bit_layers else 4 for name in (*names, *HEAD_PARTS)}


@pytest.mark.parametrize("tied", [True, False])
def test_frequent_tokens_alone_may_have_eight_bits(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, tied: bool
) -> None:
    checkpoint = make_checkpoint("llama", tie_word_embeddings=tied)
    frequent_rows_lose_most(checkpoint / "model.safetensors", tied)
    model = load_pruned(checkpoint)
    losses = measured(model)
    choices = ((budget, choose_eight_bits(model, INT4, losses, budget)) for budget in range(500, 10**6, 500))
    budget, wanted = next((budget, chosen) for budget, chosen in choices if HEAD_PARTS[0] in chosen)
    assert HEAD_PARTS[1] not in wanted
    with pytest.raises(InputError, match="int4-mixed wants text"):
        export(checkpoint, tmp_path / "out", "int4-mixed", calibration=None)
    with pytest.raises(InputError, match="mixed_bytes") as refused:
        export(checkpoint, tmp_path / "out", "int4-mixed", mixed_bytes=1)
    assert not (tmp_path / "out").exists()
    least = int(re.findall(r"(\d+) or more", str(refused.value))[0])
    record = export(checkpoint, tmp_path / "out", "int4-mixed", mixed_bytes=least + budget)["int4-mixed"]
    assert record.eight_bit_layers == wanted
    bits = bits_in(tmp_path / "out" / record.file)
    assert [bits[part] for part in HEAD_PARTS] == [8, 4]
    # The look-up of a tied model reads both tables, and no third.
    tables = [
        n.inputs[0]
        for n in ir.load(tmp_path / "out" / record.file).graph
        if n.op_type == "GatherBlockQuantized"
    ]
    assert len(tables) == (2 if tied else 1)


def frequent_rows_lose_most(weights: Path, tied: bool) -> None:
    """Larger rows have larger steps: without this, it is chance which part of random rows loses more for a byte."""
    tensors = safetensors.torch.load_file(weights)
    head = tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]
    head[head_parts(len(head))[HEAD_PARTS[0]]] *= 4
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})


def bits_in(path: Path) -> dict[str, int]:
    """Of every Linear, as the graph multiplies by it."""
    graph = ir.load(path)
    assert graph.metadata_props["phoneready.calibration_sha256"] == tokens_sha256(WINDOWS)
    ends = {"logits": HEAD, "logits.0": HEAD_PARTS[0], "logits.1": HEAD_PARTS[1]}
    found = {str(n.name).removesuffix(".product"): n for n in graph.graph if n.op_type == "MatMulNBits"}
    return {
        part: node.attributes["bits"].as_int()
        for name, node in found.items()
        for part in packed_names(ends.get(name, name))
    }


def test_without_a_number_a_mixture_keeps_to_its_share_of_q4_0(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    # Wide enough that graphs, whose size does not depend on the weights, are a small part of the file.
    checkpoint = make_checkpoint(
        "llama", hidden_size=256, intermediate_size=1024, max_position_embeddings=128
    )
    records = export(checkpoint, tmp_path / "out", "int8", "int4-mixed")
    model = load_pruned(checkpoint)
    mixed = records["int4-mixed"]
    assert mixed.budget_bytes == default_budget(model)
    assert mixed.file_bytes <= mixed.budget_bytes < records["int8"].file_bytes
    assert 0 < len(mixed.eight_bit_layers) < 28
    blocks = sum(linear.weight.numel() for block in block_linears(model) for linear in block.values())
    ends = model.get_input_embeddings().weight.numel()
    vectors = 9 * 256
    assert default_budget(model) == math.floor(1.1 * (4.5 / 8 * blocks + 8.5 / 8 * ends + 4 * vectors))
    assert records["int8"].calibration_sha256 is None
