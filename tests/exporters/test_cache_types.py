"""Types of llama.cpp's key-value cache: what a number takes, and what a type costs in a model's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from cfsp.errors import InputError
from exporters.gguf.cache_types import CACHE_TYPES
from exporters.gguf.runtime import Context, open_model

pytest.importorskip("llama_cpp")

TOKENS = np.random.default_rng(0).integers(3, 380, 96)


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    """Heads of 32 numbers, as many as a block of a quantized type has."""
    return tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32)


def logits(model: Path, cache_type: str) -> np.ndarray:
    with open_model(model, Context(n_ctx=128, cache_type=cache_type)) as opened:
        assert opened.cache_type == cache_type
        return np.concatenate([piece.copy() for piece in opened.iter_logits(TOKENS)])


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_a_type_is_ggmls_own(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    row = CACHE_TYPES[name]
    assert row.ggml_type == int(kind)
    assert (row.block_numbers, row.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    assert row.size(64 * row.block_numbers) == 64 * row.block_bytes


def test_fewer_bits_of_keys_and_values_cost_more_of_the_logits(model: Path) -> None:
    exact = logits(model, "f32")
    errors = {name: float(np.abs(logits(model, name) - exact).mean()) for name in ("f16", "q8_0", "q4_0")}
    assert 0 < errors["f16"] < errors["q8_0"] < errors["q4_0"]
    assert errors["q4_0"] < 0.5 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("cache_type", "flash"), [("f32", False), ("f16", True), ("q8_0", True), ("q4_0", True)]
)
def test_a_model_says_whether_attention_runs_in_the_flash_kernel(
    model: Path, cache_type: str, flash: bool
) -> None:
    with open_model(model, Context(n_ctx=64, cache_type=cache_type)) as opened:
        assert opened.flash_attention is flash


def test_the_weights_are_in_the_buffers_that_it_names(model: Path) -> None:
    with open_model(model, Context(n_ctx=64)) as opened:
        assert opened.weight_buffers["CPU_Mapped"] == pytest.approx(opened.size_bytes, rel=0.05)


def test_heads_that_no_block_fits_are_refused_with_llama_cpps_reason(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"block size 32 does not divide n_embd_head_k=16") as error:
        open_model(tiny_gguf(), Context(n_ctx=64, cache_type="q8_0"))
    assert "\n" not in str(error.value)
