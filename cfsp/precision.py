"""The number format of matrix products: rounding their inputs to bfloat16 where the hardware multiplies that faster.

Sums stay in float32. Weights, residual streams and solutions are float32 always; only what goes into a product is
rounded, which on a processor with matrix units (AMX) makes a pass over text two to three times as fast. Training and
sums over many tokens also take products of tensors that are bfloat16, whose results are rounded as well (autocast).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRODUCTS = ("auto", "float32", "bfloat16")
"""Names of what goes into products."""
DTYPES = (*PRODUCTS, "float16")
"""Names of what weights are kept in (`cfsp.models.offload`); as one of products float16 is float32.

Nothing is multiplied in float16: some models' hidden states are too large for it, and most processors are slow at it.
"""


def fast_dtype(device_type: str = "cpu") -> torch.dtype:
    """bfloat16 where torch rounds float32 tensors to it for a faster product by itself, else float32.

    It does on GPUs that know it, and on processors with matrix units (AMX); with AVX512-BF16 alone it does not, and the
    tensors have to be bfloat16 (`bulk_dtype`). Of Apple's MPS it was never measured, so it is float32 there.
    """
    if device_type == "mps":
        return torch.float32
    fast = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device_type == "cuda"
        else _has_matrix_units()
    )
    return torch.bfloat16 if fast else torch.float32


def bulk_dtype(device_type: str = "cpu") -> torch.dtype:
    """bfloat16 where products of tensors that are bfloat16 are faster than float32's, which give bfloat16 then.

    So they are where `fast_dtype` is bfloat16, and with AVX512-BF16.
    """
    if device_type == "cpu" and _has_bfloat16_products():
        return torch.bfloat16
    return fast_dtype(device_type)


def _has_matrix_units() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_tile"))
    return torch.cpu._is_amx_tile_supported()  # torch before 2.10 says it in private alone


def _has_bfloat16_products() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.cpu._is_avx512_bf16_supported()


def product_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """The dtype of autocast products that a name in DTYPES means on a device; "auto" is bfloat16 where it is faster."""
    if name == "auto":
        return bulk_dtype(device_type)
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def rounding_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """What `products_in` rounds inputs to: without matrix units torch leaves float32 as it is, whatever the name.

    On a GPU that is TensorFloat-32, which has the range of float32 and three bits more than bfloat16, by whose name it
    goes here.
    """
    return fast_dtype(device_type) if name in ("auto", "bfloat16") else torch.float32


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


def casting(dtype: torch.dtype, device_type: str) -> torch.autocast:
    """A context in which matrix products are of tensors cast to the dtype, and their results with them; or as ever."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def bulk_products(device_type: str) -> Iterator[None]:
    """Matrix products of float32 tensors take their inputs in `bulk_dtype` inside the context.

    For what is summed up over many tokens: with AVX512-BF16 alone what a product gives is rounded, too, which adds half
    as much to the error again. Norms, rotations and the residual stream stay float32.
    """
    rounded = device_type == "cpu" and bulk_dtype(device_type) != fast_dtype(device_type)
    with products_in("auto", device_type), casting(torch.bfloat16 if rounded else torch.float32, "cpu"):
        yield


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Matrix products of float32 tensors are float32's inside the context, whatever holds around it."""
    with products_in("float32", device_type), torch.autocast("cpu", enabled=False):
        yield
