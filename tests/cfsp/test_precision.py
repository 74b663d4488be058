from __future__ import annotations

import pytest
import torch

from cfsp.precision import (
    bulk_dtype,
    bulk_products,
    exact_products,
    fast_dtype,
    product_dtype,
    products_in,
    rounding_dtype,
)


def product() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 512, generator=generator) @ torch.randn(512, 64, generator=generator)


def test_only_inside_the_context_products_are_rounded() -> None:
    exact = product()
    with products_in("float32", "cpu"):
        assert torch.equal(product(), exact)
    with products_in("bfloat16", "cpu"):
        rounded = product()
    assert torch.equal(product(), exact)
    error = float((rounded - exact).norm() / exact.norm())
    if rounding_dtype("bfloat16") == torch.bfloat16:
        # Inputs have eight significant bits; the sum of 512 products keeps float32's.
        assert 2**-12 < error < 2**-8
    else:
        assert error == 0


@pytest.mark.parametrize("has", [False, True])
def test_products_in_bulk_are_rounded_and_exact_ones_inside_them_are_not(
    monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    amx = torch.cpu._is_amx_tile_supported()
    monkeypatch.setattr("cfsp.precision._cpu_has", lambda name: has if name == "avx512_bf16" else amx)
    exact = product()
    with bulk_products("cpu"):
        rounded = product()
        with exact_products("cpu"):
            assert torch.equal(product(), exact)
    assert torch.equal(product(), exact)
    error = float((rounded.float() - exact).norm() / exact.norm())
    assert 2**-12 < error < 2**-7 if bulk_dtype() == torch.bfloat16 else error == 0
    assert bulk_dtype() == product_dtype("auto")
    assert (bulk_dtype() == torch.bfloat16) == (has or fast_dtype() == torch.bfloat16)


def test_auto_is_what_the_hardware_multiplies_faster() -> None:
    assert (fast_dtype() == torch.bfloat16) == torch.cpu._is_amx_tile_supported()
    assert product_dtype("float32") == torch.float32
    assert product_dtype("bfloat16") == torch.bfloat16
    assert product_dtype("float16") == rounding_dtype("float16") == torch.float32  # of weights alone
    assert fast_dtype("mps") == torch.float32
    assert rounding_dtype("float32") == torch.float32
    assert rounding_dtype("auto") == rounding_dtype("bfloat16") == fast_dtype()
