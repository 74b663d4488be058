"""One budget over all axes: the least predicted loss, and a model that takes no more than was asked."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape
from cfsp.models.source import LoadedModel
from cfsp.progress import no_progress
from cfsp.pruning.axes.vocabulary import count_tokens, cut_vocabulary, plan_vocabulary, token_order
from cfsp.pruning.budget import AXES, Budget, ChannelCurve, Evidence, Levels
from cfsp.pruning.fitting import _of_other_blocks
from cfsp.pruning.parameters import count_parameters
from cfsp.pruning.plan import PruningPlan
from cfsp.pruning.prune import PruneResult, prune_model, statistics_for
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.trials import Trials, tried_windows
from cfsp.records import record_from_json, record_to_json
from cfsp.text.calibration import Calibration

IDS = torch.randint(0, 300, (6, 32), generator=torch.Generator().manual_seed(5))
SETTINGS = PruneSettings(prune_ratio=0, align=8, dtype="float32")


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prune(dense: LoadedModel, target: float, settings: PruneSettings = SETTINGS, **more: Any) -> PruneResult:
    budget = Budget("target_parameters", target, count_parameters(dense.model), "parameters", **more)
    return prune_model(dense, calibration(), settings, budget=budget)


def calibration() -> Calibration:
    return Calibration(IDS, ("random",), 0, "0" * 64)


@pytest.mark.parametrize(
    ("n_windows", "seqlen", "width"), [(128, 1024, 1536), (128, 512, 14336), (128, 32, 128)]
)
def test_a_trial_is_repaired_on_more_tokens_than_an_ffn_has_channels(
    n_windows: int, seqlen: int, width: int
) -> None:
    """And judged on others, all of them spread over the text."""
    fit, judged = tried_windows(n_windows, seqlen, width)
    assert len(fit) >= 8
    assert 4 * width <= len(fit) * seqlen <= max(8, 4 * width / seqlen + 1) * seqlen
    assert len(judged) == 4
    assert not set(fit) & set(judged)
    assert min(fit) == 0
    assert min(judged) < n_windows / 2 < max(judged)
    assert max(fit) >= 0.9 * n_windows


@pytest.mark.parametrize("n_windows", [1, 2, 6])
def test_a_trial_makes_do_with_few_windows(n_windows: int) -> None:
    fit, judged = tried_windows(n_windows, 32, 128)
    assert fit
    assert judged
    assert {*fit, *judged} == set(range(n_windows))


def test_a_curve_goes_through_what_was_measured() -> None:
    curve = ChannelCurve((0.1, 0.2, 0.4), (0.2, 0.8, 1.6))
    assert curve.at(np.array([0.1, 0.2, 0.4])) == pytest.approx([0.2, 0.8, 1.6])
    # Twice the ratio is four times the loss below 0.2, and twice the loss from there on.
    assert curve.at(np.array([0.0, 0.05, 0.3, 0.8])) == pytest.approx([0.0, 0.05, 1.2, 3.2])
    assert ChannelCurve().at(np.array([0.5])) == 0


def test_the_combination_of_the_least_loss_is_found() -> None:
    draw = np.random.default_rng(3)

    def levels(units: int, count: int) -> Levels:
        return Levels(
            units,
            np.arange(count),
            np.cumsum(draw.uniform(0, 5, count)) * (np.arange(count) > 0),
            np.cumsum(draw.uniform(0, 0.1, count)) * (np.arange(count) > 0),
        )

    tables = {
        "vocabulary": levels(50, 20),
        "attentions": levels(8, 4),
        "kv_groups": levels(16, 5),
        "blocks": levels(8, 3),
    }
    curve = ChannelCurve((0.1, 0.3), (0.1, 0.5))
    evidence = Evidence(tables, curve, channels=100, channel_saves=0.5, ratios=(0.0, 0.9))
    for excess in (3.0, 20.0, 50.0, 70.0):
        best = np.inf
        for places in itertools.product(range(20), range(4), range(5), range(3)):
            picked = list(zip(tables.values(), places, strict=True))
            missing = max(0.0, excess - sum(table.saved[level] for table, level in picked))
            ratio = missing / 0.5 / (100 * (1 - places[-1] / 8))
            if ratio <= 0.9:
                lost = sum(table.losses[level] for table, level in picked) + float(curve.at(np.array(ratio)))
                best = min(best, lost)
        choice = evidence.choose(excess)
        assert choice is not None
        assert best - 1e-9 <= choice.loss <= 1.1 * best + 1e-9
        for axis in (*tables, "ffn"):
            alone = evidence.choose(excess, axis)
            assert alone is None or alone.loss >= best - 1e-9
            assert alone is None or all(gone == 0 for name, gone in alone.removed.items() if name != axis)
    depth = tables["blocks"].saved + 0.9 * 0.5 * 100 * (1 - np.arange(3) / 8)
    most = depth.max() + sum(table.saved[-1] for axis, table in tables.items() if axis != "blocks")
    assert evidence.choose(most + 1) is None
    assert evidence.choose(most - 1e-6) is not None
    assert evidence.largest.removed == {
        axis: int(depth.argmax() if axis == "blocks" else table.removed[-1]) for axis, table in tables.items()
    }
    # Only one group goes beside attentions, and with three of these there is no model.
    together = np.array(np.broadcast_to(np.arange(5)[:, None], (4, 5, 3)))
    together[1:] = np.minimum(together[1:], 1)
    together[-1] = -1
    fewer = replace(evidence, going={"kv_groups": together}).largest.removed
    assert fewer["attentions"] < 3
    assert fewer["kv_groups"] == (1 if fewer["attentions"] else 4)
    assert replace(evidence, going={"kv_groups": together}).choose(most - 1e-6) is None


def test_of_combinations_as_good_the_one_of_the_fewest_axes_is_taken() -> None:
    tokens = Levels(90, np.arange(0, 90, 10), np.arange(0, 90, 10) * 1.0, np.arange(0, 90, 10) * 0.01)
    nothing = Levels.nothing(4)
    tables = {"vocabulary": tokens, "attentions": nothing, "kv_groups": nothing, "blocks": nothing}
    for loss, gone in ((0.05, 60), (0.02, 50)):
        curve = ChannelCurve((0.1, 0.5), (loss, 2.0))
        choice = Evidence(tables, curve, 100, 1.0, (0.0, 0.9)).choose(60.0)
        assert choice is not None
        assert choice.removed["vocabulary"] == gone
        assert choice.ratio == pytest.approx(0.6 - gone / 100)
    choice = Evidence(tables, curve, 100, 1.0, (0.0, 0.9)).choose(-5.0)
    assert choice is not None
    assert (choice.loss, choice.ratio) == (0, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_they_will_be(tiny_loaded: Any, tied: bool) -> None:
    dense = tiny_loaded("qwen2", tied=tied)
    cost, tokenizer = count_parameters(dense.model), dense.tokenizer
    settings = PruneSettings(prune_ratio=0.3, align=8, vocabulary=300, blocks=1, attentions=1, kv_groups=0.25)
    result = prune_model(dense, Calibration(IDS, ("random",), 0, "0" * 64), settings)
    assert cost(result.plan.shape, tokenizer) == parameters(result.loaded.model)


def test_the_order_of_tokens_is_that_of_any_vocabulary(tiny_loaded: Any) -> None:
    dense = tiny_loaded()
    counts = count_tokens(IDS.tolist(), 384)
    order = token_order(dense, counts)
    assert len(order.losses) == len(order.removed) + 1
    assert order.losses[0] == 0
    assert (np.diff(order.losses) > 0).all()
    kept = plan_vocabulary(dense, counts, 350, sources=()).kept
    assert set(range(384)) - set(kept) == set(order.removed[:34])


@pytest.mark.parametrize("share", [0.95, 0.75, 0.55])
def test_a_budget_is_met_to_the_step(tiny_loaded: Any, share: float) -> None:
    dense = tiny_loaded()
    target = share * parameters(dense.model)
    result = prune(dense, target)
    shares = result.plan.budget
    assert shares is not None
    reached = parameters(result.loaded.model)
    assert reached == shares.reached <= target
    # A unit of channels has 8 x 3 x 64 parameters, a step of the vocabulary 32 x 64.
    assert target - reached < max(8 * 3 * 64, 32 * 64)
    assert sum(axis.saved for axis in shares.axes) == pytest.approx(shares.dense - reached)
    by_name = {axis.axis: axis for axis in shares.axes}
    assert by_name["blocks"].removed == len(result.plan.gone)
    assert by_name["attentions"].removed == len(result.plan.silent)
    groups = result.plan.kv_groups
    assert by_name["kv_groups"].removed == (groups.removed[0] if groups else 0)
    kept = result.plan.vocabulary
    assert by_name["vocabulary"].removed == (384 - len(kept.kept) if kept else 0)
    assert record_from_json(type(result.plan), record_to_json(result.plan), where="x") == result.plan
    assert result.plan.at_ratio(0.1).budget is None


def test_what_is_fixed_stays_so(tiny_loaded: Any) -> None:
    dense = tiny_loaded()
    before = parameters(dense.model)
    fixed = PruneSettings(prune_ratio=0, align=8, dtype="float32", vocabulary=330, attentions=1)
    plan = prune(dense, 0.8 * before, fixed, axes=("ffn",)).plan
    assert plan.vocabulary is not None
    assert len(plan.vocabulary.kept) == 330
    assert (len(plan.silent), len(plan.gone)) == (1, 0)
    assert plan.keep_ratio < 1
    share = PruneSettings(prune_ratio=0, align=8, dtype="float32", kv_groups=0.5)
    plan = prune(tiny_loaded(), 0.8 * before, share, axes=("ffn",)).plan
    assert plan.kv_groups is not None
    assert plan.kv_groups.removed == (4, 8)
    assert plan.keep_ratio < 1
    plan = prune(tiny_loaded(), 0.97 * before, axes=("vocabulary",)).plan
    assert plan.keeps_blocks
    assert plan.vocabulary is not None


@pytest.mark.parametrize("tokens", [384, 370])
def test_rows_that_no_token_has_go_first(tiny_loaded: Any, tokens: int) -> None:
    """Of 450 rows the first 384 stay, a multiple of the step, whatever little is asked; then it is as ever."""
    dense = tiny_loaded()
    dense = cut_vocabulary(dense, plan_vocabulary(dense, count_tokens(IDS.tolist(), 384), tokens, sources=()))
    dense.model.resize_token_embeddings(450, mean_resizing=False)
    calibrated = replace(calibration(), input_ids=IDS % tokens)
    cost, whole = count_parameters(dense.model), copy.deepcopy(dense)
    for less in (1, 66 * 64):
        budget = Budget("target_parameters", parameters(whole.model) - less, cost, "parameters")
        result = prune_model(copy.deepcopy(whole), calibrated, SETTINGS, budget=budget)
        assert result.plan.vocabulary is not None
        assert result.plan.vocabulary.kept == tuple(range(384))
        assert result.plan.keeps_blocks
        assert result.plan.budget is not None
        assert result.plan.budget.loss == 0
        assert {one.axis: one.removed for one in result.plan.budget.axes if one.removed} == {"vocabulary": 66}
        assert result.loaded.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
        ids = IDS[:1] % tokens
        assert torch.equal(result.loaded.model(ids).logits, whole.model(ids).logits[..., :384])
    budget = Budget("target_parameters", 0.7 * parameters(whole.model), cost, "parameters")
    result = prune_model(copy.deepcopy(whole), calibrated, SETTINGS, budget=budget)
    assert result.plan.vocabulary is not None
    assert len(result.plan.vocabulary.kept) <= 384
    assert parameters(result.loaded.model) <= budget.target
    kept = prune_model(whole, calibrated, SETTINGS, budget=replace(budget, axes=("ffn",)))
    assert kept.plan.vocabulary is None


@pytest.mark.parametrize("rows", [384, 450])
def test_a_budget_that_the_dense_model_meets_removes_nothing(
    tiny_model: Any, tiny_loaded: Any, rows: int
) -> None:
    dense = tiny_loaded(vocab_size=rows)
    result = prune(dense, parameters(dense.model))
    assert result.plan.keeps_blocks
    assert result.plan.vocabulary is None
    assert result.plan.budget is not None
    assert result.plan.budget.loss == 0
    for name, value in tiny_model(vocab_size=rows)[0].state_dict().items():
        assert torch.equal(result.loaded.model.state_dict()[name], value)


def test_key_value_groups_alone_meet_a_budget(tiny_loaded: Any) -> None:
    """Ever twice as many are tried, and a third of the 16, 5, at most; what is too many comes back."""
    for wanted in (3, 5):
        dense = tiny_loaded(num_key_value_heads=4)
        whole, cost = model_shape(dense.model), count_parameters(dense.model)
        target = cost(whole.without_groups({1: 3, 2: wanted - 3}), dense.tokenizer)
        result = prune(dense, target, axes=("kv_groups",))
        assert result.plan.kv_groups is not None
        assert result.plan.kv_groups.removed == (wanted, 16)
        assert result.plan.keep_ratio == 1
        assert parameters(result.loaded.model) <= target
    dense = tiny_loaded(num_key_value_heads=4)
    with pytest.raises(InputError, match="less than any combination"):
        prune(dense, cost(whole.without_groups({1: 3, 2: 3}), dense.tokenizer), axes=("kv_groups",))


@pytest.mark.parametrize("axes", [("vocabulary",), ("ffn",), tuple(AXES)])
def test_a_budget_that_nothing_meets_is_refused_with_the_least(
    tiny_loaded: Any, axes: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match=r"target_parameters: 0\.001 M .* about (\S+) M") as caught:
        prune(tiny_loaded(), 1000.0, axes=axes)
    least = smallest_of(caught.value)
    assert parameters(prune(tiny_loaded(), least, axes=axes).loaded.model) == least
    with pytest.raises(InputError) as caught:
        prune(tiny_loaded(), least - 1, axes=axes)
    assert smallest_of(caught.value) == least


@pytest.mark.parametrize("axes", [tuple(AXES), ("attentions", "kv_groups", "blocks")])
def test_every_budget_from_the_smallest_on_is_met(tiny_loaded: Any, axes: tuple[str, ...]) -> None:
    """Blocks that go take attentions and groups along, so that not all that axes save adds up."""
    shape = {"num_hidden_layers": 6, "num_key_value_heads": 4}
    with pytest.raises(InputError) as caught:
        prune(tiny_loaded(**shape), 1000.0, axes=axes)
    least = smallest_of(caught.value)
    for more in (0, 1000, 6000, 11000, 20000):
        dense = tiny_loaded(**shape)
        assert parameters(prune(dense, least + more, axes=axes).loaded.model) <= least + more


def test_no_part_goes_for_nothing(tiny_loaded: Any) -> None:
    shape = {"num_hidden_layers": 6, "num_key_value_heads": 4}
    dense = tiny_loaded(**shape)
    whole, cost = model_shape(dense.model), count_parameters(dense.model)
    for share in (0.97, 0.93, 0.85):
        target = share * parameters(dense.model)
        plan = prune(tiny_loaded(**shape), target, axes=("attentions", "kv_groups", "blocks")).plan
        assert plan.budget is not None
        rest = target - plan.budget.reached
        assert rest >= 0
        takes = {
            "kv_groups": whole.without_groups({1: 1}),
            "attentions": whole.without(attentions=[1]),
            "blocks": whole.without(blocks=[1]),
        }
        for axis in plan.budget.axes:
            if axis.removed and axis.axis in takes:
                assert rest < plan.budget.dense - cost(takes[axis.axis], dense.tokenizer)


def smallest_of(error: InputError) -> int:
    """Parameters that a refusal says are enough."""
    return round(float(str(error).split("about ")[1].split()[0]) * 1e6)


def test_a_curve_has_the_ratios_that_were_made(tiny_loaded: Any) -> None:
    """Of 128 channels in steps of 64 neither 5 nor 15 % can go: what costs nothing there is no evidence."""
    settings = replace(SETTINGS, align=64, uniform_width=True)
    dense = tiny_loaded()
    trials = Trials(dense, calibration(), settings, statistics_for, IDS[:, :16], no_progress)
    assert list(trials.channels((0.05, 0.15, 0.4)).ratios) == [0.5]
    assert trials.channels((0.05,)).ratios == []


def test_a_vocabulary_that_cannot_be_trimmed_is_left_alone(tiny_loaded: Any) -> None:
    dense = tiny_loaded()
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    target = 0.9 * parameters(dense.model)
    result = prune(replace(dense, tokenizer=tokenizer), target, axes=("vocabulary", "ffn"))
    assert result.plan.vocabulary is None
    assert parameters(result.loaded.model) <= target
    with pytest.raises(InputError, match="cannot be trimmed"):
        prune(replace(dense, tokenizer=tokenizer), target, axes=("vocabulary",))


def test_the_vocabulary_keeps_what_the_attentions_that_go_leave_room_for() -> None:
    candidates = tuple(range(1, 8))

    def of_others(*removed: int, gone: Collection[int] = (), parts: int = 1) -> list[int]:
        return _of_other_blocks((*removed, *candidates), len(removed), gone, parts)

    assert of_others(4, 5) == [4, 5]
    assert of_others(4, 5, gone={4}) == [5, 1]
    assert of_others(gone={4}) == []
    assert of_others(4, 5, gone={2}, parts=2) == [2, 6], (
        "4 and 5 are block 2's; 0 is no candidate, 1 its block's last"
    )


def test_a_share_of_groups_is_of_the_attentions_that_a_budget_leaves(tiny_loaded: Any) -> None:
    dense = tiny_loaded(num_hidden_layers=8, num_key_value_heads=4)
    share = replace(SETTINGS, kv_groups=0.5)
    whole, cost = model_shape(dense.model), count_parameters(dense.model)
    half = whole.without_groups(dict.fromkeys(range(8), 2))
    target = cost(half.without(attentions=[7]), dense.tokenizer) + 500
    plan = prune(dense, target, share, axes=("attentions",)).plan
    assert plan.keep_ratio == 1, "another attention goes, and no channels"
    assert plan.kv_groups is not None
    assert plan.budget is not None
    removed, total = plan.kv_groups.removed
    assert (removed, total) == (2 * (8 - len(plan.silent)), 4 * (8 - len(plan.silent)))
    by_name = {axis.axis: axis for axis in plan.budget.axes}
    assert (by_name["kv_groups"].removed, by_name["kv_groups"].units) == (removed, 32)
    assert plan.budget.reached <= target


def test_what_parts_alone_cannot_reach_is_refused_with_more_than_was_asked(tiny_loaded: Any) -> None:
    dense = tiny_loaded(num_hidden_layers=8, num_key_value_heads=4)
    for target in np.linspace(0.3, 0.9, 13) * parameters(dense.model):
        model = tiny_loaded(num_hidden_layers=8, num_key_value_heads=4)
        result, said = None, ""
        try:
            result = prune(model, target, axes=("attentions", "kv_groups", "blocks"))
        except InputError as error:
            said = str(error)
        if result is None:
            assert float(said.split("about ")[1].split()[0]) * 1e6 > target, said
        else:
            assert parameters(result.loaded.model) <= target
            assert result.plan.keep_ratio == 1


@pytest.mark.parametrize(
    "again",
    [
        {"vocabulary": 320},
        {"prune_ratio": 0.25},
        {"blocks": 2},
        {"attentions": 1},
        {"kv_groups": 0.2},
        {"prune_ratio": 0.25, "blocks": 1, "attentions": 1, "kv_groups": 0.2, "vocabulary": 320},
    ],
    ids=str,
)
def test_a_model_with_blocks_that_do_not_attend_is_pruned_again(
    tiny_loaded: Any, again: dict[str, Any]
) -> None:
    once = prune_model(
        tiny_loaded(num_hidden_layers=6), calibration(), replace(SETTINGS, attentions=2)
    ).loaded
    before = model_shape(once.model)
    result = prune_model(once, calibration(), replace(SETTINGS, **again))
    shape = model_shape(result.loaded.model)
    assert result.plan.shape.agrees_with(shape)
    assert len(shape.blocks) == 6 - again.get("blocks", 0)
    kept = [before.blocks[block.origin].has_attention for block in result.plan.shape.blocks]
    assert sum(kept) - sum(block.has_attention for block in shape.blocks) == again.get("attentions", 0)
    plan = record_from_json(PruningPlan, record_to_json(result.plan), where="plan")
    assert plan == result.plan


@pytest.mark.parametrize(("share", "count"), [(0.34, 2), (0.2, 1), (2, 2), (0, 0)])
def test_blocks_and_attentions_go_by_number_or_share(tiny_loaded: Any, share: float, count: int) -> None:
    for field in ("blocks", "attentions"):
        model = tiny_loaded(num_hidden_layers=6)
        result = prune_model(model, calibration(), replace(SETTINGS, **{field: share}))
        plan = result.plan
        assert len(plan.gone if field == "blocks" else plan.silent) == count
        assert getattr(plan.settings, field) == count
        assert isinstance(getattr(plan.settings, field), int)


def test_a_share_of_less_than_one_is_refused(tiny_loaded: Any) -> None:
    with pytest.raises(InputError, match="less than one of 4"):
        prune_model(tiny_loaded(), calibration(), replace(SETTINGS, blocks=0.1))


def test_what_is_neither_a_number_nor_a_share(tiny_loaded: Any) -> None:
    with pytest.raises(InputError, match="neither a number nor a share"):
        prune_model(tiny_loaded(), calibration(), replace(SETTINGS, blocks=1.5))


def test_no_more_attentions_go_than_there_are(tiny_loaded: Any) -> None:
    once = prune_model(tiny_loaded(), calibration(), replace(SETTINGS, attentions=2)).loaded
    with pytest.raises(InputError, match="attentions"):
        prune_model(once, calibration(), replace(SETTINGS, attentions=2))
