"""Blocks, attentions and key-value groups as axes: what is left computes the rest, is made up for, and loads."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.parts import GroupRemoval, choose_removals, removable_attentions
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.prune import PruneResult, prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.statistics import output_hook
from cfsp.records import read_record, record_from_json, record_to_json
from cfsp.text.calibration import Calibration

IDS = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(5))
PLAIN = PruneSettings(prune_ratio=0, align=8, reconstruct="none", dtype="float32")
SOME = ["llama", "qwen2", "gemma3_text"]
"""Plain; with biases; with norms behind attention and FFN."""
BLOCKS, ATTENTIONS, GROUPS = {"blocks": 2}, {"attentions": 2}, {"kv_groups": 0.4}


def prune(dense: LoadedModel, plan: PruningPlan | None = None, **settings: Any) -> PruneResult:
    calibration = Calibration(IDS, ("random",), 0, "0" * 64)
    return prune_model(dense, calibration, replace(PLAIN, **settings), plan=plan)


def groups_of(plan: PruningPlan) -> GroupRemoval:
    assert plan.kv_groups is not None
    return plan.kv_groups


def skipping(model: Any, gone: set[int]) -> Any:
    """The same model with blocks that hand on what they get."""
    for index in gone:
        decoder_layers(model)[index].forward = lambda hidden_states, **arguments: hidden_states
    return model


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    p, q = (logits.detach().log_softmax(-1) for logits in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_axis_of_a_family(tiny_loaded: Any, tmp_path: Path, model_type: str) -> None:
    """All that may go goes at once, and the checkpoint loads with and without us; what stays says why."""
    row = FAMILIES[model_type]
    reasons = {"blocks": row.blocks_stay, "attentions": row.attentions_stay, "kv_groups": row.groups_stay}
    amounts: dict[str, Any] = {"blocks": 1, "attentions": 1, "kv_groups": 0.4}
    for axis in (axis for axis, reason in reasons.items() if reason):
        with pytest.raises(InputError, match=reasons[axis]):
            prune(tiny_loaded(model_type), **{axis: amounts[axis]})
    asked = {axis: amount for axis, amount in amounts.items() if not reasons[axis]}
    heads = {"num_key_value_heads": 4} if "kv_groups" in asked else {}
    result = prune(tiny_loaded(model_type, **heads), prune_ratio=0.25, reconstruct="block-by-block", **asked)
    plan, folder, again = result.plan, tmp_path / "checkpoint", tmp_path / "again"
    assert (len(plan.gone), len(plan.silent)) == (int("blocks" in asked), int("attentions" in asked))
    assert plan.shape.agrees_with(model_shape(result.loaded.model))
    save_checkpoint(result.loaded, folder, plan=plan)
    assert read_record(PruningPlan, folder / "pruning_plan.json") == plan
    shape = read_checkpoint_info(folder).shape
    assert [block.origin for block in shape.blocks] == sorted(set(range(len(plan.blocks))) - plan.gone)
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


@pytest.mark.parametrize("model_type", SOME)
@torch.inference_mode()
def test_what_goes_adds_nothing_and_the_rest_is_as_it_was(
    tiny_model: Any, tiny_loaded: Any, model_type: str
) -> None:
    pruned, dense = prune(tiny_loaded(model_type), **BLOCKS), tiny_model(model_type)[0]
    gone = pruned.plan.gone
    assert (len(gone), 0 in gone) == (2, False)
    assert torch.equal(pruned.loaded.model(IDS).logits, skipping(dense, set(gone))(IDS).logits)

    pruned, dense = prune(tiny_loaded(model_type), **ATTENTIONS), tiny_model(model_type)[0]
    silent = pruned.plan.silent
    assert (len(silent), 0 in silent) == (2, False)
    assert f"2 attentions removed ({', '.join(map(str, sorted(silent)))})" in pruned.plan.removed
    for index in silent:
        decoder_layers(dense)[index].self_attn.o_proj.weight.zero_()
    assert torch.equal(pruned.loaded.model(IDS).logits, dense(IDS).logits)
    block = decoder_layers(dense)[1]
    of_attention = (block.self_attn, *map(block.get_submodule, spec_for(dense.config).attention_norms))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (dense, pruned.loaded.model)]
    assert sizes[0] - sizes[1] == 2 * sum(p.numel() for module in of_attention for p in module.parameters())

    # 4: every query head has a key-value head of its own.
    for kv_heads in (2, 4):
        overrides = {"num_key_value_heads": kv_heads, "tie_word_embeddings": kv_heads == 2}
        pruned = prune(tiny_loaded(model_type, **overrides), **GROUPS)
        groups, count = groups_of(pruned.plan), round(0.4 * 4 * kv_heads)
        assert f"{count} of {4 * kv_heads} key-value groups removed" in pruned.plan.removed
        assert all(groups.kept)
        dense = tiny_model(model_type, **overrides)[0]
        for layer, kept in zip(decoder_layers(dense), groups.kept, strict=True):
            weight = layer.self_attn.o_proj.weight.view(64, kv_heads, -1)
            weight[:, [group for group in range(kv_heads) if group not in kept]] = 0
        logits = pruned.loaded.model(IDS).logits
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_block_that_does_nothing_goes_first(tiny_model: Any) -> None:
    model, _ = tiny_model()
    idle = decoder_layers(model)[2]
    for linear in (idle.self_attn.o_proj, idle.mlp.down_proj):
        linear.weight.zero_()
    plan, share = (choose_removals(model, IDS, replace(PLAIN, blocks=n))[0] for n in (1, 0.25))
    assert plan is not None
    assert share == plan
    assert plan.removed == (2,)
    assert plan.losses[2] == plan.loss == pytest.approx(0, abs=1e-6)
    expected = model(IDS[:, :29]).logits
    for index in (1, 3):
        without = skipping(tiny_model()[0], {2, index})
        every = slice(None, None, 4)
        measured = divergence(expected[:, every], without(IDS[:, :29]).logits[:, every])
        assert plan.losses[index] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("model_type", SOME)
def test_the_refit_lowers_the_divergence(tiny_model: Any, tiny_loaded: Any, model_type: str) -> None:
    expected = tiny_model(model_type)[0](IDS).logits
    for axis in (BLOCKS, ATTENTIONS, GROUPS):
        cut, solved = (
            prune(tiny_loaded(model_type), reconstruct=how, ridge=1e-3, **axis).loaded.model(IDS).logits
            for how in ("none", "block-by-block")
        )
        assert divergence(expected, solved) < 0.9 * divergence(expected, cut), axis


def test_a_linear_block_is_made_up_for_in_full(tiny_model: Any) -> None:
    """Where what a block adds is linear in the FFN before it, nothing is lost."""
    model, tokenizer = tiny_model()
    with torch.no_grad():
        before, gone = (decoder_layers(model)[index] for index in (1, 2))
        gone.self_attn.o_proj.weight.zero_()
        gone.mlp.down_proj.weight.zero_()
    expected, weight = model(IDS).logits, before.mlp.down_proj.weight.clone()
    pruned = prune(
        LoadedModel(model, tokenizer, ModelSource("tiny", "folder", "tiny")),
        blocks=1,
        reconstruct="block-by-block",
    )
    assert pruned.plan.gone == {2}
    assert torch.allclose(decoder_layers(pruned.loaded.model)[1].mlp.down_proj.weight, weight, atol=1e-6)
    assert torch.allclose(pruned.loaded.model(IDS).logits, expected, atol=1e-4)


@torch.inference_mode()
def test_o_proj_is_solved_for_what_the_attention_gave(tiny_model: Any, tiny_loaded: Any) -> None:
    """In the first block that loses a group, before which nothing is changed."""
    cut, solved = (
        prune(tiny_loaded(), reconstruct=name, ridge=1e-6, **GROUPS) for name in ("none", "block-by-block")
    )
    assert cut.plan.kv_groups == solved.plan.kv_groups
    given: list[torch.Tensor] = []
    for model in (tiny_model()[0], cut.loaded.model, solved.loaded.model):
        o_proj = decoder_layers(model)[min(cut.plan.narrowed)].self_attn.o_proj
        with output_hook(o_proj, lambda x, output: given.append(output)):
            model(IDS)
    dense, without, with_refit = given
    assert (with_refit - dense).square().mean() < 0.9 * (without - dense).square().mean()


def test_channels_go_from_the_blocks_that_stay_and_a_plan_does_it_again(tiny_loaded: Any) -> None:
    result = prune(tiny_loaded(), prune_ratio=0.25, blocks=1, reconstruct="block-by-block", kv_groups=0.25)
    widths = model_shape(result.loaded.model).ffn_widths
    assert len(widths) == 3
    assert sum(widths) == pytest.approx(0.75 * 3 * 128, abs=8)
    assert result.plan.at_ratio(0.25).shape == result.plan.shape
    assert f"1 of 4 blocks removed ({next(iter(result.plan.gone))})" in result.plan.removed
    record = record_to_json(result.plan)
    assert not {"attention", "vocabulary"} & (record.keys() | record["settings"].keys()), "nothing asked"
    read = record_from_json(PruningPlan, record, where="plan")
    again = prune(tiny_loaded(), read)
    assert torch.equal(again.loaded.model(IDS).logits, result.loaded.model(IDS).logits)


def test_a_checkpoint_without_blocks_is_a_plain_folder(tiny_loaded: Any, tmp_path: Path) -> None:
    layers = {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    result = prune(tiny_loaded("qwen2", **layers, **windows), **BLOCKS)
    folder = tmp_path / "checkpoint"
    save_checkpoint(result.loaded, folder, plan=result.plan)
    stated = json.loads((folder / "config.json").read_text())
    assert stated["num_hidden_layers"] == 2
    assert "auto_map" not in stated
    assert not list(folder.glob("*.py"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model(IDS).logits, result.loaded.model(IDS).logits)


def test_as_few_groups_in_every_block_as_in_the_others(tiny_loaded: Any, tmp_path: Path) -> None:
    """Uniform, but with other heads than config.json says of the whole model."""
    result = prune(tiny_loaded(num_key_value_heads=4, hidden_size=96), kv_groups=0.75)
    assert str(groups_of(result.plan)) == "1, 1, 1, 1"
    folder = tmp_path / "checkpoint"
    save_checkpoint(result.loaded, folder, plan=result.plan)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_key_value_heads"] == 4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for model in (theirs, load_pruned(folder)):
        assert torch.equal(model(IDS).logits, result.loaded.model(IDS).logits)


def test_the_first_block_of_each_kind_keeps_its_attention(tiny_loaded: Any) -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    dense = tiny_loaded(
        "qwen2", layer_types=kinds, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    assert removable_attentions(dense.model) == [2, 3]
    assert removable_attentions(dense.model, {1}) == [3]
    model = prune(dense, **ATTENTIONS).loaded.model
    ids, plain = (
        model.generate(IDS[:1], max_new_tokens=12, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(ids, plain)


def test_a_share_is_of_the_groups_that_other_cuts_leave(tiny_loaded: Any) -> None:
    # Of all eight groups it would be five, one more than can go; of the last block's two it is one.
    assert groups_of(prune(tiny_loaded(), kv_groups=0.57, blocks=3).plan).removed == (1, 2)


@pytest.mark.parametrize(
    ("settings", "heads", "message"),
    [
        ({"kv_groups": 0.6}, 2, r"4 blocks .* 8 in all .*0\.125 to 0\.5"),
        ({"kv_groups": 0.01}, 2, r"0\.125 to 0\.5"),
        ({"kv_groups": 0.4}, 1, r"allowed: 0\)?$"),
        ({"kv_groups": 1.0}, 2, "kv_groups"),
        ({"attentions": 4}, 2, "at most 3"),
        ({"attentions": 2, "blocks": 2}, 2, "at most 1"),
        ({"blocks": 4}, 2, "at most 3"),
        ({"blocks": 1.5}, 2, "neither a number nor a share"),
        ({"attentions": 0.1}, 2, "less than one of 4"),
    ],
)
def test_what_cannot_go_is_refused(tiny_loaded: Any, settings: Any, heads: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny_loaded(num_key_value_heads=heads), **settings)


def test_plans_that_do_not_fit_are_refused(tiny_loaded: Any, tmp_path: Path) -> None:
    plan = prune(tiny_loaded(), **GROUPS).plan
    groups = groups_of(plan)
    with pytest.raises(InputError, match="another model"):
        apply_plan(tiny_loaded(num_key_value_heads=4).model, plan)
    with pytest.raises(InputError, match="block 0 keeps no group"):
        apply_plan(
            tiny_loaded().model,
            replace(plan, kv_groups=replace(groups, kept=((), *groups.kept[1:]))),
        )
    wrong: dict[str, Callable[[], object]] = {
        "ascending": lambda: replace(groups, kept=((1, 0), *groups.kept[1:])),
        "one for each block": lambda: replace(groups, kept=groups.kept[1:]),
    }
    for message, make in wrong.items():
        with pytest.raises(InputError, match=message):
            make()
    record = record_to_json(plan)
    record["kv_groups"]["kept"][0] = [7]
    with pytest.raises(InputError, match=r"plan\.json.*ascending"):
        record_from_json(PruningPlan, record, where="plan.json")
    for field, settings in (("depth", BLOCKS), ("attention", ATTENTIONS)):
        plan = prune(tiny_loaded(), **settings).plan
        first = replace(getattr(plan, field), removed=(0, 1))
        with pytest.raises(InputError, match="cannot go"):
            apply_plan(tiny_loaded().model, replace(plan, **{field: first}))


def test_a_config_without_the_first_attention_is_refused(tiny_loaded: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(prune(tiny_loaded(), **ATTENTIONS).loaded, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for block, skip, reason in (
        ("1", ["mlp"], "skip"),
        ("1", "attention", "skip"),
        ("0", ["attention"], "block 0 has no attention"),
    ):
        changed = config | {"per_layer_config": {block: {"skip": skip}}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=reason):
            load_pruned(folder)
