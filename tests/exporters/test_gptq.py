"""GPTQ and coordinate descent: against their definitions, against nearest numbers, and the algebra they rest on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ternary import Ternary

from cfsp.errors import InputError
from cfsp.models.checkpoint import RoundedFormat
from cfsp.pruning.block_by_block import damped_cholesky
from exporters.onnx import BlockFormat
from exporters.onnx.matrix import Rounded, round_to_nearest
from exporters.onnx.variants import INT4
from exporters.quantize import Placed
from exporters.quantize.rounding import RIDGE, fit, gptq_codes, invert_lower_, refine_codes
from exporters.quantize.training import RoundedModel


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


@pytest.mark.parametrize("columns", [64, 72])
def test_gptq_loses_less_of_the_output_than_nearest_numbers(columns: int) -> None:
    weight, x, form = weights(48, columns), correlated_inputs(columns), INT4
    gram = x.T @ x / len(x)

    def lost(approximation: torch.Tensor) -> float:
        return float((x @ (weight - approximation).T).square().mean())

    nearest = lost(round_to_nearest(weight, form, gram.diagonal()).dequantize())
    assert lost(gptq(weight, gram, form).dequantize()) < 0.5 * nearest


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

    exact, asked = lost(), []

    def coarse(device_type: str) -> torch.dtype:
        asked.append(device_type)
        return torch.bfloat16

    monkeypatch.setattr("exporters.quantize.rounding._EXACT_COLUMNS", columns - 1)
    monkeypatch.setattr("exporters.quantize.rounding._WIDE", columns - 1)
    monkeypatch.setattr("exporters.quantize.rounding.bulk_dtype", coarse)
    assert lost() == pytest.approx(exact, rel=0.03)
    assert asked == ["cpu"]


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
