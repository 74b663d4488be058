"""Key-value groups as an axis: what is left computes the rest, o_proj makes up for it, and checkpoints hold it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, model_shape
from cfsp.models.checkpoint import load_pruned, read_checkpoint_info, save_checkpoint
from cfsp.models.families import FAMILIES
from cfsp.models.source import LoadedModel
from cfsp.pruning.axes.parts import GroupRemoval, groups_stay
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.prune import PruneResult, prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.streaming import output_hook
from cfsp.records import read_record, record_to_json
from cfsp.text.calibration import Calibration

IDS = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(5))
WITH_GROUPS = [name for name, row in FAMILIES.items() if row.cuts_heads]
PLAIN = PruneSettings(prune_ratio=0, kv_groups=0.4, align=8, reconstruct="none", dtype="float32")


def prune(dense: LoadedModel, settings: PruneSettings, plan: PruningPlan | None = None) -> PruneResult:
    return prune_model(dense, Calibration(IDS, ("random",), 0, "0" * 64), settings, plan=plan)


def groups_of(plan: PruningPlan) -> GroupRemoval:
    assert plan.kv_groups is not None
    return plan.kv_groups


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    p, q = (logits.detach().log_softmax(-1) for logits in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kv_heads", [2, 4])  # 4: every query head has a key-value head of its own
@pytest.mark.parametrize("model_type", WITH_GROUPS)
@torch.inference_mode()
def test_without_refit_groups_add_nothing_and_the_rest_is_as_it_was(
    tiny_model: Any, tiny_loaded: Any, model_type: str, kv_heads: int
) -> None:
    overrides = {"num_key_value_heads": kv_heads, "tie_word_embeddings": kv_heads == 2}
    pruned = prune(tiny_loaded(model_type, **overrides), PLAIN)
    groups, count = groups_of(pruned.plan), round(0.4 * 4 * kv_heads)
    assert f"{count} of {4 * kv_heads} key-value groups removed" in pruned.plan.removed
    assert all(groups.kept)
    dense = tiny_model(model_type, **overrides)[0]
    for layer, kept in zip(decoder_layers(dense), groups.kept, strict=True):
        weight = layer.self_attn.o_proj.weight.view(64, kv_heads, -1)
        weight[:, [group for group in range(kv_heads) if group not in kept]] = 0
    logits = pruned.loaded.model(IDS).logits
    torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    shape = model_shape(pruned.loaded.model)
    assert [block.kv_groups for block in shape.blocks] == [len(kept) for kept in groups.kept]
    assert pruned.plan.shape.agrees_with(shape)
    for layer in decoder_layers(pruned.loaded.model):
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.o_proj):
            assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in WITH_GROUPS])
def test_no_group_goes_of_some_model_types(tiny_loaded: Any, model_type: str) -> None:
    for settings in (PLAIN, replace(PLAIN, attentions=1)):
        with pytest.raises(InputError, match=groups_stay(FAMILIES[model_type])):
            prune(tiny_loaded(model_type), settings)


def test_the_refit_lowers_the_divergence(tiny_model: Any, tiny_loaded: Any) -> None:
    expected = tiny_model()[0](IDS).logits
    found = []
    for reconstruct in ("none", "block-by-block"):
        settings = replace(PLAIN, reconstruct=reconstruct, ridge=1e-3)
        found.append(divergence(expected, prune(tiny_loaded(), settings).loaded.model(IDS).logits))
    assert found[1] < 0.5 * found[0]


@torch.inference_mode()
def test_o_proj_is_solved_for_what_the_attention_gave(tiny_model: Any, tiny_loaded: Any) -> None:
    """In the first block that loses a group, before which nothing is changed."""
    result = {
        name: prune(tiny_loaded(), replace(PLAIN, reconstruct=name, ridge=1e-6))
        for name in ("none", "block-by-block")
    }
    plan = result["none"].plan
    assert plan.kv_groups == result["block-by-block"].plan.kv_groups
    first = min(plan.narrowed)
    given: list[torch.Tensor] = []
    for model in (tiny_model()[0], *(one.loaded.model for one in result.values())):
        o_proj = decoder_layers(model)[first].self_attn.o_proj
        with output_hook(o_proj, lambda x, output: given.append(output)):
            model(IDS)
    dense, cut, solved = given
    assert (solved - dense).square().mean() < 0.9 * (cut - dense).square().mean()


@pytest.mark.parametrize("model_type", WITH_GROUPS)
def test_a_checkpoint_loads_with_and_without_us(tiny_loaded: Any, tmp_path: Path, model_type: str) -> None:
    settings = replace(PLAIN, attentions=1, prune_ratio=0.25 if model_type == "llama" else 0)
    result = prune(tiny_loaded(model_type, num_key_value_heads=4), settings)
    folder, again = tmp_path / "checkpoint", tmp_path / "again"
    save_checkpoint(result.loaded, folder, plan=result.plan)
    shape = read_checkpoint_info(folder).shape
    assert [block.kv_groups for block in shape.blocks] == list(map(len, groups_of(result.plan).kept))
    assert set(shape.without_attention) == result.plan.silent
    assert read_record(PruningPlan, folder / "pruning_plan.json") == result.plan
    expected = result.loaded.model(IDS).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(again)
    for model in (theirs, load_pruned(folder), load_pruned(again)):
        assert torch.equal(model(IDS).logits, expected)
        assert model_shape(model).with_origins(shape) == shape
    with_cache, without = (
        theirs.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    theirs.set_attn_implementation("eager")
    assert torch.allclose(theirs(IDS).logits, expected, atol=1e-4)


def test_as_few_groups_in_every_block_as_in_the_others(tiny_loaded: Any, tmp_path: Path) -> None:
    """Uniform, but with other heads than config.json says of the whole model."""
    result = prune(tiny_loaded(num_key_value_heads=4, hidden_size=96), replace(PLAIN, kv_groups=0.75))
    assert [len(kept) for kept in groups_of(result.plan).kept] == [1, 1, 1, 1]
    save_checkpoint(result.loaded, tmp_path / "checkpoint", plan=result.plan)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    assert config["num_key_value_heads"] == 4
    expected = result.loaded.model(IDS).logits
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", trust_remote_code=True
    )
    for model in (theirs, load_pruned(tmp_path / "checkpoint")):
        assert torch.equal(model(IDS).logits, expected)


def test_groups_go_beside_blocks_attentions_and_channels(tiny_loaded: Any) -> None:
    settings = replace(PLAIN, attentions=1, blocks=1, prune_ratio=0.25, reconstruct="block-by-block")
    result = prune(tiny_loaded(num_key_value_heads=4), settings)
    groups = groups_of(result.plan)
    assert groups.removed == (3, 8)
    assert [index for index, kept in enumerate(groups.kept) if not kept] == sorted(
        result.plan.gone | result.plan.silent
    )
    assert result.plan.shape.agrees_with(model_shape(result.loaded.model))


def test_a_plan_is_applied_again(tiny_loaded: Any) -> None:
    settings = replace(PLAIN, reconstruct="block-by-block")
    first = prune(tiny_loaded(), settings)
    second = prune(tiny_loaded(), settings, plan=first.plan)
    assert torch.equal(first.loaded.model(IDS).logits, second.loaded.model(IDS).logits)


def test_without_the_setting_a_plan_says_nothing_of_groups(tiny_loaded: Any) -> None:
    record = record_to_json(prune(tiny_loaded(), replace(PLAIN, kv_groups=0, prune_ratio=0.25)).plan)
    assert "kv_groups" not in record
    assert "kv_groups" not in record["settings"]


def test_what_cannot_go_is_refused(tiny_loaded: Any) -> None:
    with pytest.raises(InputError, match=r"4 blocks .* 8 in all .*0\.125 to 0\.5"):
        prune(tiny_loaded(), replace(PLAIN, kv_groups=0.6))
    with pytest.raises(InputError, match=r"0\.125 to 0\.5"):
        prune(tiny_loaded(), replace(PLAIN, kv_groups=0.01))
    with pytest.raises(InputError, match=r"allowed: 0\)?$"):
        prune(tiny_loaded(num_key_value_heads=1), PLAIN)
    for ratio in (-0.1, 1.0):
        with pytest.raises(InputError, match="kv_groups"):
            prune(tiny_loaded(), replace(PLAIN, kv_groups=ratio))


def test_a_share_is_of_the_groups_that_other_cuts_leave(tiny_loaded: Any) -> None:
    # Of all eight groups it would be five, one more than can go; of the last block's two it is one.
    plan = prune(tiny_loaded(), replace(PLAIN, kv_groups=0.57, blocks=3)).plan
    assert groups_of(plan).removed == (1, 2)
    with pytest.raises(InputError, match=r"0\.125 to 0\.5"):
        prune(tiny_loaded(), replace(PLAIN, kv_groups=0.57))


def test_a_plan_that_does_not_fit_is_refused(tiny_loaded: Any, tmp_path: Path) -> None:
    plan = prune(tiny_loaded(), PLAIN).plan
    groups = groups_of(plan)
    with pytest.raises(InputError, match="another model"):
        apply_plan(tiny_loaded(num_key_value_heads=4).model, plan)
    empty = replace(groups, kept=((), *groups.kept[1:]))
    with pytest.raises(InputError, match="block 0 keeps no group"):
        apply_plan(tiny_loaded().model, replace(plan, kv_groups=empty))
    with pytest.raises(InputError, match="ascending"):
        replace(groups, kept=((1, 0), *groups.kept[1:]))
    record = record_to_json(plan)
    record["kv_groups"]["kept"][0] = [7]
    (tmp_path / "plan.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"plan\.json.*ascending"):
        read_record(PruningPlan, tmp_path / "plan.json")
    with pytest.raises(InputError, match="one for each block"):
        replace(groups, kept=groups.kept[1:])
    with pytest.raises(InputError, match="one for each block"):
        replace(plan, kv_groups=replace(groups, kept=groups.kept[1:], losses=groups.losses[1:]))
