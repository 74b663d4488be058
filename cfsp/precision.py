"""The number format of matrix products: rounding their inputs to bfloat16 where the hardware multiplies that faster.

Sums stay in float32. Weights, residual streams and solutions are float32 always; only what goes into a product is
rounded, which on a processor with matrix units (AMX) makes a pass over text two to three times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = ("auto", "float32", "bfloat16")


def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU has matrix units for it (AMX), else float32: AVX512-BF16 alone is no faster."""
    return torch.bfloat16 if _has_matrix_units() else torch.float32


def _has_matrix_units() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_tile"))
    return torch.cpu._is_amx_tile_supported()  # torch before 2.10 says it in private alone


def product_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """The dtype that a name in DTYPES means on a device; "auto" is bfloat16 where it is faster."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return fast_dtype()


def rounding_dtype(name: str) -> torch.dtype:
    """What `products_in` rounds inputs to: without matrix units torch leaves float32 as it is, whatever the name."""
    return torch.float32 if name == "float32" else fast_dtype()


@contextmanager
def products_in(name: str) -> Iterator[None]:
    """Matrix products of float32 tensors on the CPU take their inputs in `rounding_dtype` inside the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if rounding_dtype(name) == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
