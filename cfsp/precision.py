"""The number format of matrix products: rounding their inputs to bfloat16 where the hardware multiplies that.

Sums stay in float32. Weights, residual streams and solutions are float32 always; only what goes into a product is
rounded, which on a processor with such units makes a pass over text two to three times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["DTYPES", "fast_dtype", "product_dtype", "products_in"]

DTYPES = ("auto", "float32", "bfloat16")


def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it in hardware, else float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return torch.bfloat16 if supported is not None and supported() else torch.float32


def product_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """The dtype that a name in DTYPES means on a device; "auto" is bfloat16 where the hardware multiplies it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return fast_dtype()


@contextmanager
def products_in(name: str) -> Iterator[None]:
    """Matrix products of float32 tensors on the CPU take their inputs in that dtype inside the context."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if product_dtype(name) == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
