"""Rounding and what it rests on: GPTQ, the walk over blocks, blocks of few bits, mixtures, trained scales."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from ternary import Ternary

from cfsp.errors import InputError
from cfsp.models.architectures import attention_of, block_linears, decoder_layers, spec_for
from cfsp.models.checkpoint import RoundedFormat, load_pruned
from cfsp.precision import exact_products, fast_dtype
from cfsp.pruning.block_by_block import damped_cholesky
from cfsp.pruning.statistics import input_hook
from cfsp.text.tokens import tokens_sha256
from exporters.export_record import ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.onnx.decoder_graph import OPSET, decoder_graph
from exporters.onnx.export import export_onnx
from exporters.onnx.layers import (
    CONTRIB,
    HEAD_PARTS,
    GraphBuilder,
    Int8Weights,
    NBits,
    Stacked,
    Weights,
    group_of,
    head_parts,
    packed_names,
    read_weight,
    weight_of,
)
from exporters.onnx.matrix import Rounded, joined, round_to_nearest
from exporters.onnx.quantize import (
    Losses,
    QuantizedModel,
    bytes_of,
    choose_eight_bits,
    default_budget,
    formats_without_text,
    measure,
    quantize_linears,
    rounded_model,
    tune,
)
from exporters.onnx.variants import HEAD, INT4, INT8, BlockFormat
from exporters.quantize import Placed
from exporters.quantize.rounding import RIDGE, fit, gptq_codes, invert_lower_, refine_codes
from exporters.quantize.training import RoundedModel
from exporters.quantize.walk import Readings, round_blocks


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(columns: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(512, 24, generator=generator) @ torch.randn(24, columns, generator=generator)


def gptq(weight: torch.Tensor, gram: torch.Tensor, form: BlockFormat) -> Rounded:
    nearest = round_to_nearest(weight, form, gram.diagonal())
    return nearest.with_codes(gptq_codes(weight, nearest.scales.float(), nearest.grid, gram))


def refine(weight: torch.Tensor, gram: torch.Tensor, rounded: Rounded) -> Rounded:
    codes = (rounded.q.flatten(1)[:, : rounded.columns].float() - rounded.form.half).T
    return rounded.with_codes(*refine_codes(weight, codes, rounded.scales.float(), rounded.grid, gram))


@pytest.mark.parametrize(("columns", "form"), [(64, INT4), (72, INT4), (200, BlockFormat(4, 128))])
def test_refining_takes_loss_away_and_keeps_what_is_exact(columns: int, form: BlockFormat) -> None:
    weight, x = weights(48, columns), correlated_inputs(columns)
    weight[5] = 0
    weight[6, : form.block_size] = 0
    gram = x.T @ x / len(x)
    first = gptq(weight, gram, form)
    refined = refine(weight, gram, first)

    def lost(rounded: Rounded) -> torch.Tensor:
        return (x @ (weight - rounded.dequantize()).T).square().mean(0)

    assert float(lost(refined).mean()) < 0.97 * float(lost(first).mean())
    assert bool(torch.isfinite(refined.scales).all())
    assert float(refined.dequantize()[5].abs().max()) == 0
    assert refined.q.dtype == torch.uint8
    assert refined.q.shape == first.q.shape
    exact, off = refined.dequantize(), replace(refined, scales=(refined.scales * 1.05).half())
    torch.testing.assert_close(refine(exact, gram, refined).dequantize(), exact, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(refine(exact, gram, off).dequantize(), exact, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("least", [1e-7, 1e-9])
def test_numbers_smaller_than_float16_become_zeros(least: float) -> None:
    weight = weights(3, 64)
    weight[1] = 0
    weight[1, 5] = least
    weight[2, :32] = 0
    weight[2, 3] = least
    x = correlated_inputs(64)
    gram = x.T @ x / len(x)
    found = gptq(weight, gram, INT4)
    for rounded in (found, refine(weight, gram, found)):
        values = rounded.dequantize()
        assert values.isfinite().all()
        assert (values[1].abs() <= 1e-6).all()
        assert (values - weight).abs().max() < 0.5
        lost = (values - weight)[2]
        assert lost @ gram @ lost < 0.02 * (weight[2] @ gram @ weight[2])


@pytest.mark.parametrize("columns", [64, 72])
def test_gptq_makes_up_for_each_column_by_those_after_it(columns: int) -> None:
    """Against the definition, column by column in double precision with H^-1 itself (Frantar et al., eq. 3)."""
    x = correlated_inputs(columns).double()
    gram = x.T @ x / len(x)
    weight = weights(5, columns)
    found = gptq(weight, gram.float(), INT4)
    damped = gram + RIDGE * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = gram.diagonal().argsort(descending=True).tolist()
    scales = found.scales.double().repeat_interleave(32, 1)
    left, done = weight.double().clone(), []
    for j in order:
        rest = [i for i in order if i not in done]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        here = rest.index(j)
        number = (left[:, j] / scales[:, j]).round().clamp(-8, 7)
        error = (left[:, j] - number * scales[:, j]) / inverse[here, here]
        assert torch.equal(number + 8, found.q.flatten(1)[:, j].double())
        left[:, rest] -= error[:, None] * inverse[here]
        done.append(j)


@pytest.mark.parametrize("size", [1, 129, 1700])
def test_a_triangular_matrix_is_inverted_in_its_place(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64).tril() / size**0.5
    matrix.diagonal().add_(3)
    inverse = matrix.clone()
    assert invert_lower_(inverse) is inverse
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ matrix, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("columns", [200, 560])
def test_a_wide_matrix_loses_hardly_more_in_coarser_products(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, columns, generator=generator)
    x = torch.randn(512, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    gram = (x.T @ x / len(x)).double()

    def lost() -> float:
        rounded = refine(weight, gram, gptq(weight, gram, INT4))
        return float((x @ (weight - rounded.dequantize()).T).square().mean())

    found, asked = lost(), []

    def exactly(device_type: str) -> AbstractContextManager[None]:
        asked.append(device_type)
        return exact_products(device_type)

    monkeypatch.setattr("exporters.quantize.rounding.exact_sums", exactly)
    assert found == pytest.approx(lost(), rel=0.03)
    monkeypatch.setattr("exporters.quantize.rounding._EXACT_COLUMNS", columns - 1)
    assert found == pytest.approx(lost(), rel=0.03)
    assert {*asked} == {"cpu"}


def test_what_float32_cannot_factor_is_factored_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (1 + RIDGE) * (1 - 1e-9)  # one less than what would make the damped matrix singular
    gram = torch.block_diag(*[torch.tensor([[1.0, pair], [pair, 1.0]], dtype=torch.float64)] * 32)
    with pytest.raises(InputError):
        damped_cholesky(gram.float(), RIDGE)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    exact = gptq(weight, gram, INT4)
    monkeypatch.setattr("exporters.quantize.rounding._EXACT_COLUMNS", 63)
    assert torch.equal(gptq(weight, gram, INT4).q, exact.q)


def test_a_grid_of_one_file_is_rounded_for_its_inputs_and_trained(tiny_model: Callable[..., Any]) -> None:
    weight, x = weights(48, 128), correlated_inputs(128)
    nearest = Ternary.nearest(weight)
    found = fit(weight, nearest, x.T @ x / len(x))

    def lost(matrix: Ternary) -> float:
        return float((x @ (weight - matrix.dequantize()).T).square().mean())

    assert lost(found) < 0.5 * lost(nearest)
    model, _ = tiny_model()
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach()
    matrix = Ternary.nearest(weight.clone())
    placed = Placed(
        matrix, lambda m, values: m.get_submodule(name).weight.copy_(values), lambda f: f[0], (name,), 16
    )
    rounded = RoundedModel(RoundedFormat("ternary", {name: "ternary"}, None), {name: placed})
    rounded.attach(model)
    torch.testing.assert_close(model.get_submodule(name).weight, matrix.dequantize())
    with torch.no_grad():
        model.get_submodule(name).parametrizations.weight[0].changes[3] = 0.25
    numbers = rounded.finish(model)
    assert torch.equal(numbers.tensors[f"{name}.codes"], matrix.codes)
    scales = numbers.tensors[f"{name}.scales"]
    torch.testing.assert_close(scales[3], (matrix.scales[3].float() * 1.25).half())
    assert torch.equal(scales[4:], matrix.scales[4:])
    stored = Ternary(numbers.tensors[f"{name}.codes"], scales).dequantize()
    torch.testing.assert_close(model.get_submodule(name).weight, stored)


IDS = torch.randint(0, 300, (3, 32), generator=torch.Generator().manual_seed(3))


def changed(weight: torch.Tensor) -> torch.Tensor:
    return weight.sign() * weight.abs().mean()


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("gemma3_text", {}),
        ("gemma4_text", {}),
        ("gemma4_text", {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}),
    ],
)
def test_each_layer_is_rounded_for_what_all_rounded_ones_before_it_give(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model_type: str, settings: dict[str, int]
) -> None:
    """Those of its own block, too: the inputs are those of a run of the model as it is in the end."""
    monkeypatch.setattr("exporters.quantize.walk.bulk_products", exact_products)
    monkeypatch.setattr("exporters.quantize.walk.exact_sums", exact_products)
    model = tiny_model(model_type, **settings)[0]
    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    given = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    seen: dict[str, torch.Tensor] = {}
    together: list[set[str]] = []

    def visit(index: int, readings: Readings) -> dict[str, torch.Tensor]:
        seen.update({name: reading.gram for name, reading in readings.items()})
        together.append({name.rpartition(".")[2] for name in readings})
        assert all(name in block_linears(model)[index] for name in readings)
        return {name: changed(given[name]) for name in readings}

    head = round_blocks(model, IDS, visit)
    ffn = [{"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    if (inputs_of := spec_for(model.config).block_inputs) and settings.get(inputs_of.size_setting) != 0:
        ffn += [{inputs_of.gate}, {inputs_of.output}]
    own = [attention_of(model, layer) is not None for layer in decoder_layers(model)]
    kinds = [[{"q_proj", *(["k_proj", "v_proj"] if keys else [])}, *ffn] for keys in own]
    assert together == [names for block in kinds for names in block]
    assert all(torch.equal(linear.weight, given[name]) for name, linear in linears.items())

    inputs: dict[str, torch.Tensor] = {}
    with torch.no_grad(), ExitStack() as stack:
        for name, linear in linears.items():
            linear.weight.copy_(changed(given[name]))
            stack.enter_context(input_hook(linear, partial(inputs.__setitem__, name)))
        last = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    for name, x in (*inputs.items(), ("head", last)):
        if not name.endswith(("q_proj", "k_proj", "v_proj")):  # the first token counts more there
            flat = x.flatten(0, -2).double()
            found = head if name == "head" else seen[name]
            torch.testing.assert_close(found, flat.T @ flat / len(flat), rtol=1e-3, atol=1e-4)


def test_inputs_are_summed_exactly_where_the_model_runs_in_rounded_products(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums rounded to bfloat16 are not positive definite beside massive channels, and GPTQ cannot solve them."""
    monkeypatch.setattr("exporters.quantize.walk.bulk_products", _autocast)
    model = tiny_model("llama")[0]
    read: dict[str, torch.Tensor] = {}

    def visit(index: int, readings: Readings) -> dict[str, torch.Tensor]:
        for name, reading in readings.items():
            if name.endswith(("o_proj", "gate_proj", "down_proj")):
                x = read[name].to(fast_dtype()).double().flatten(0, -2)
                torch.testing.assert_close(reading.gram, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
                checked.add(name.rpartition(".")[2])
        return {}

    checked: set[str] = set()
    with ExitStack() as stack:
        for block in block_linears(model):
            for name, linear in block.items():
                stack.enter_context(input_hook(linear, partial(read.__setitem__, name)))
        round_blocks(model, IDS, visit)
    assert checked == {"o_proj", "gate_proj", "down_proj"}


def _autocast(device_type: str) -> torch.autocast:
    return torch.autocast(device_type, torch.bfloat16)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "gemma4_text"])
def test_a_share_of_earlier_errors_is_taken_back(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """W' is the least-squares answer, with GPTQ's ridge, to what outputs lack beside the exact stream."""
    monkeypatch.setattr("exporters.quantize.walk.bulk_products", exact_products)
    monkeypatch.setattr("exporters.quantize.walk.exact_sums", exact_products)
    model = tiny_model(model_type)[0]
    linears = {name: linear for block in block_linears(model) for name, linear in block.items()}
    given = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    wanted: dict[str, torch.Tensor] = {}
    exact, _ = _streams(model, linears)

    def visit(_: int, readings: Readings) -> dict[str, torch.Tensor]:
        wanted.update({name: reading.weight for name, reading in readings.items()})
        return {name: changed(reading.weight) for name, reading in readings.items()}

    round_blocks(model, IDS, visit, correction=0.4)
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(changed(wanted[name]))
    here, _ = _streams(model, linears)
    for name, weight in wanted.items():
        if name.endswith(("q_proj", "k_proj", "v_proj")):  # the first token counts more there
            continue
        x = here[name].flatten(0, -2).double()
        lack = (exact[name].flatten(0, -2).double() - x) @ given[name].double().T
        if name.endswith(("o_proj", "down_proj")) and "gemma" not in model_type:  # whose norms come between
            lack += _sum_before(name, exact) - _sum_before(name, here)
        gram = x.T @ x / len(x)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        change = torch.linalg.solve(gram + ridge, x.T @ lack / len(x)).T
        torch.testing.assert_close(weight.double(), given[name] + 0.4 * change, rtol=1e-3, atol=1e-4)


def _streams(model: Any, linears: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What each Linear reads in a run of the model, and each norm before it; and what comes out."""
    reads: dict[str, torch.Tensor] = {}
    with torch.no_grad(), ExitStack() as stack:
        for name, module in (*linears.items(), *model.named_modules()):
            if name in linears or name.endswith("layernorm"):
                stack.enter_context(input_hook(module, partial(reads.__setitem__, name)))
        last = model.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state
    return reads, last


def _sum_before(name: str, reads: dict[str, torch.Tensor]) -> torch.Tensor:
    norm = "input_layernorm" if name.endswith("o_proj") else "post_attention_layernorm"
    return reads[f"{name.rsplit('.', 2)[0]}.{norm}"].flatten(0, -2).double()


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
    chosen = choose_eight_bits(model, INT4, losses)  # by what they cost in time
    shapes = {name: weight_of(model, name).shape for name in losses}
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
    assert records["int8"].calibration_sha256 is None


TEXT, UNSEEN = (
    torch.randint(0, 384, (count, 64), generator=torch.Generator().manual_seed(seed))
    for seed, count in ((0, 24), (1, 8))
)


def divergence(model: Any, quantized: QuantizedModel) -> float:
    """KL from the model on unseen text, in torch."""
    changed = copy.deepcopy(model)
    with torch.inference_mode():
        for name, stored in quantized.layers.items():
            weight_of(changed, name).copy_(stored.dequantize())
        for name, norm in quantized.norms.items():
            changed.get_parameter(name).copy_(norm)
        before, after = (m(UNSEEN).logits.log_softmax(-1) for m in (model, changed))
        return float((before.exp() * (before - after)).sum(-1).mean())


def test_tuning_brings_a_model_closer_on_text_it_has_not_seen(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama", attention_bias=True, tied=False)
    given = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
                given[name] = parameter.clone()
    rounded = quantize_linears(model, lambda *_: INT8, None)
    # What layers do together: each a little too large.
    layers = {
        n: r if n in HEAD_PARTS else r.scaled(torch.full((len(r.q), 1), 1.03)) for n, r in rounded.items()
    }
    given_layers = QuantizedModel(layers)
    steps: list[tuple[int, int]] = []
    tuned = tune(model, given_layers, TEXT, progress=lambda _, done, total: steps.append((done, total)))
    assert steps == [(i, len(TEXT)) for i in range(1, len(TEXT) + 1)]
    assert divergence(model, tuned) < 0.8 * divergence(model, given_layers)
    assert list(tuned.layers) == list(layers)
    assert all(torch.equal(tuned.layers[name].q, stored.q) for name, stored in layers.items())
    assert all(tuned.layers[part] is layers[part] for part in HEAD_PARTS)
    assert tuned.norms.keys() == {name for name in given if name.endswith("norm.weight")}
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_tuned_norms_are_what_the_graph_gets(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("qwen3")
    names = [name for name, _ in model.named_parameters() if name.endswith("norm.weight")]
    norms = {name: torch.full_like(model.get_parameter(name), i + 2) for i, name in enumerate(names)}
    graph = decoder_graph(model, Weights(norms=norms), name="tuned").graph
    stored = [v.const_value.numpy() for n, v in graph.initializers.items() if "norm" in n and v.const_value]
    assert sorted({float(vector[0]) for vector in stored}) == list(range(2, len(names) + 2))
