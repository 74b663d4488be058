"""The next token: drawn as transformers draws it, by numbers that nothing beside the answer changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import LogitsProcessorList

from cfsp.errors import InputError
from cfsp.text.choosing import Drawn, Sampling, choosers, drawn_tokens, greedy, remaining_scores
from cfsp.text.self_sampling import stated_sampling

VOCAB = 500
BEFORE = [3, 7, 7, 41, 499]
SETTINGS = {
    "none": Sampling(),
    "temperature": Sampling(temperature=0.3),
    "top_k": Sampling(top_k=7),
    "top_k of more than there are": Sampling(top_k=10 * VOCAB),
    "top_p": Sampling(top_p=0.8),
    "a top_p that leaves one": Sampling(top_p=1e-6),
    "min_p": Sampling(min_p=0.2),
    "penalty": Sampling(repetition_penalty=1.7),
    "all": Sampling(0.7, 60, 0.9, 0.01, 1.2),
    "hot": Sampling(2.5, 0, 0.95, 0.0, 0.8),
}


def processors(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own, as its `generate` puts them together."""
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    tiny = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    made = transformers.LlamaForCausalLM(tiny)._get_logits_processor(
        generation_config=config, input_ids_seq_length=len(BEFORE)
    )
    assert isinstance(made, LogitsProcessorList)
    return made


@pytest.mark.parametrize("name", SETTINGS)
def test_what_remains_is_what_transformers_leaves(name: str) -> None:
    theirs = processors(SETTINGS[name])
    generator = torch.Generator().manual_seed(0)
    for spread in (0.5, 3.0, 9.0):
        logits = spread * torch.randn(VOCAB, generator=generator)
        expected = theirs(torch.tensor([BEFORE]), logits[None].clone())[0].double().softmax(-1).numpy()
        scores = remaining_scores(logits.numpy(), BEFORE, SETTINGS[name])
        assert scores.max() == 0
        found = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_array_equal(found > 0, expected > 0)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_tokens_come_as_often_as_transformers_probabilities_say() -> None:
    sampling = SETTINGS["all"]
    logits = 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    expected = processors(sampling)(torch.tensor([BEFORE]), logits[None].clone())[0].softmax(-1).numpy()
    count = 4000
    drawn = [Drawn(sampling, 5, index)(BEFORE[:2], BEFORE[2:], logits.numpy()) for index in range(count)]
    shares = np.bincount(drawn, minlength=VOCAB) / count
    assert (expected[drawn] > 0).all()
    assert np.abs(shares - expected).max() < 4 * 0.5 / count**0.5


def test_each_number_is_its_answers_and_its_places() -> None:
    flat = np.zeros(10**6, dtype=np.float32)

    def number(seed: int, index: int, place: int) -> int:
        return Drawn(Sampling(), seed, index)([1], [0] * place, flat)

    asked = [(seed, index, place) for seed in (0, 1, 2**32 - 1) for index in (0, 1, 9) for place in (0, 1, 9)]
    assert len({number(*one) for one in asked}) == len(asked)
    assert number(1, 9, 9) == number(1, 9, 9)
    assert Drawn(Sampling(), 1, 0)([4, 5], [6], flat) == number(1, 0, 1), "what was said chooses no number"


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    logits = np.array([1.0, 3.0, 2.999], dtype=np.float32)
    coldest = replace(SETTINGS["temperature"], temperature=5e-324)
    for choose in (*choosers(coldest, 3, 4), greedy):
        assert choose([0], [], logits) == 1


def test_what_is_not_finite_is_refused() -> None:
    for name in ("none", "all"):
        with pytest.raises(InputError, match="not finite"):
            Drawn(SETTINGS[name], 0, 0)([0], [], np.array([0, np.nan], dtype=np.float32))


def test_numbers_draw_tokens_by_their_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.9, 1e-30]], dtype=np.float32))
    assert drawn_tokens(logits, [0.4999, 0.0999]) == [0, 0]
    assert drawn_tokens(logits, [0.5001, 0.1001]) == [1, 1]
    assert drawn_tokens(logits, [0.7501, np.nextafter(1, 0)]) == [2, 1]
    certain = np.array([[-np.inf, 0, -np.inf]], dtype=np.float32)
    assert drawn_tokens(certain, [0.0]) == drawn_tokens(certain, [np.nextafter(1, 0)]) == [1]
    with pytest.raises(InputError, match="not finite"):
        drawn_tokens(np.array([[0, np.nan]], dtype=np.float32), [0.5])


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ({}, {}),
        ({"eos_token_id": 2}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "top_k": 64, "top_p": 0.95}, {"top_k": 64, "top_p": 0.95}),
        ({"temperature": 0.6, "repetition_penalty": 1.05}, {"temperature": 0.6, "repetition_penalty": 1.05}),
    ],
)
def test_what_a_generation_config_states(stated: dict[str, Any], found: dict[str, Any]) -> None:
    assert stated_sampling(transformers.GenerationConfig(**stated)) == found
    assert stated_sampling(None) == {}
