"""Kept rows that learn to spell removed tokens: which change, by how much, and what the model says then."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cfsp.errors import InputError
from cfsp.models.families import FAMILIES
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.models.token_trees import token_trees
from cfsp.pruning.prune import prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.spelling import (
    _last_states,
    _last_states_apart,
    _least_squares,
    _runs,
    teach_spellings,
)
from cfsp.pruning.vocabulary import VocabularyPlan, count_alike, plan_vocabulary, spelled
from cfsp.text.calibration import Calibration

TEXT = "The quick brown fox jumps over the lazy dog. It's 12:30, and 7 wizards are boxing again; " * 8


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def dense(request: pytest.FixtureRequest, tiny_model: Any) -> LoadedModel:
    model, tokenizer = tiny_model(tied=request.param)
    return LoadedModel(model, tokenizer, ModelSource("tiny", "folder", "tiny"))


def drawn(loaded: LoadedModel) -> torch.Tensor:
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids[:48], ids[7:55], ids[20:68], ids[31:79]])


def planned(loaded: LoadedModel) -> VocabularyPlan:
    counts = count_alike([drawn(loaded).tolist()], len(loaded.tokenizer))
    return plan_vocabulary(loaded, counts, 270, sources=())


def spelling_loss(loaded: LoadedModel, plan: VocabularyPlan, window: torch.Tensor) -> float:
    """Nats for the parts after the first of all removed tokens in a window, over the kept rows."""
    kept, trees = torch.tensor(plan.kept), token_trees(loaded.tokenizer)
    gone = set(trees.parts) - set(plan.kept)
    ids, later = [], []
    for index in window.tolist():
        parts = spelled(index, gone, trees)
        later += [False, *(True for _ in parts[1:])]
        ids += parts
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids])).logits[0][:, kept].log_softmax(-1)
    places = torch.searchsorted(kept, torch.tensor(ids))
    said = logits[:-1].gather(1, places[1:, None])[:, 0]
    return -float(said[torch.tensor(later[1:])].mean())


def test_what_is_removed_is_spelled_more_readily(dense: LoadedModel) -> None:
    plan, windows, trees = planned(dense), drawn(dense), token_trees(dense.tokenizer)
    gone = set(trees.parts) - set(plan.kept)
    before = spelling_loss(dense, plan, windows[0])
    head, embedding = dense.model.get_output_embeddings().weight, dense.model.get_input_embeddings().weight
    old, read = head.detach().clone(), embedding.detach().clone()
    teach_spellings(dense, replace(plan, counts=()), windows)
    teach_spellings(dense, replace(plan, kept=tuple(range(plan.dense_size))), windows)
    assert torch.equal(head, old), "nothing is known of the text, or nothing goes"
    with pytest.raises(InputError, match=r"not one count a row.*383.*384"):
        teach_spellings(dense, replace(plan, counts=plan.counts[1:]), windows)
    teach_spellings(dense, plan, windows)
    assert spelling_loss(dense, plan, windows[0]) < before - 0.1
    changed = {int(index) for index in (head != old).any(dim=1).nonzero()}
    assert changed
    assert changed <= {part for index in gone for part in spelled(index, gone, trees)}
    assert (embedding is head) or torch.equal(embedding, read)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gemma4_text", "lfm2"])
def test_prefixes_run_together_do_not_see_each_other(tiny_model: Any, model_type: str) -> None:
    model, _ = tiny_model(model_type)
    beginning, prefixes = [5, 9, 11], [(3,), (8,), (3, 4), (200, 100, 17)]
    with torch.inference_mode():
        of_prefixes = _last_states_apart if FAMILIES[model_type].sees_neighbours else _last_states
        together = of_prefixes(model.get_decoder(), beginning, prefixes)
        for prefix, state in zip(prefixes, together, strict=True):
            alone = model.get_decoder()(input_ids=torch.tensor([[*beginning, *prefix]])).last_hidden_state
            assert torch.allclose(state, alone[0, -1], atol=1e-5)


def test_every_prefix_runs_once() -> None:
    prefixes = [(n,) for n in range(600)] + [(n, n) for n in range(300)]
    runs = list(_runs(prefixes))
    assert [prefix for run in runs for prefix in run] == prefixes
    assert all(sum(map(len, run)) <= 512 for run in runs)
    assert len(runs) == 3
    assert list(_runs([])) == []


def test_least_squares_is_that_of_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    h, gain = torch.randn(3, 5, generator=generator).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    times, penalty = torch.tensor([4.0, 1.0, 9.0]).double(), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
    normal = torch.linalg.solve(h.T @ (times[:, None] * h) + penalty.diag(), h.T @ (times * gain))
    assert torch.allclose(_least_squares(h, gain, times, penalty), normal)


def test_reconstruct_none_leaves_rows_as_they_are(tiny_loaded: Any) -> None:
    for reconstruct in ("none", "block-by-block"):
        loaded = tiny_loaded()
        rows = loaded.model.get_output_embeddings().weight.detach().clone()
        calibration = Calibration(drawn(loaded), ("text",), 0, "0" * 64)
        settings = PruneSettings(prune_ratio=0, vocabulary=270, reconstruct=reconstruct, align=1)
        result = prune_model(loaded, calibration, settings)
        assert result.plan.vocabulary is not None
        left = result.loaded.model.get_output_embeddings().weight
        assert torch.equal(left, rows[list(result.plan.vocabulary.kept)]) == (reconstruct == "none")
