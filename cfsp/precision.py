"""The number format of matrix products: rounding their inputs to bfloat16 where the hardware multiplies that faster.

Sums stay in float32. Weights, residual streams and solutions are float32 always; only what goes into a product is
rounded, which on a processor with matrix units (AMX) makes a pass over text two to three times as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = ("auto", "float32", "bfloat16")


def fast_dtype(device_type: str = "cpu") -> torch.dtype:
    """bfloat16 where a GPU knows it, or this CPU has matrix units for it (AMX), else float32.

    AVX512-BF16 alone is no faster.
    """
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device_type == "cuda"
        else _has_matrix_units()
    )
    return torch.bfloat16 if fast else torch.float32


def _has_matrix_units() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_tile"))
    return torch.cpu._is_amx_tile_supported()  # torch before 2.10 says it in private alone


def product_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """The dtype that a name in DTYPES means on a device; "auto" is bfloat16 where it is faster."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    return fast_dtype(device_type)


def rounding_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """What `products_in` rounds inputs to: without matrix units torch leaves float32 as it is, whatever the name.

    On a GPU that is TensorFloat-32, which has the range of float32 and three bits more than bfloat16, by whose name it
    goes here.
    """
    return torch.float32 if name == "float32" else fast_dtype(device_type)


@contextmanager
def products_in(name: str, device_type: str) -> Iterator[None]:
    """Matrix products of float32 tensors on a device take their inputs in `rounding_dtype` inside the context."""
    before = torch.get_float32_matmul_precision()
    rounds = rounding_dtype(name, device_type) == torch.bfloat16
    torch.set_float32_matmul_precision("medium" if rounds else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
