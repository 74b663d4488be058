"""The whole way from a dense model to a pruned one, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import decoder_layers, model_shape, spec_for
from cfsp.models.offload import at_hand, check_scratch
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.parts import (
    GroupRemoval,
    Removal,
    check_attentions,
    plan_attentions,
    plan_blocks,
    plan_kv_groups,
    removable_attentions,
    removable_blocks,
    removable_count,
)
from cfsp.pruning.plan import PruningPlan, check_plan_fits, make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.spelling import teach_spellings
from cfsp.pruning.statistics import (
    BlockStatistics,
    collect_input_moments,
    collect_statistics,
    moment_windows,
    spread_windows,
)
from cfsp.pruning.vocabulary import (
    Counts,
    VocabularyPlan,
    count_alike,
    cut_vocabulary,
    plan_vocabulary,
)
from cfsp.settings import check_settings
from cfsp.text.calibration import Calibration
from cfsp.text.respelling import respelling
from cfsp.text.tokens import document_ids, load_documents, tokens_sha256

SPELLING_WINDOWS = 16
"""Windows on which the dense model is looked at before it loses tokens."""
TOLD_WINDOWS = 8
"""Windows behind what a plan tells of channels that all stay: nothing is decided by it."""
PROBE_TOKENS = 128
"""Tokens of every window on which the model is tried without a block, an attention or a part of one.

Of SmolLM2-135M, what one attention costs more than another differs by 0.02 nats from window to window, however many
tokens or positions of a window are read, so that more windows say more and longer ones do not.
"""


@dataclass(frozen=True)
class PruneResult:
    """What pruning leaves.

    Attributes:
        loaded: The changed model, with the tokenizer of the tokens that it keeps.
        plan: What was kept, and why.
        calibration: The windows, in the ids of the tokens that are kept.
        input_moments: Module name -> (in_features,) mean squared input in the PRUNED model.
    """

    loaded: LoadedModel
    plan: PruningPlan
    calibration: Calibration
    input_moments: dict[str, torch.Tensor]


def prune_model(
    loaded: LoadedModel,
    calibration: Calibration,
    settings: PruneSettings,
    *,
    plan: PruningPlan | None = None,
    counted: Sequence[str] = (),
    check: Callable[[ModelShape], None] | None = None,
    progress: Progress = no_progress,
) -> PruneResult:
    """Prune `loaded.model` in place: the vocabulary first, as channels are judged by the tokens that stay.

    Args:
        settings: Ignored where `plan`, which is applied as it is, is given.
        counted: References of the text whose tokens decide the vocabulary; the calibration windows where none.
        check: Raises for a shape that will not do, before the model is pruned to it.

    Raises:
        InputError: Settings or a plan that do not fit the model.
    """
    check_scratch(loaded.model)
    statistics = None
    if plan is None:
        loaded, calibration, statistics, plan = plan_model(
            loaded, calibration, settings, counted=counted, check=check, progress=progress
        )
    else:
        check_plan_fits(loaded.model, plan)
        check_settings(plan.settings)
        if check is not None:
            check(plan.shape)
        loaded, calibration = trim(loaded, calibration, plan.vocabulary, plan.settings, progress=progress)
    ids = calibration.input_ids
    apply_plan(loaded.model, plan, statistics=statistics, input_ids=ids, progress=progress)
    del statistics  # with its files
    with products_in(plan.settings.dtype, loaded.model.device.type):
        windows = moment_windows(ids)
        moments = collect_input_moments(loaded.model, windows, progress=progress)
    return PruneResult(loaded, plan, calibration, moments)


class Planned(NamedTuple):
    """A plan, and what it was made from: where tokens go, the model and the windows have none of them any more."""

    loaded: LoadedModel
    calibration: Calibration
    statistics: BlockStatistics
    plan: PruningPlan


def plan_model(
    loaded: LoadedModel,
    calibration: Calibration,
    settings: PruneSettings,
    *,
    counted: Sequence[str] = (),
    check: Callable[[ModelShape], None] | None = None,
    only_plan: bool = False,
    progress: Progress = no_progress,
) -> Planned:
    """Decide what goes; tokens of the vocabulary are gone afterwards. As `prune_model`, `statistics_for`."""
    check_settings(settings)
    settings = with_counts(loaded.model, settings)
    check_removals(loaded.model, settings)
    vocabulary, told = None, settings.keeps_blocks
    if settings.vocabulary:
        counts, sources = counts_of(loaded, calibration, counted), tuple(counted) or calibration.sources
        vocabulary = plan_vocabulary(loaded, counts, settings.vocabulary, sources=sources)
    loaded, calibration = trim(loaded, calibration, vocabulary, settings, progress=progress)
    depth, attention, groups = Removals(loaded.model, calibration, progress).of(settings)
    measured_on = calibration
    if told:
        measured_on = replace(calibration, input_ids=spread_windows(calibration.input_ids, TOLD_WINDOWS))
    statistics = statistics_for(
        loaded.model, measured_on, settings, only_plan=only_plan or told, progress=progress
    )
    plan = make_plan(loaded, statistics, calibration, settings, depth, attention, groups)
    plan = replace(plan, vocabulary=vocabulary)
    if check is not None:
        check(plan.shape)
    return Planned(loaded, calibration, statistics, plan)


class Removals:
    """Chooses which blocks go, which of the others lose their attention, and which groups the rest keeps.

    What was found for some blocks, or for some attentions beside them, serves again.
    """

    def __init__(self, model: Any, calibration: Calibration, progress: Progress = no_progress) -> None:
        windows, self._device_type = calibration.input_ids[:, :PROBE_TOKENS], model.device.type
        self._depth = cache(partial(plan_blocks, model, windows, progress=progress))
        self._attention = cache(partial(plan_attentions, model, windows, progress=progress))
        self._groups = cache(partial(plan_kv_groups, model, windows, progress=progress))

    def of(self, settings: PruneSettings) -> tuple[Removal | None, Removal | None, GroupRemoval | None]:
        """Those of some settings; None where none goes.

        Raises:
            InputError: More than there are.
        """
        depth = attention = groups = None
        with products_in(settings.dtype, self._device_type):
            if count := int(settings.blocks):
                depth = self._depth(count)
            gone = frozenset(depth.removed if depth else ())
            if count := int(settings.attentions):
                attention = self._attention(count, gone)
            if ratio := settings.kv_groups:
                silent = frozenset(attention.removed if attention else ())
                groups = self._groups(ratio, gone=gone, silent=silent)
        return depth, attention, groups


def with_counts(model: Any, settings: PruneSettings) -> PruneSettings:
    """Settings that say how many blocks and attentions go, where they say which share; of attentions of those left."""

    def count(amount: float, of: int, field: str) -> int:
        if amount >= 1 and amount != int(amount):
            raise InputError("neither a number nor a share", field=field, value=amount)
        count = int(amount) if amount >= 1 else round(amount * of)
        if amount and not count:
            raise InputError(f"less than one of {of}", field=field, value=amount)
        return count

    shape = model_shape(model)
    blocks = count(settings.blocks, len(shape.blocks), "blocks")
    attending = len(shape.blocks) - len(shape.without_attention) - blocks
    return replace(settings, blocks=blocks, attentions=count(settings.attentions, attending, "attentions"))


def check_removals(model: Any, settings: PruneSettings) -> None:
    """Raise InputError where the model has not so many blocks, attentions or groups, or was cut so that none can go.

    Groups are counted where nothing else goes: how many a share is beside that, only the plan can say.
    """
    if settings.blocks:
        removable_blocks(model, int(settings.blocks))
    if settings.attentions and (reason := spec_for(model.config).attentions_stay):
        raise InputError(reason, field="attentions", value=settings.attentions, allowed="0")
    if settings.attentions:
        others = len(decoder_layers(model)) - int(settings.blocks) - 1
        check_attentions(removable_attentions(model, frozenset())[:others], int(settings.attentions))
    if settings.kv_groups and not (settings.blocks or settings.attentions):
        removable_count(model, settings.kv_groups)


def counts_of(loaded: LoadedModel, calibration: Calibration, counted: Sequence[str]) -> Counts:
    """How often the texts that decide the vocabulary have every token: the references, or the windows where none.

    Raises:
        InputError: Text that cannot be read.
    """
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    tokens = partial(document_ids, tokenizer=loaded.tokenizer)
    texts = [map(tokens, load_documents(reference)) for reference in counted]
    return count_alike(texts or [calibration.input_ids.tolist()], rows)


def trim(
    loaded: LoadedModel,
    calibration: Calibration,
    vocabulary: VocabularyPlan | None,
    settings: PruneSettings,
    *,
    progress: Progress = no_progress,
) -> tuple[LoadedModel, Calibration]:
    """The model, changed in place, and the windows with the tokens that are kept; both as they are without a plan.

    Rows that stay learn to spell what goes, unless nothing is repaired.
    """
    if vocabulary is None:
        return loaded, calibration
    model = loaded.model
    with at_hand(model.get_input_embeddings(), model.get_output_embeddings()):
        if settings.repairs:
            with products_in(settings.dtype, model.device.type):
                windows = spread_windows(calibration.input_ids, SPELLING_WINDOWS)
                teach_spellings(loaded, vocabulary, windows, progress=progress)
        trimmed = cut_vocabulary(loaded, vocabulary)
    ids = respelling(loaded.tokenizer, trimmed.tokenizer).windows(calibration.input_ids)
    return trimmed, replace(calibration, input_ids=ids, sha256=tokens_sha256(ids))


def statistics_for(
    model: Any,
    calibration: Calibration,
    settings: PruneSettings,
    *,
    only_plan: bool = False,
    progress: Progress = no_progress,
) -> BlockStatistics:
    """What the settings read of the dense model, and no more; `only_plan` leaves out what only the repair reads."""
    with products_in(settings.dtype, model.device.type):
        return collect_statistics(
            model,
            calibration.input_ids,
            with_stream=settings.repairs and not only_plan,
            progress=progress,
        )
