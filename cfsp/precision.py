"""The number format of matrix products: rounding their inputs to bfloat16 if the hardware multiplies that faster.

Sums, weights, residual streams and solutions stay float32. On a processor with matrix units (AMX) that makes a pass two
to three times as fast. Training, and sums over many tokens, also take products of bfloat16 tensors (autocast), whose
results are rounded as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRODUCTS = ("auto", "float32", "bfloat16")  # what goes into products
DTYPES = (*PRODUCTS, "float16")
"""What weights are kept in. Nothing is multiplied in float16: some models' hidden states are too large for it."""


def fast_dtype(device_type: str = "cpu") -> torch.dtype:
    """bfloat16 if torch itself rounds float32 tensors to it for a faster product (GPUs, AMX), else float32."""
    if device_type == "mps":
        return torch.float32
    is_gpu = device_type == "cuda"
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if is_gpu else _cpu_has("amx_tile")
    return torch.bfloat16 if fast else torch.float32


def bulk_dtype(device_type: str = "cpu") -> torch.dtype:
    """bfloat16 if products of bfloat16 tensors are faster than float32's: as `fast_dtype`, and with AVX512-BF16."""
    if device_type == "cpu" and _cpu_has("avx512_bf16"):
        return torch.bfloat16
    return fast_dtype(device_type)


def _cpu_has(capability: str) -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(capability))
    return bool(getattr(torch.cpu, f"_is_{capability}_supported")())  # before torch 2.10


def product_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """The dtype of autocast products by a name in DTYPES; "auto" is bfloat16 if that is faster."""
    if name == "auto":
        return bulk_dtype(device_type)
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def rounding_dtype(name: str, device_type: str = "cpu") -> torch.dtype:
    """What `products_in` rounds inputs to; on GPUs "bfloat16" is TensorFloat-32, which has three bits more."""
    return fast_dtype(device_type) if name in ("auto", "bfloat16") else torch.float32


@contextmanager
def products_in(name: str, device_type: str) -> Iterator[None]:
    """Inputs of products of float32 tensors are rounded to `rounding_dtype` inside the context."""
    before = torch.get_float32_matmul_precision()
    rounds = rounding_dtype(name, device_type) == torch.bfloat16
    torch.set_float32_matmul_precision("medium" if rounds else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def casting(dtype: torch.dtype, device_type: str) -> torch.autocast:
    """Products of tensors that are cast to the dtype, and their results with them; float32 changes nothing."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def bulk_products(device_type: str) -> Iterator[None]:
    """Inputs of products of float32 tensors are rounded to `bulk_dtype`, for sums over many tokens."""
    rounded = device_type == "cpu" and bulk_dtype(device_type) != fast_dtype(device_type)
    with products_in("auto", device_type), casting(torch.bfloat16 if rounded else torch.float32, "cpu"):
        yield


@contextmanager
def exact_sums(device_type: str) -> Iterator[None]:
    """Inputs of products may be rounded inside the context, to `fast_dtype`; results are float32's."""
    with products_in("auto", device_type), torch.autocast("cpu", enabled=False):
        yield


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Products of float32 tensors are float32's inside the context, whatever holds around it."""
    with products_in("float32", device_type), torch.autocast("cpu", enabled=False):
        yield
