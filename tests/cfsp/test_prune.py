from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import InputError, LimitError
from cfsp.evaluation.loss import divergence, perplexity
from cfsp.models.architectures import added_norms, decoder_layers, feed_forward, model_shape
from cfsp.models.source import LoadedModel, ModelSource
from cfsp.pruning.block_by_block import _Columns, _Norm, apply_plan
from cfsp.pruning.forecast import RATIOS
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.prune import plan_model, prune_model
from cfsp.pruning.settings import RECONSTRUCTIONS, PruneSettings
from cfsp.records import read_record, write_record
from cfsp.text import self_sampling
from cfsp.text.calibration import Calibration, load_calibration
from cfsp.text.tokens import TokenWindows


def loaded(tiny_model: Any, model_type: str = "llama", **overrides: Any) -> LoadedModel:
    model, tokenizer = tiny_model(model_type, **overrides)
    return LoadedModel(
        copy.deepcopy(model), tokenizer, ModelSource(reference="tiny", kind="folder", name="tiny")
    )


def calibration(model: Any, count: int = 6, seqlen: int = 32) -> Calibration:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, model.config.vocab_size, (count, seqlen), generator=generator)
    return Calibration(ids, ("random",), 5, "0" * 64)


@pytest.mark.parametrize("model_type", ["llama", "gemma4_text"])
def test_ratio_zero_is_the_dense_model_bit_for_bit(tiny_model: Any, model_type: str) -> None:
    dense = loaded(tiny_model, model_type)
    before = {name: p.clone() for name, p in dense.model.state_dict().items()}
    result = prune_model(dense, calibration(dense.model), PruneSettings(prune_ratio=0.0))
    assert result.plan.keep_ratio == 1
    for name, value in dense.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("model_type", ["llama", "gemma4_text"])
def test_what_the_dense_blocks_give_is_not_computed_twice(tiny_model: Any, model_type: str) -> None:
    dense = loaded(tiny_model, model_type)
    data = calibration(dense.model)
    more: dict[str, Any] = {"blocks": 1, "kv_groups": 0.25} if model_type == "llama" else {}
    _, _, plan, states = plan_model(dense, data, PruneSettings(prune_ratio=0.3, align=1, **more))
    # What blocks leave for later ones beside hidden states is not kept: there they are all run.
    assert (states is None) == (model_type == "gemma4_text")
    weights, passes = [], []
    for kept in (states, None):
        model, runs = copy.deepcopy(dense.model), list[int]()
        with decoder_layers(model)[0].register_forward_hook(lambda *_, runs=runs: runs.append(1)):
            apply_plan(model, plan, states=kept, input_ids=data.input_ids)
        weights.append(model.state_dict())
        passes.append(len(runs))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert passes[0] == passes[1] - (0 if states is None else len(data.input_ids))


def test_cutting_equals_zeroing_the_removed_channels(tiny_model: Any) -> None:
    pruned, masked = loaded(tiny_model, "qwen2"), loaded(tiny_model, "qwen2")
    settings = PruneSettings(prune_ratio=0.5, align=1, reconstruct="none")
    plan = prune_model(pruned, calibration(pruned.model), settings).plan
    with torch.no_grad():
        for layer, block in zip(decoder_layers(masked.model), plan.blocks, strict=True):
            removed = torch.tensor(sorted(block.ranking[block.width :]))
            feed_forward(masked.model, layer).down.weight[:, removed] = 0
    ids = calibration(pruned.model).input_ids
    with torch.inference_mode():
        difference = pruned.model(input_ids=ids).logits - masked.model(input_ids=ids).logits
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize("model_type", ["llama", "gemma4_text"])
def test_a_plan_says_what_other_ratios_cost_before_the_repair(tiny_model: Any, model_type: str) -> None:
    dense = loaded(tiny_model, model_type)
    data = calibration(dense.model, 4)
    settings = PruneSettings(prune_ratio=0.2, align=1, reconstruct="none", dtype="float32")
    _, _, plan, _ = plan_model(dense, data, settings)
    assert plan.forecast is not None
    assert (plan.forecast.ratios, plan.forecast.tokens) == (RATIOS, data.input_ids.numel())
    with torch.inference_mode():
        expected = dense.model(input_ids=data.input_ids).logits[:, ::4].log_softmax(-1)
        for ratio, loss in zip(RATIOS, plan.forecast.losses, strict=True):
            cut = copy.deepcopy(dense.model)
            apply_plan(cut, plan.at_ratio(ratio))
            actual = cut(input_ids=data.input_ids).logits[:, ::4].log_softmax(-1)
            measured = float((expected.exp() * (expected - actual)).sum(-1).mean())
            assert loss == pytest.approx(measured, rel=0.02, abs=2e-4)
    assert plan.forecast.losses[-1] > plan.forecast.losses[0] > 0
    for other in ({"blocks": 1} if model_type == "llama" else {}, {"prune_ratio": 0.0}):
        if other:
            asked = replace(settings, **other)
            assert plan_model(dense, data, asked)[2].forecast is None, "it is of channels alone"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gemma4_text"])
def test_reconstruction_keeps_the_model_closer_to_the_dense_one(tiny_model: Any, model_type: str) -> None:
    kls, dense = {}, loaded(tiny_model, model_type)
    data = calibration(dense.model, 32)
    for name in RECONSTRUCTIONS:
        pruned = loaded(tiny_model, model_type)
        prune_model(pruned, data, PruneSettings(prune_ratio=0.3, align=1, reconstruct=name))
        windows = TokenWindows(data.input_ids, "random", "")
        kls[name] = divergence(dense.model, pruned.model, windows).kl_mean
    assert kls["block-by-block"] < 0.9 * kls["none"]


def test_what_a_block_lacks_goes_back_through_the_norm_after_its_ffn(tiny_model: Any) -> None:
    """All channels stay; another weight's outputs, behind the norm, are what should come out."""
    model, _ = tiny_model("gemma3_text")
    layer = decoder_layers(model)[0]
    down, module = feed_forward(model, layer).down, added_norms(model, layer)[1]
    norm = _Norm(model, module)
    generator = torch.Generator().manual_seed(3)
    x = (
        torch.randn(1, 600, down.in_features, generator=generator)
        * torch.rand(600, 1, generator=generator)
        * 9
    )
    other = down.weight + 0.3 * down.weight.std() * torch.randn(down.weight.shape, generator=generator)
    solver = _Columns(down, torch.arange(down.in_features), norm)
    with torch.no_grad():
        given, wanted = down(x), norm(x @ other.T)
        solver.observe(x, given, wanted - norm(given))
        left = (norm(x @ solver.solve(1e-6).T) - wanted).square().mean()
        assert left < 0.03 * (norm(given) - wanted).square().mean()


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_each_block_is_solved_on_what_the_pruned_blocks_before_it_give(
    tiny_model: Any, model_type: str
) -> None:
    """Block by block, against the same least squares written once more on whole activations."""
    correction = 0.4
    dense, pruned = loaded(tiny_model, model_type), loaded(tiny_model, model_type)
    data = calibration(dense.model, 32)
    settings = PruneSettings(prune_ratio=0.3, align=1, ridge=1e-10, correction=correction, dtype="float32")
    plan = prune_model(pruned, data, settings).plan
    for index, block in enumerate(plan.blocks):
        before = copy.deepcopy(pruned.model)  # pruned up to this block, dense from it on
        for later in range(index, len(plan.blocks)):
            before.model.layers[later] = copy.deepcopy(dense.model.model.layers[later])
        seen = activations(before, index, data.input_ids)
        wanted = activations(dense.model, index, data.input_ids)
        x = seen["x"][:, list(block.kept)]
        target = seen["ffn"] + correction * (wanted["output"] - seen["output"])
        expected = torch.linalg.lstsq(x, target).solution
        found = (
            feed_forward(pruned.model, decoder_layers(pruned.model)[index]).down.weight.detach().double().T
        )
        torch.testing.assert_close(x @ found, x @ expected, rtol=1e-3, atol=1e-3)


def activations(model: Any, index: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """down_proj's input, the FFN's and the block's output of one block, each (tokens, features) float64."""
    layer = decoder_layers(model)[index]
    kept: dict[str, torch.Tensor] = {}
    hooks = [
        layer.mlp.down_proj.register_forward_hook(lambda m, i, o: kept.update(x=i[0], ffn=o)),
        layer.register_forward_hook(lambda m, i, o: kept.update(output=o[0] if isinstance(o, tuple) else o)),
    ]
    with torch.no_grad():
        model.model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: value.double().flatten(0, 1) for name, value in kept.items()}


def test_dead_channels_go_first_and_cost_nothing(tiny_model: Any) -> None:
    dense = loaded(tiny_model)
    layers = decoder_layers(dense.model)
    width = model_shape(dense.model).ffn_widths[0]
    dead = list(range(0, width, 4))
    with torch.no_grad():
        for layer in layers:
            feed_forward(dense.model, layer).up.weight[dead] = 0
    ids = calibration(dense.model).input_ids
    with torch.inference_mode():
        before = dense.model(input_ids=ids).logits
    settings = PruneSettings(
        prune_ratio=len(dead) / width,
        strength=0.0,
        score="activation_norm",
        align=1,
        reconstruct="none",
    )
    plan = prune_model(dense, calibration(dense.model), settings).plan
    assert all(set(block.ranking[block.width :]) == set(dead) for block in plan.blocks)
    with torch.inference_mode():
        torch.testing.assert_close(dense.model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_plan_survives_json_and_reapplies_at_other_ratios(tiny_model: Any, tmp_path: Path) -> None:
    first = loaded(tiny_model)
    data = calibration(first.model)
    settings = PruneSettings(prune_ratio=0.25, align=1, reconstruct="none")
    plan = prune_model(first, data, settings).plan
    write_record(tmp_path / "plan.json", plan)
    again = read_record(PruningPlan, tmp_path / "plan.json")
    assert again == plan
    fresh, moved = loaded(tiny_model), loaded(tiny_model)
    other = prune_model(fresh, data, replace(settings, prune_ratio=0.5)).plan
    assert again.at_ratio(0.5).shape.ffn_widths == other.shape.ffn_widths
    apply_plan(moved.model, again.at_ratio(0.5))
    for name, value in moved.model.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "flap"}, "score: unknown.*flap.*allowed: .*cfsp"),
        ({"reconstruct": "one-pass"}, "reconstruct: unknown.*allowed: .*block-by-block"),
        ({"score": "best"}, "score: unknown.*activation_norm"),
        ({"prune_ratio": 1.0}, "prune_ratio"),
        ({"strength": math.nan}, "strength"),
        ({"dtype": "float64"}, "dtype.*bfloat16"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    tiny_model: Any, changes: dict[str, Any], message: str
) -> None:
    dense = loaded(tiny_model)
    with pytest.raises(InputError, match=message):
        prune_model(dense, calibration(dense.model), replace(PruneSettings(), **changes))


def test_self_calibration_is_repeatable_and_seeded(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = []
    monkeypatch.setattr(self_sampling, "MAX_REPLY_TOKENS", 16)
    for cache, seed in (("a", 1), ("b", 1), ("c", 2)):
        monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path / cache))
        dense = loaded(tiny_model, max_position_embeddings=1024)
        state = torch.get_rng_state()
        draws.append(load_calibration(["self"], dense, nsamples=4, seqlen=32, seed=seed))
        assert torch.equal(torch.get_rng_state(), state), "sampling must not disturb the caller's generator"
    assert draws[0].sha256 == draws[1].sha256 != draws[2].sha256
    assert draws[0].input_ids.shape == (4, 32)
    start = dense.tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]
    assert draws[0].input_ids.flatten().tolist()[: len(start)] == start


def test_perplexity_is_that_of_the_models_own_loss(tiny_model: Any) -> None:
    dense = loaded(tiny_model)
    ids = calibration(dense.model, 3, 300).input_ids
    with torch.inference_mode():
        losses = [float(dense.model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    result = perplexity(dense.model, TokenWindows(ids, "random", ""))
    assert result == pytest.approx(float(torch.tensor(losses).mean().exp()), rel=1e-4)


def test_logits_that_are_not_finite_are_no_result(tiny_model: Any) -> None:
    dense, broken = loaded(tiny_model), loaded(tiny_model)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[5] = math.nan
    windows = TokenWindows(calibration(dense.model).input_ids, "random", "")
    with pytest.raises(LimitError, match="not finite"):
        perplexity(broken.model, windows)
    for pair in ((dense, broken), (broken, dense)):
        with pytest.raises(LimitError, match="not finite"):
            divergence(pair[0].model, pair[1].model, windows)


def test_divergence_counts_what_it_says(tiny_model: Any) -> None:
    a, b = loaded(tiny_model), loaded(tiny_model, "llama")
    with torch.no_grad():
        for parameter in b.model.parameters():
            parameter.mul_(1.1)
    ids = calibration(a.model, 2, 40).input_ids
    with torch.inference_mode():
        log_p = a.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        log_q = b.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    itself = divergence(a.model, a.model, TokenWindows(ids, "random", ""))
    assert (itself.kl_mean, itself.same_top1, itself.perplexity_ratio) == (0.0, 1.0, 1.0)
    result = divergence(a.model, b.model, TokenWindows(ids, "random", ""))
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result.kl_median == pytest.approx(float(kl.flatten().sort().values[38]), rel=2e-2)
    assert result.same_top1 == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
    assert result.perplexity_ratio == pytest.approx(result.perplexity / result.reference_perplexity)
