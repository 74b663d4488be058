"""The matrix algebra that GPTQ rests on."""

from __future__ import annotations

import pytest
import torch

from exporters.rounding.triangular import invert_lower_


@pytest.mark.parametrize("size", [1, 5, 128, 129, 300, 1700])
def test_a_triangular_matrix_is_inverted_in_its_place(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64).tril() / size**0.5
    matrix.diagonal().add_(3)
    inverse = matrix.clone()
    assert invert_lower_(inverse) is inverse
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ matrix, torch.eye(size, dtype=torch.float64))
