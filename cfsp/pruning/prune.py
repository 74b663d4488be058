"""The whole way from a dense model to a pruned one, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from cfsp.models.offload import StoredStates, at_hand, check_scratch
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.precision import products_in
from cfsp.progress import Progress, no_progress
from cfsp.pruning.block_by_block import apply_plan
from cfsp.pruning.forecast import forecast_losses
from cfsp.pruning.parts import choose_removals, counted_removals
from cfsp.pruning.plan import PruningPlan, check_plan_fits, make_plan
from cfsp.pruning.settings import PruneSettings
from cfsp.pruning.spelling import teach_spellings
from cfsp.pruning.statistics import (
    collect_input_moments,
    collect_statistics,
    moment_windows,
    spread_windows,
)
from cfsp.pruning.vocabulary import Counts, VocabularyPlan, count_alike, cut_vocabulary, plan_vocabulary
from cfsp.settings import check_settings
from cfsp.text.calibration import Calibration
from cfsp.text.respelling import respelling
from cfsp.text.settings import reference_name
from cfsp.text.tokens import document_ids, load_documents, tokens_sha256

SPELLING_WINDOWS = 16
"""Windows that the dense model reads before it loses tokens."""
TOLD_WINDOWS = 8
"""Windows behind a plan's figures of channels if all stay: they decide nothing then."""


class PruneResult(NamedTuple):
    """What pruning leaves."""

    loaded: LoadedModel  # the changed model, with the tokenizer of the tokens that it keeps
    plan: PruningPlan  # what was kept, and why
    calibration: Calibration  # the windows, in the ids of the tokens that are kept
    # module name -> (in_features,) mean squared input in the PRUNED model.
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
        settings: Ignored if a `plan` is given, which is applied as it is.
        counted: References of the text whose tokens decide the vocabulary; the calibration windows by default.
        check: Raises for a shape that will not do, before the model is pruned to it.

    Raises:
        InputError: Settings or a plan that do not fit the model.
    """
    check_scratch(loaded.model)
    states = None
    if plan is None:
        loaded, calibration, plan, states = plan_model(
            loaded, calibration, settings, counted=counted, check=check, progress=progress
        )
    else:
        check_plan_fits(loaded.model, plan)
        check_settings(plan.settings)
        if check is not None:
            check(plan.shape)
        loaded, calibration = trim(loaded, calibration, plan.vocabulary, plan.settings, progress=progress)
    apply_plan(loaded.model, plan, input_ids=calibration.input_ids, states=states, progress=progress)
    del states  # with its files
    with products_in(plan.settings.dtype, loaded.model.device.type):
        windows = moment_windows(calibration.input_ids)
        moments = collect_input_moments(loaded.model, windows, progress=progress)
    return PruneResult(loaded, plan, calibration, moments)


def plan_model(
    loaded: LoadedModel,
    calibration: Calibration,
    settings: PruneSettings,
    *,
    counted: Sequence[str] = (),
    check: Callable[[ModelShape], None] | None = None,
    only_plan: bool = False,
    progress: Progress = no_progress,
) -> tuple[LoadedModel, Calibration, PruningPlan, StoredStates | None]:
    """Decide what goes; arguments as in `prune_model`. Tokens are gone from the model and the windows afterwards.

    The states are what the dense blocks give, for the repair, unless `only_plan`.
    """
    check_settings(settings)
    settings = counted_removals(loaded.model, settings)
    vocabulary = None
    if settings.vocabulary:
        counts, sources = counts_of(loaded, calibration, counted), calibration.sources
        sources = tuple(map(reference_name, counted)) or sources
        vocabulary = plan_vocabulary(loaded, counts, settings.vocabulary, sources=sources)
    loaded, calibration = trim(loaded, calibration, vocabulary, settings, progress=progress)
    ids = calibration.input_ids
    removals = choose_removals(loaded.model, ids, settings, progress=progress)
    keep_states = settings.repairs and not only_plan and not settings.keeps_blocks
    if settings.keeps_blocks:
        ids = spread_windows(ids, TOLD_WINDOWS)
    with products_in(settings.dtype, loaded.model.device.type):
        statistics = collect_statistics(loaded.model, ids, keep_states=keep_states, progress=progress)
    plan = replace(make_plan(loaded, statistics, calibration, settings, removals), vocabulary=vocabulary)
    if check is not None:
        check(plan.shape)
    forecast = forecast_losses(loaded.model, plan, calibration.input_ids, progress=progress)
    return loaded, calibration, replace(plan, forecast=forecast), statistics.states


def counts_of(loaded: LoadedModel, calibration: Calibration, counted: Sequence[str]) -> Counts:
    """How often the texts that decide the vocabulary, the references or else the windows, have every token.

    Raises InputError: text that cannot be read.
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
    """The model, changed in place, and the windows with the tokens that a plan keeps; without one as they are.

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
