"""The llama.cpp runtime: steps equal a whole, cache types cost what they should, errors carry llama.cpp's reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from cfsp.errors import InputError
from exporters.gguf import matrix, runtime
from exporters.gguf.quants import CACHE_TYPES, QUANTS

pytest.importorskip("llama_cpp")

IDS = list(range(20, 84))


@pytest.fixture(scope="module")
def model_file(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf("llama")


def test_prompts_and_single_tokens_give_the_same_logits(model_file: Path) -> None:
    with runtime.open_model(model_file, runtime.Context(n_ctx=64, cache_type="f32")) as model:
        model.decode(IDS)
        at_once = model.last_logits()
        model.clear()
        model.decode(IDS[:60])
        for token in IDS[60:]:
            model.decode([token])
        np.testing.assert_allclose(model.last_logits(), at_once, atol=1e-4)
        pieces = [piece.copy() for piece in model.iter_logits(IDS)]
        np.testing.assert_allclose(np.concatenate(pieces)[-1], at_once, atol=1e-4)
    assert at_once.shape == (384,)


def test_facts(model_file: Path) -> None:
    with runtime.open_model(model_file, runtime.Context(n_ctx=256)) as model:
        assert model.vocab_size == 384
        assert model.n_ctx == 256
        assert model.n_params == model.size_bytes / 4
        assert model.description.startswith("llama")
    model.close()
    assert "llama.cpp" in runtime.runtime_version()


def test_a_full_context_and_unknown_tokens(model_file: Path) -> None:
    with runtime.open_model(model_file, runtime.Context(n_ctx=64)) as model:
        n_ctx = model.n_ctx
        with pytest.raises(InputError, match="n_ctx"):
            model.decode([1] * (n_ctx + 1))
        model.clear()
        with pytest.raises(InputError, match="invalid token"):
            model.decode([384])


def test_load_errors_have_a_reason(tmp_path: Path, model_file: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        runtime.open_model(tmp_path / "none.gguf", runtime.Context())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model_file.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"cannot load .*cut\.gguf: .*(corrupted|incomplete|bounds)"):
        runtime.open_model(cut, runtime.Context())


def test_quantizing_refuses_with_a_reason(tmp_path: Path, model_file: Path) -> None:
    with pytest.raises(InputError, match="cannot quantize"):
        matrix.quantize(tmp_path / "none.gguf", tmp_path / "out.gguf", QUANTS["Q8_0"].ftype)
    wrong = {"blk.0.ffn_up.weight": np.ones(7, dtype=np.float32)}
    with pytest.raises(InputError, match="size"):
        matrix.quantize(model_file, tmp_path / "out.gguf", QUANTS["Q4_0"].ftype, imatrix=wrong)


def test_nothing_reaches_the_terminal_and_torch_stays_out(model_file: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom exporters.gguf import runtime\n"
        f"path = Path({str(model_file)!r})\n"
        "with runtime.open_model(path, runtime.Context(n_ctx=64)) as model: model.decode([5, 6, 7])\n"
        "assert 'torch' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_a_cache_type_is_ggmls_own_and_fewer_bits_cost_more_of_the_logits(
    tiny_gguf: Callable[..., Path],
) -> None:
    # Heads of 32 numbers, as many as a block of a quantized type has.
    model, found = tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32), {}
    for name, row in CACHE_TYPES.items():
        kind = gguf.GGMLQuantizationType[name.upper()]
        assert row.ggml_type == int(kind)
        assert (row.block_numbers, row.block_bytes) == gguf.GGML_QUANT_SIZES[kind]
        assert row.size(64 * row.block_numbers) == 64 * row.block_bytes
        with runtime.open_model(model, runtime.Context(n_ctx=128, cache_type=name)) as opened:
            assert opened.cache_type == name
            assert opened.flash_attention is (name != "f32")
            assert opened.weight_buffers["CPU_Mapped"] == pytest.approx(opened.size_bytes, rel=0.05)
            tokens = np.random.default_rng(0).integers(3, 380, 96)
            found[name] = np.concatenate([piece.copy() for piece in opened.iter_logits(tokens)])
    errors = {name: float(np.abs(logits - found["f32"]).mean()) for name, logits in found.items()}
    assert 0 < errors["f16"] < errors["q8_0"] < errors["q4_0"] < 0.5 * np.abs(found["f32"]).mean()
    with pytest.raises(InputError, match=r"block size 32 does not divide n_embd_head_k=16") as error:
        runtime.open_model(tiny_gguf(), runtime.Context(n_ctx=64, cache_type="q8_0"))
    assert "\n" not in str(error.value)
