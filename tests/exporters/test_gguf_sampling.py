"""Texts that a model writes through llama.cpp: drawn from its own probabilities, whatever is written beside them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from far_device import far_device, send

from cfsp.errors import InputError
from cfsp.models.source import LoadedModel
from cfsp.text import self_sampling
from cfsp.text.self_sampling import TRANSFORMERS, sample_windows
from exporters.gguf import language_model
from exporters.gguf.language_model import LLAMA_CPP, drawn_tokens

pytest.importorskip("llama_cpp")

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


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_each_token_is_the_one_that_its_number_draws_from_the_models_probabilities(
    tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """The copy has eight bits, so that a number may draw a token beside the one of 384 that float32 gives."""
    loaded = tiny_loaded(model_type, hidden_size=96) if "gemma" in model_type else tiny_loaded(model_type)
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


def test_a_model_with_unlike_blocks_writes_and_what_it_wrote_is_kept(
    tiny_loaded: Loaded, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cfsp.models.reference import load_model

    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_sampling, "MAX_REPLY_TOKENS", 16)
    asked: dict[str, Any] = {"nsamples": 2, "seqlen": 64, "seed": 1, "use_written": False}
    loaded = load_model(str(make_checkpoint("llama", widths=(96, 128, 64, 96))))
    first = sample_windows(loaded, writers=(LLAMA_CPP,), **asked)
    assert not torch.equal(first, sample_windows(loaded, **asked))  # transformers draws other numbers
    monkeypatch.setattr("cfsp.text.self_sampling._sample_batch", None)
    assert torch.equal(sample_windows(loaded, writers=(LLAMA_CPP, TRANSFORMERS), **asked), first)


def test_a_model_on_another_device_writes_where_it_is(
    tiny_model: Callable[..., Any], tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    asked: dict[str, Any] = {"nsamples": 2, "seqlen": 64, "seed": 1, "use_written": False}
    here = sample_windows(tiny_loaded(), **asked)
    with far_device():
        loaded = tiny_loaded()
        send(loaded.model)
        assert torch.equal(sample_windows(loaded, writers=(LLAMA_CPP, TRANSFORMERS), **asked), here)
        with pytest.raises(InputError, match="writes on the CPU"):
            sample_windows(loaded, writers=(LLAMA_CPP,), **{**asked, "seed": 2})


def test_transformers_writes_where_no_disk_holds_a_copy(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "cache"))
    asked: dict[str, Any] = {"nsamples": 2, "seqlen": 64, "seed": 1, "use_written": False}
    loaded = tiny_loaded()
    expected = sample_windows(loaded, **asked)
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(language_model, "draft_gguf", full)
    assert torch.equal(sample_windows(loaded, writers=(LLAMA_CPP, TRANSFORMERS), **asked), expected)
    with pytest.raises(InputError, match="no space left"):
        sample_windows(loaded, writers=(LLAMA_CPP,), **{**asked, "seed": 2})
