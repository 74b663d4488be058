"""Eight bits go where four cost most, budgets are held, and int4-mixed is closer than int4."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.architectures import block_linears
from cfsp.checkpoint import load_pruned
from cfsp.errors import InputError
from cfsp.gradients import predict_divergence
from cfsp.text import tokens_sha256
from exporters.onnx import export_onnx
from exporters.onnx.block_quantize import Rounded
from exporters.onnx.mixed import (
    EIGHT,
    FOUR,
    choose_eight_bits,
    choose_few,
    choose_mixture,
    default_budget,
    stored_bytes,
)
from exporters.onnx.quantize import quantize_linears
from exporters.onnx.variants import HEAD
from exporters.onnx.weights import has_company, packed_names
from exporters.record import ExportRecord, ParityLimits

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
    return {record.quant: record for record in export_onnx(checkpoint, output, variants, **settings)}


def in_four_bits(model: Any) -> dict[str, Rounded]:
    return quantize_linears(model, lambda *_: FOUR, WINDOWS)


@given(
    layers=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 100)), min_size=1, max_size=12),
    left=st.integers(0, 400),
)
def test_the_budget_is_held_and_used(layers: list[tuple[float, int]], left: int) -> None:
    losses = {str(i): loss for i, (loss, _) in enumerate(layers)}
    prices = {str(i): price for i, (_, price) in enumerate(layers)}
    chosen = choose_eight_bits(losses, prices, left)
    spent = sum(prices[name] for name in chosen)
    assert spent <= left
    assert all(prices[name] > left - spent for name in losses.keys() - set(chosen))
    best = max(losses, key=lambda name: losses[name] / prices[name])
    assert best in chosen or prices[best] > left


def test_more_bytes_never_make_the_predicted_loss_larger(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model()
    small = in_four_bits(model)
    names = list(small)
    assert names == [*(name for block in block_linears(model) for name in block), HEAD]
    sizes = []
    for budget in (10_000, 60_000, 10**7):
        mixture = choose_mixture(model, small, WINDOWS, 0, budget_bytes=budget)
        sizes.append(len(mixture.eight_bits))
        forms = {name: stored.form for name, stored in mixture.applied(model, small).items()}
        assert forms == {name: EIGHT if name in mixture.eight_bits else FOUR for name in names}
    assert 0 < sizes[0] < sizes[1] < sizes[2] == len(names)
    few = choose_mixture(model, small, WINDOWS, 0, budget_bytes=300)
    assert few.eight_bits == ()
    assert few.applied(model, small) == small


def test_few_layers_in_eight_bits_cost_little_time(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model()
    small = in_four_bits(model)
    chosen = choose_few(model, small, WINDOWS)
    assert chosen.eight_bits
    assert chosen.budget_bytes is None
    more = sum(map(stored_bytes, chosen.applied(model, small).values())) - sum(
        map(stored_bytes, small.values())
    )
    assert 0 < more <= 0.05 * sum(map(stored_bytes, small.values()))
    # Of a model so small, a product more costs more than all else: q, k and v stay in one.
    assert not any(map(has_company, chosen.eight_bits))


def test_layers_are_ordered_as_their_true_losses_order_them(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model()
    small = in_four_bits(model)
    weights = {name: model.get_submodule(name).weight for name in small}
    changes = {name: (lambda name=name: small[name].dequantized() - weights[name].detach()) for name in small}
    predicted = predict_divergence(model, changes, WINDOWS)
    measured = {}
    with torch.inference_mode():
        before = model(WINDOWS).logits.log_softmax(-1)
        for name, weight in weights.items():
            kept = weight.data
            weight.data = small[name].dequantized()
            after = model(WINDOWS).logits.log_softmax(-1)
            weight.data = kept
            measured[name] = float((before.exp() * (before - after)).sum(-1).mean())
    ranks = [
        torch.tensor(list(losses.values())).argsort().argsort().double() for losses in (predicted, measured)
    ]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.7


def test_a_mixture_keeps_to_its_size_and_is_closer_than_int4(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", widths=(96, 64, 128, 40))
    plain = export(checkpoint, tmp_path / "plain", "int4")["int4"]
    allowed = plain.file_bytes + 20_000
    mixed = export(checkpoint, tmp_path / "mixed", "int4-mixed", mixed_bytes=allowed)["int4-mixed"]
    assert plain.file_bytes < mixed.file_bytes <= allowed == mixed.budget_bytes
    assert any(map(has_company, mixed.eight_bit_layers))  # the graph grows, too
    assert mixed.parity.kl_mean < plain.parity.kl_mean
    assert plain.budget_bytes is None
    assert len(plain.eight_bit_layers) < len(mixed.eight_bit_layers)
    for folder, record in (("plain", plain), ("mixed", mixed)):
        assert record.calibration_sha256 == tokens_sha256(WINDOWS)
        assert record.calibration_tokens == WINDOWS.numel()
        bits = bits_in(tmp_path / folder / record.file)
        names = [name for block in block_linears(load_pruned(checkpoint)) for name in block]
        assert bits.pop("logits") == (8 if HEAD in record.eight_bit_layers else 4)
        assert bits == {name: 8 if name in record.eight_bit_layers else 4 for name in names}


def bits_in(path: Path) -> dict[str, int]:
    """Of every Linear, as the graph multiplies by it."""
    graph = ir.load(path)
    assert graph.metadata_props["phoneready.calibration_sha256"] == tokens_sha256(WINDOWS)
    return {
        name: node.attributes["bits"].as_int()
        for node in graph.graph
        if node.op_type == "MatMulNBits"
        for name in packed_names(str(node.name).removesuffix(".product"))
    }


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("qwen2", {"tie_word_embeddings": False}), ("qwen3", {}), ("llama", {"attention_bias": True})],
)
def test_what_ties_norms_or_adds_is_exported_in_few_bits(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(architecture, **config)
    # Room for all in eight bits.
    records = export(checkpoint, tmp_path / "out", "int4", "int4-b128", "int4-mixed", mixed_bytes=10**7)
    names = [name for block in block_linears(load_pruned(checkpoint)) for name in block]
    assert records["int4-mixed"].eight_bit_layers == (*names, HEAD)
    assert records["int4-mixed"].parity.kl_mean < records["int4"].parity.kl_mean
    for record in records.values():
        bits = bits_in(tmp_path / "out" / record.file)
        assert bits.pop("logits") == (8 if HEAD in record.eight_bit_layers else 4)
        assert bits == {name: 8 if name in record.eight_bit_layers else 4 for name in names}


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


def test_what_a_mixture_cannot_be_made_of_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    with pytest.raises(InputError, match="int4-mixed wants text"):
        export(checkpoint, tmp_path / "out", "int4-mixed", calibration=None)
    with pytest.raises(InputError, match=r"mixed_bytes.*1000.*or more"):
        export(checkpoint, tmp_path / "out", "int4-mixed", mixed_bytes=1000)
    assert not list(tmp_path.iterdir())
