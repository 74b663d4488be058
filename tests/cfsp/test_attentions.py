"""Whole attentions as an axis: blocks that do without one compute the rest, and load like any other checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, model_shape, spec_for
from cfsp.models.checkpoint import load_pruned, read_checkpoint_info, save_checkpoint
from cfsp.models.families import FAMILIES
from cfsp.models.source import LoadedModel
from cfsp.pruning.axes.parts import attentions_stay, removable_attentions
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.prune import PruneResult, prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.text.calibration import Calibration

IDS = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(5))
WITH_PARTS = [name for name, row in FAMILIES.items() if not attentions_stay(row)]
PLAIN = PruneSettings(prune_ratio=0, attentions=2, align=8, reconstruct="none", dtype="float32")


def prune(dense: LoadedModel, settings: PruneSettings) -> PruneResult:
    return prune_model(dense, Calibration(IDS, ("random",), 0, "0" * 64), settings)


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    p, q = (logits.detach().log_softmax(-1) for logits in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model_type", WITH_PARTS)
@torch.inference_mode()
def test_without_refit_attentions_add_nothing_and_the_rest_is_as_it_was(
    tiny_model: Any, tiny_loaded: Any, model_type: str
) -> None:
    pruned = prune(tiny_loaded(model_type), PLAIN)
    silent = pruned.plan.silent
    assert len(silent) == 2
    assert 0 not in silent
    assert f"2 attentions removed ({', '.join(map(str, sorted(silent)))})" in pruned.plan.removed
    dense = tiny_model(model_type)[0]
    for index in silent:
        attention = decoder_layers(dense)[index].self_attn
        attention.o_proj.weight.zero_()
        if attention.o_proj.bias is not None:
            attention.o_proj.bias.zero_()
    assert torch.equal(pruned.loaded.model(IDS).logits, dense(IDS).logits)
    shape = model_shape(pruned.loaded.model)
    assert set(shape.without_attention) == silent
    assert pruned.plan.shape.agrees_with(shape)
    removed = sum(p.numel() for p in dense.parameters()) - sum(
        p.numel() for p in pruned.loaded.model.parameters()
    )
    block = decoder_layers(dense)[1]
    of_attention = (block.self_attn, *map(block.get_submodule, spec_for(dense.config).attention_norms))
    assert removed == 2 * sum(p.numel() for module in of_attention for p in module.parameters())


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in WITH_PARTS])
def test_attentions_stay_where_few_attend_or_share_their_keys(tiny_loaded: Any, model_type: str) -> None:
    assert removable_attentions(tiny_loaded(model_type).model, frozenset()) == []
    with pytest.raises(InputError, match=attentions_stay(FAMILIES[model_type])):
        prune(tiny_loaded(model_type), PLAIN)


def test_the_refit_lowers_the_divergence(tiny_model: Any, tiny_loaded: Any) -> None:
    expected = tiny_model()[0](IDS).logits
    found = []
    for reconstruct in ("none", "block-by-block"):
        settings = replace(PLAIN, reconstruct=reconstruct, ridge=1e-3)
        found.append(divergence(expected, prune(tiny_loaded(), settings).loaded.model(IDS).logits))
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("model_type", WITH_PARTS)
def test_a_checkpoint_loads_with_and_without_us(tiny_loaded: Any, tmp_path: Path, model_type: str) -> None:
    settings = replace(PLAIN, attentions=1, blocks=1, prune_ratio=0.25 if model_type == "llama" else 0)
    result = prune(tiny_loaded(model_type), settings)
    folder, again = tmp_path / "checkpoint", tmp_path / "again"
    save_checkpoint(result.loaded, folder, plan=result.plan)
    shape = read_checkpoint_info(folder).shape
    assert [block.origin for block in shape.blocks] == sorted(set(range(4)) - result.plan.gone)
    assert {block.origin for block in shape.blocks if not block.has_attention} == result.plan.silent
    expected = result.loaded.model(IDS).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(again)
    for model in (theirs, load_pruned(folder), load_pruned(again)):
        assert torch.equal(model(IDS).logits, expected)
        assert model_shape(model).without_attention == shape.without_attention
    # With a cache, which the block without attention has no part in, as without one.
    with_cache, without = (
        theirs.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


def test_the_first_block_of_each_kind_keeps_its_attention(tiny_loaded: Any) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    dense = tiny_loaded(
        "qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    assert removable_attentions(dense.model, frozenset()) == [2, 3]
    assert removable_attentions(dense.model, frozenset({1})) == [3]
    result = prune(dense, PLAIN)
    assert result.plan.silent == {2, 3}
    ids = result.loaded.model.generate(IDS[:1], max_new_tokens=12, do_sample=False)
    plain = result.loaded.model.generate(IDS[:1], max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(ids, plain)


def test_what_cannot_go_is_refused(tiny_loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 3"):
        prune(tiny_loaded(), replace(PLAIN, attentions=4))
    with pytest.raises(InputError, match="at most 1"):
        prune(tiny_loaded(), replace(PLAIN, blocks=2))
    result = prune(tiny_loaded(), PLAIN)
    assert result.plan.attention is not None
    wrong = replace(result.plan, attention=replace(result.plan.attention, removed=(0, 1)))
    with pytest.raises(InputError, match="cannot go"):
        apply_plan(tiny_loaded().model, wrong)
    folder = tmp_path / "checkpoint"
    save_checkpoint(result.loaded, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for own, reason in (({"skip": ["mlp"]}, "skip"), ({"skip": []}, "skip"), ({"skip": "attention"}, "skip")):
        (folder / "config.json").write_text(json.dumps(config | {"per_layer_config": {"1": own}}))
        with pytest.raises(InputError, match=reason):
            load_pruned(folder)
    (folder / "config.json").write_text(
        json.dumps(config | {"per_layer_config": {"0": {"skip": ["attention"]}}})
    )
    with pytest.raises(InputError, match="block 0 has no attention"):
        load_pruned(folder)
