"""Whole blocks as an axis: which go, what the model then computes, and what the block before makes up for."""

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
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.axes.parts import blocks_stay, candidate_blocks, plan_blocks
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.prune import PruneResult, plan_model, prune_model
from cfsp.pruning.settings import PruneSettings
from cfsp.records import record_from_json, record_to_json
from cfsp.text.calibration import Calibration

IDS = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(5))
PLAIN = PruneSettings(prune_ratio=0, blocks=2, align=8, reconstruct="none", dtype="float32")


WITH_PARTS = [name for name, row in FAMILIES.items() if not blocks_stay(row)]


def prune(dense: LoadedModel, settings: PruneSettings, plan: PruningPlan | None = None) -> PruneResult:
    return prune_model(dense, Calibration(IDS, ("random",), 0, "0" * 64), settings, plan=plan)


def skipping(model: Any, gone: set[int]) -> Any:
    """The same model with blocks that hand on what they get."""
    for index in gone:
        decoder_layers(model)[index].forward = lambda hidden_states, **arguments: hidden_states
    return model


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    p, q = (logits.detach().log_softmax(-1) for logits in (expected, actual))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("model_type", WITH_PARTS)
@torch.inference_mode()
def test_without_refit_blocks_are_skipped_and_nothing_else(
    tiny_model: Any, tiny_loaded: Any, model_type: str
) -> None:
    pruned = prune(tiny_loaded(model_type), PLAIN)
    gone = pruned.plan.gone
    assert len(gone) == 2
    assert 0 not in gone
    expected = skipping(tiny_model(model_type)[0], set(gone))(IDS).logits
    assert torch.equal(pruned.loaded.model(IDS).logits, expected)
    shape = model_shape(pruned.loaded.model)
    assert pruned.plan.shape.agrees_with(shape)
    assert [block.origin for block in pruned.plan.shape.blocks] == sorted(set(range(4)) - gone)


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in WITH_PARTS])
def test_blocks_stay_whose_number_counts(tiny_loaded: Any, model_type: str) -> None:
    assert candidate_blocks(tiny_loaded(model_type).model) == []
    with pytest.raises(InputError, match=blocks_stay(FAMILIES[model_type])):
        prune(tiny_loaded(model_type), PLAIN)


@torch.inference_mode()
def test_the_block_that_does_nothing_goes_first(tiny_model: Any) -> None:
    model, _ = tiny_model()
    idle = decoder_layers(model)[2]
    for linear in (idle.self_attn.o_proj, idle.mlp.down_proj):
        linear.weight.zero_()
    plan = plan_blocks(model, IDS, 1)
    assert plan.removed == (2,)
    assert plan.losses[2] == plan.loss == pytest.approx(0, abs=1e-6)
    expected = model(IDS[:, :29]).logits
    for index in (1, 3):
        without = skipping(tiny_model()[0], {2, index})
        for linear in (without.model.layers[2].self_attn.o_proj, without.model.layers[2].mlp.down_proj):
            linear.weight.zero_()
        every = slice(None, None, 4)
        measured = divergence(expected[:, every], without(IDS[:, :29]).logits[:, every])
        assert plan.losses[index] == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("model_type", WITH_PARTS)
def test_the_refit_lowers_the_divergence(tiny_model: Any, tiny_loaded: Any, model_type: str) -> None:
    expected = tiny_model(model_type)[0](IDS).logits
    found = []
    for reconstruct in ("none", "block-by-block"):
        settings = replace(PLAIN, reconstruct=reconstruct, ridge=1e-3)
        found.append(divergence(expected, prune(tiny_loaded(model_type), settings).loaded.model(IDS).logits))
    assert found[1] < 0.9 * found[0]


def test_a_linear_block_is_made_up_for_in_full(tiny_model: Any) -> None:
    """Where what a block adds is linear in the FFN before it, nothing is lost."""
    model, tokenizer = tiny_model()
    with torch.no_grad():
        before, gone = (decoder_layers(model)[index] for index in (1, 2))
        gone.self_attn.o_proj.weight.zero_()
        gone.mlp.down_proj.weight.zero_()
    dense = LoadedModel(model, tokenizer, ModelSource(reference="tiny", kind="folder", name="tiny"))
    expected = model(IDS).logits
    weight = before.mlp.down_proj.weight.clone()
    settings = replace(PLAIN, blocks=1, reconstruct="block-by-block")
    pruned = prune(dense, settings)
    assert pruned.plan.gone == {2}
    assert torch.allclose(decoder_layers(pruned.loaded.model)[1].mlp.down_proj.weight, weight, atol=1e-6)
    assert torch.allclose(pruned.loaded.model(IDS).logits, expected, atol=1e-4)


@pytest.mark.parametrize("reconstruct", ["none", "block-by-block"])
def test_channels_go_from_the_blocks_that_stay(tiny_loaded: Any, reconstruct: str) -> None:
    settings = replace(PLAIN, prune_ratio=0.25, blocks=1, reconstruct=reconstruct)
    result = prune(tiny_loaded(), settings)
    widths = model_shape(result.loaded.model).ffn_widths
    assert len(widths) == 3
    assert sum(widths) == pytest.approx(0.75 * 3 * 128, abs=8)
    assert result.plan.keep_ratio == pytest.approx(0.75, abs=0.02)
    assert result.plan.at_ratio(0.25).shape == result.plan.shape
    gone = next(iter(result.plan.gone))
    assert f"1 of 4 blocks removed ({gone})" in result.plan.removed
    # The plan does the same to the dense model again.
    read = record_from_json(PruningPlan, record_to_json(result.plan), where="plan")
    again = prune(tiny_loaded(), PruneSettings(), read)
    assert torch.equal(again.loaded.model(IDS).logits, result.loaded.model(IDS).logits)


@pytest.mark.parametrize("model_type", WITH_PARTS)
def test_a_checkpoint_without_blocks_is_a_plain_folder(
    tiny_loaded: Any, tmp_path: Path, model_type: str
) -> None:
    layers = {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]} if model_type == "qwen2" else {}
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3} if layers else {}
    dense = tiny_loaded(model_type, **layers, **windows)
    result = prune(dense, PLAIN)
    folder = tmp_path / "checkpoint"
    save_checkpoint(result.loaded, folder, plan=result.plan)
    stated = json.loads((folder / "config.json").read_text())
    assert stated["num_hidden_layers"] == 2
    assert "auto_map" not in stated
    assert not list(folder.glob("*.py"))
    stay = sorted(set(range(4)) - result.plan.gone)
    assert [block.origin for block in read_checkpoint_info(folder).shape.blocks] == stay
    expected = result.loaded.model(IDS).logits
    for model in (load_pruned(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(model(IDS).logits, expected)
        # The cache is as deep as the model.
        assert model.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape == (1, 36)


def test_plans_without_blocks_keep_their_bytes(tiny_loaded: Any) -> None:
    dense = tiny_loaded()
    calibration = Calibration(IDS, ("random",), 0, "0" * 64)
    plan = plan_model(dense, calibration, replace(PLAIN, blocks=0)).plan
    record = record_to_json(plan)
    assert "depth" not in record
    assert "blocks" not in record["settings"]


@pytest.mark.parametrize("count", [4, 9])
def test_more_blocks_than_can_go_are_refused(tiny_loaded: Any, count: int) -> None:
    with pytest.raises(InputError, match="at most 3"):
        prune(tiny_loaded(), replace(PLAIN, blocks=count))


def test_a_plan_that_takes_the_first_block_is_refused(tiny_loaded: Any) -> None:
    result = prune(tiny_loaded(), PLAIN)
    assert result.plan.depth is not None
    wrong = replace(result.plan, depth=replace(result.plan.depth, removed=(0, 1)))
    with pytest.raises(InputError, match="cannot go"):
        apply_plan(tiny_loaded().model, wrong)
