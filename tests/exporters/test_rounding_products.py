"""The matrix algebra that GPTQ rests on."""

from __future__ import annotations

import pytest
import torch

from cfsp.errors import InputError
from cfsp.pruning.reconstruction import damped_cholesky
from exporters.onnx.block_quantize import gptq, refine, round_to_nearest
from exporters.onnx.variants import INT4
from exporters.quantize.gptq import RIDGE
from exporters.quantize.triangular import invert_lower_


@pytest.mark.parametrize("size", [1, 5, 128, 129, 300, 1700])
def test_a_triangular_matrix_is_inverted_in_its_place(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64).tril() / size**0.5
    matrix.diagonal().add_(3)
    inverse = matrix.clone()
    assert invert_lower_(inverse) is inverse
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ matrix, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("columns", [200, 256, 560])
def test_a_wide_matrix_loses_hardly_more_in_coarser_products(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, columns, generator=generator)
    x = torch.randn(512, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    gram = (x.T @ x / len(x)).double()

    def lost() -> float:
        rounded = refine(weight, gram, gptq(weight, gram, INT4))
        return float((x @ (weight - rounded.dequantized()).T).square().mean())

    exact, asked = lost(), []

    def coarse(device_type: str) -> torch.dtype:
        asked.append(device_type)
        return torch.bfloat16

    monkeypatch.setattr("exporters.quantize.gptq._EXACT_COLUMNS", columns - 1)
    monkeypatch.setattr("exporters.quantize.refine._WIDE", columns - 1)
    monkeypatch.setattr("exporters.quantize.refine.bulk_dtype", coarse)
    assert lost() == pytest.approx(exact, rel=0.03)
    assert asked == ["cpu"]


def test_blocks_that_are_multiplied_together_know_what_those_before_them_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 560, generator=generator)
    x = torch.randn(512, 24, generator=generator) @ torch.randn(24, 560, generator=generator)
    gram = x.T @ x / len(x)
    first = round_to_nearest(weight, INT4)
    monkeypatch.setattr("exporters.quantize.refine._WIDE", 0)
    monkeypatch.setattr("exporters.quantize.refine.bulk_dtype", lambda _: torch.bfloat16)
    together = refine(weight, gram, first)
    monkeypatch.setattr("exporters.quantize.refine._TOGETHER", 1)
    apart = refine(weight, gram, first)
    assert (together.q != apart.q).float().mean() < 0.5 * (apart.q != first.q).float().mean()


def test_what_float32_cannot_factor_is_factored_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (1 + RIDGE) * (1 - 1e-9)  # one less than what would make the damped matrix singular
    gram = torch.block_diag(*[torch.tensor([[1.0, pair], [pair, 1.0]], dtype=torch.float64)] * 32)
    with pytest.raises(InputError):
        damped_cholesky(gram.float(), RIDGE)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    exact = gptq(weight, gram, INT4)
    monkeypatch.setattr("exporters.quantize.gptq._EXACT_COLUMNS", 63)
    assert torch.equal(gptq(weight, gram, INT4).q, exact.q)
