"""The llama.cpp runtime: steps equal a whole, errors have its reason, and texts are drawn from a model."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from far_device import far_device, send

from cfsp.errors import InputError
from cfsp.models.source import LoadedModel
from cfsp.text import self_sampling
from cfsp.text.self_sampling import TRANSFORMERS, sample_windows
from exporters.gguf import language_model, matrix, runtime
from exporters.gguf.language_model import LLAMA_CPP, drawn_tokens
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


def test_facts_a_full_context_and_unknown_tokens(model_file: Path) -> None:
    with runtime.open_model(model_file, runtime.Context(n_ctx=256)) as model:
        assert (model.vocab_size, model.n_ctx) == (384, 256)
        assert model.n_params == model.size_bytes / 4
        assert model.description.startswith("llama")
        with pytest.raises(InputError, match="n_ctx"):
            model.decode([1] * 257)
        model.clear()
        with pytest.raises(InputError, match="invalid token"):
            model.decode([384])
    model.close()
    assert "llama.cpp" in runtime.runtime_version()


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


TEXTS = [[1, 20, 30], [1], [1, 7, 8, 9, 10, 11, 12], [1, 200], [1, 300, 301]]
LENGTH = 12
Loaded = Callable[..., LoadedModel]


def written(loaded: LoadedModel, seed: int = 3, texts: list[list[int]] = TEXTS) -> list[list[int]]:
    with LLAMA_CPP.opened(loaded, seed) as continued:
        return continued(texts, LENGTH, lambda _: None)


def share_equal(these: list[list[int]], those: list[list[int]]) -> float:
    pairs = [
        (a, b) for one, other in zip(these, those, strict=True) for a, b in zip(one, other, strict=False)
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def test_each_token_is_the_one_that_its_number_draws_from_the_models_probabilities(
    tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has eight bits, so that a number may draw a token beside the one of 384 that float32 gives."""
    loaded = tiny_loaded("gemma3_text", hidden_size=96)
    monkeypatch.setattr(language_model, "stop_ids", lambda _: set())
    seeds = np.random.SeedSequence(3).spawn(len(TEXTS))
    found, beside = written(loaded), []
    for start, text, seed in zip(TEXTS, found, seeds, strict=True):
        assert text[: len(start)] == start
        assert len(text) == len(start) + LENGTH
        numbers = np.random.default_rng(seed)
        with torch.inference_mode():
            logits = loaded.model(input_ids=torch.tensor([text])).logits[0].numpy()
        for place in range(len(start), len(text)):
            (wanted,) = drawn_tokens(logits[place - 1 : place], [numbers.random()])
            beside.append(abs(wanted - text[place]) <= 3)
    assert np.mean(beside) > 0.8


def test_a_text_does_not_depend_on_those_beside_it(
    tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded("llama")
    together = written(loaded)
    assert written(loaded) == together
    monkeypatch.setattr(language_model, "_TEXTS", 2)
    assert share_equal(written(loaded), together) > 0.9  # sums over a batch differ in their last bits
    assert share_equal(written(loaded, seed=4), together) < 0.5


def test_a_text_ends_after_a_token_that_ends_it(tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    stops = set(range(0, 512, 5))
    monkeypatch.setattr(language_model, "stop_ids", lambda _: stops)
    found = written(tiny_loaded("llama"), texts=TEXTS * 4)
    new = [text[len(start) :] for start, text in zip(TEXTS * 4, found, strict=True)]
    assert all(not stops & set(text[:-1]) for text in new)
    assert all(text[-1] in stops or len(text) == LENGTH for text in new)
    assert len({len(text) for text in new}) > 3


def test_numbers_draw_tokens_by_their_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.9, 1e-30]], dtype=np.float32))
    assert drawn_tokens(logits, [0.4999, 0.0999]) == [0, 0]
    assert drawn_tokens(logits, [0.5001, 0.1001]) == [1, 1]
    assert drawn_tokens(logits, [0.7501, np.nextafter(1, 0)]) == [2, 1]
    with pytest.raises(InputError, match="not finite"):
        drawn_tokens(np.array([[0, np.nan]], dtype=np.float32), [0.5])


ASKED: dict[str, Any] = {"nsamples": 2, "seqlen": 64, "seed": 1, "use_written": False}


def test_what_was_written_is_kept_wherever_the_model_is(
    tiny_loaded: Loaded, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cfsp.models.reference import load_model

    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_sampling, "MAX_REPLY_TOKENS", 16)
    here = sample_windows(tiny_loaded(), **ASKED)
    with far_device():
        loaded = tiny_loaded()
        send(loaded.model)
        assert torch.equal(sample_windows(loaded, writers=(LLAMA_CPP, TRANSFORMERS), **ASKED), here)
        with pytest.raises(InputError, match="writes on the CPU"):
            sample_windows(loaded, writers=(LLAMA_CPP,), **{**ASKED, "seed": 2})
    loaded = load_model(str(make_checkpoint("llama", widths=(96, 128, 64, 96))))
    first = sample_windows(loaded, writers=(LLAMA_CPP,), **ASKED)
    assert not torch.equal(first, sample_windows(loaded, **ASKED))  # transformers draws other numbers
    monkeypatch.setattr("cfsp.text.self_sampling._sample_batch", None)
    assert torch.equal(sample_windows(loaded, writers=(LLAMA_CPP, TRANSFORMERS), **ASKED), first)


def test_transformers_writes_where_no_disk_holds_a_copy(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    loaded = tiny_loaded()
    expected = sample_windows(loaded, **ASKED)
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(language_model, "draft_gguf", full)
    assert torch.equal(sample_windows(loaded, writers=(LLAMA_CPP, TRANSFORMERS), **ASKED), expected)
    with pytest.raises(InputError, match="no space left"):
        sample_windows(loaded, writers=(LLAMA_CPP,), **{**ASKED, "seed": 2})
