"""Rounding to blocks of few bits: bounds, GPTQ against nearest numbers, and what the model becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.models.architectures import block_linears
from exporters.onnx import BlockFormat
from exporters.onnx.decoder_graph import OPSET
from exporters.onnx.layers import CONTRIB, GraphBuilder, NBits, Stacked
from exporters.onnx.matrix import joined, round_to_nearest
from exporters.onnx.quantize import QuantizedModel, formats_without_text, quantize_linears
from exporters.onnx.variants import HEAD, INT4, INT8
from exporters.onnx.weights import HEAD_PARTS, Int8Weights
from exporters.quantize.rounding import fit


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32, 128]),
    seed=st.integers(0, 99),
)
def test_no_number_moves_further_than_its_step(
    rows: int, columns: int, bits: int, block_size: int, seed: int
) -> None:
    weight, form = weights(rows, columns, seed), BlockFormat(bits, block_size)
    rounded = round_to_nearest(weight, form)
    assert rounded.q.shape == (rows, -(-columns // block_size), block_size)
    assert int(rounded.q.max()) < 2**bits
    step = rounded.scales.float().abs().repeat_interleave(block_size, 1)[:, :columns]
    inside = weight.abs() <= step * (form.half - 1)
    error = (rounded.dequantize() - weight).abs()
    assert bool((error <= 0.5001 * step)[inside].all())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_on_its_grid_is_kept(bits: int) -> None:
    form = BlockFormat(bits, 32)
    assert float(round_to_nearest(torch.zeros(3, 64), form).dequantize().abs().max()) == 0
    q = torch.randint(0, 2**bits, (6, 2, 32), generator=torch.Generator().manual_seed(0)).float()
    q[..., 0] = 0  # the extreme, so that the grid is found
    weight = ((q - form.half) * 0.25).flatten(1)
    torch.testing.assert_close(round_to_nearest(weight, form).dequantize(), weight, atol=0, rtol=0)


@pytest.mark.usefixtures("no_avx512_bf16")
def test_layers_that_read_the_same_are_rounded_as_each_alone(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model()[0]
    ids = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(3))
    found = quantize_linears(model, lambda *_: INT4, ids)
    first = block_linears(model)[0]
    hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)).detach()
    hidden[:, 0] *= (0.25 * ids.shape[1]) ** 0.5  # the attention sink's weight
    flat = hidden.flatten(0, 1)
    gram = flat.T @ flat / len(flat)
    for part in ("q_proj", "k_proj", "v_proj"):
        (linear,) = (linear for name, linear in first.items() if name.endswith(part))
        weight = linear.weight.detach()
        alone = fit(weight, round_to_nearest(weight, INT4, gram.diagonal()), gram)
        (rounded,) = (one for name, one in found.items() if name.endswith(f"layers.0.self_attn.{part}"))
        assert (rounded.q != alone.q).float().mean() < 0.01
        assert rounded.q.shape == alone.q.shape


def test_a_large_matrix_is_rounded_a_few_rows_at_a_time(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny_model()
    ids = torch.randint(0, 300, (2, 64), generator=torch.Generator().manual_seed(3))
    whole = quantize_linears(model, lambda *_: INT4, ids)
    monkeypatch.setattr("exporters.onnx.quantize._AT_ONCE", 50 * 64)
    parts = quantize_linears(model, lambda *_: INT4, ids)
    for name, rounded in whole.items():
        assert parts[name].q.shape == rounded.q.shape
        assert (parts[name].q == rounded.q).float().mean() > 0.999  # sums differ in their last bits


def test_packed_bytes_hold_the_low_number_first() -> None:
    rounded = round_to_nearest(weights(2, 32), INT4)
    data = rounded.packed()
    assert torch.equal(data & 15, rounded.q[..., 0::2])
    assert torch.equal(data >> 4, rounded.q[..., 1::2])
    both = joined([rounded, rounded])
    assert torch.equal(both.dequantize(), torch.cat([rounded.dequantize()] * 2))


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_matrix_is_rounded_for_what_it_multiplies(
    tiny_model: Callable[..., Any], tied: bool
) -> None:
    model, _ = tiny_model("llama", tie_word_embeddings=tied)
    ids = torch.randint(0, model.config.vocab_size, (8, 96), generator=torch.Generator().manual_seed(0))
    head = model.get_output_embeddings().weight.detach().clone()
    table = model.get_input_embeddings().weight.detach()

    def form_of(name: str, block: int, blocks: int) -> BlockFormat:
        return INT4 if name == HEAD else INT8

    with torch.inference_mode():
        x = model.get_decoder()(ids).last_hidden_state.flatten(0, 1)
    found = {text is None: quantize_linears(model, form_of, text) for text in (ids, None)}
    guided, nearest = (joined([found[key][part] for part in HEAD_PARTS]) for key in (False, True))
    guided_loss, nearest_loss = (
        float((x @ (stored.dequantize() - head).T).square().mean()) for stored in (guided, nearest)
    )
    assert guided_loss < 0.8 * nearest_loss
    embedding = QuantizedModel(found[False]).table(table, tied=tied)
    assert isinstance(embedding, NBits)
    assert embedding.weight.form.bits == (4 if tied else 8)
    if tied:
        assert torch.equal(embedding.weight.q, guided.q)


def test_without_text_eight_bits_go_where_most_models_lose_most(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("qwen2")
    given = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    names = [name for block in block_linears(model) for name in block]
    for text in (None, ids):
        done: list[tuple[int, int]] = []
        report = lambda _, a, b, done=done: done.append((a, b))  # noqa: E731
        found = quantize_linears(model, formats_without_text(INT4, "down_proj"), text, progress=report)
        assert list(found) == [*names, *HEAD_PARTS]
        assert done == [(i, 5) for i in range(1, 6)]
        eight = {name for name, rounded in found.items() if rounded.form == INT8}
        assert {*HEAD_PARTS, "model.layers.2.self_attn.v_proj", "model.layers.0.mlp.down_proj"} <= eight
        assert len(eight) == 2 + 4 + 4
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())


def graph_of(builder: GraphBuilder, given: ir.Value, *outputs: ir.Value) -> ir.Graph:
    nodes, initializers = builder.tape.nodes, builder.tape.initializers
    opsets = {"": OPSET, CONTRIB: 1}
    return ir.Graph(
        [given], outputs, nodes=nodes, initializers=initializers, name="tested", opset_imports=opsets
    )


def test_a_token_as_large_as_an_attention_sink_takes_nothing_from_the_others() -> None:
    weight, bias, x = weights(24, 40), weights(1, 24, 1)[0], weights(6, 40, 2)
    x[0] *= 1000
    x[5] = 0
    layer = Int8Weights().layer("layer", weight, bias)
    builder = GraphBuilder()
    given = ir.val("x", ir.DataType.FLOAT, ["batch_size", "sequence_length", 40])
    output = layer.apply(builder, given, "y")
    graph = graph_of(builder, given, output)
    (product,) = (node for node in graph if node.op_type == "MatMulInteger")
    # Where a processor lacks VNNI, unsigned times signed overflows; not every machine that tests this one does.
    assert [factor.dtype for factor in product.inputs[:2] if factor] == [ir.DataType.UINT8] * 2
    file = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    (found,) = onnxruntime.InferenceSession(file).run(None, {"x": x[None].numpy()})
    exact = x @ weight.T + bias
    error = (torch.from_numpy(found[0]) - exact).norm(dim=1) / exact.norm(dim=1)
    assert float(error.max()) < 0.02
    torch.testing.assert_close(torch.from_numpy(found[0, 5]), bias)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 40])
def test_rows_of_an_embedding_are_looked_up_as_they_are_stored(columns: int, bits: int) -> None:
    rounded = round_to_nearest(weights(11, columns), BlockFormat(bits, 32))
    builder = GraphBuilder()
    given = ir.val("ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    output = NBits(rounded).look_up(builder, given, "rows")
    graph = graph_of(builder, given, output)
    file = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    ids = torch.tensor([[3, 10, 0], [10, 1, 2]])
    (found,) = onnxruntime.InferenceSession(file).run(None, {"ids": ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), rounded.dequantize()[ids])


@pytest.mark.parametrize("columns", [64, 40])
def test_a_table_of_two_formats_is_one_table(columns: int) -> None:
    table = weights(11, columns)
    first, rest = (round_to_nearest(rows, form) for rows, form in ((table[:4], INT8), (table[4:], INT4)))
    stacked = Stacked((NBits(first, stored_name="first"), NBits(rest, stored_name="rest")))
    builder = GraphBuilder()
    given = ir.val("ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    rows = stacked.look_up(builder, given, "rows")
    logits = stacked.apply(builder, rows, "logits")
    graph = graph_of(builder, given, rows, logits)
    file = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    ids = torch.tensor([[3, 10, 0, 4], [10, 1, 2, 5]])
    found, products = onnxruntime.InferenceSession(file).run(None, {"ids": ids.numpy()})
    stored = torch.cat([first.dequantize(), rest.dequantize()])
    torch.testing.assert_close(torch.from_numpy(found), stored[ids])
    exact = stored[ids] @ stored.T
    assert float((torch.from_numpy(products) - exact).norm() / exact.norm()) < 0.02
    matrices = [name for name in graph.initializers if ".q" in name]
    assert sorted(matrices) == ["first.q8", "rest.q4"]
