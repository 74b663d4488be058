"""What settings ask for, of this model and these files: the budget of a target, and widths that a file can have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape, windows_of_blocks
from cfsp.models.shape import ModelShape
from cfsp.models.source import LoadedModel
from cfsp.pruning.budget import Budget
from cfsp.pruning.parameters import count_parameters
from cfsp.pruning.settings import PruneSettings
from cfsp.scratch import LargeScratch
from cfsp.units import parse_bytes, parse_count
from exporters.checkpoint_reader import read_config
from exporters.families import BASE, makes_gguf
from exporters.gguf.architecture import (
    choose_layout,
    holds_blocks_without_attention,
    holds_fewer_blocks,
    holds_unlike_blocks,
)
from phoneready.settings.schema import PruneConfig
from phoneready.sizes import DecodeTimes, Sizes, file_sizes

_log = logging.getLogger(__name__)


def budget_of(
    settings: PruneConfig,
    loaded: LoadedModel,
    folder: Path,
    *,
    made: Collection[str] = (),
    use_imatrix: bool = True,
    seed: int = 0,
) -> Budget | None:
    """What a model may take; None where the settings have no target.

    Args:
        settings: With a target or without.
        loaded: The dense model.
        folder: Scratch.
        made: Formats that are exported, where the settings name none.
        use_imatrix: Whether files are quantized with an importance matrix.
        seed: Of the run.

    Raises:
        InputError: A target that cannot be.
    """
    if not settings.target:
        return None
    if settings.target_parameters is not None:
        target: float = parse_count(settings.target_parameters, "target_parameters")
        cost = count_parameters(loaded.model)
        return Budget("target_parameters", target, cost, "parameters", _axes(settings, loaded, made))
    items = settings.sized_formats(made)
    drafted = tuple(filter(BASE.has, items))
    sizes = Sizes(loaded, folder, use_imatrix, seed, torch.get_num_threads(), drafted)
    if settings.target_speed is not None:
        target = 1 / settings.target_speed
        return Budget("target_speed", target, DecodeTimes(sizes, items), "decode", settings.target_axes)
    target = parse_bytes(settings.target_size or "", "target_size")
    # Of the files that are drafted it shows what they can do without.
    axes = settings.target_axes if drafted else _axes(settings, loaded, made)
    return Budget("target_size", target, file_sizes(sizes, items), "bytes", axes)


def _axes(settings: PruneConfig, loaded: LoadedModel, made: Collection[str]) -> tuple[str, ...]:
    """What may be removed: where GGUF files are made, only what they can do without."""
    config = loaded.model.config
    holds = {
        "blocks": holds_fewer_blocks(config.model_type, windowed=any(windows_of_blocks(config))),
        "attentions": holds_blocks_without_attention(config.model_type),
        "kv_groups": holds_unlike_blocks(config.model_type, tied=config.tie_word_embeddings),
    }
    in_gguf = makes_gguf((*settings.for_quant, *made))
    return tuple(axis for axis in settings.target_axes if holds.get(axis, True) or not in_gguf)


def fitting_settings(
    settings: PruneConfig, plain: PruneSettings, model: Any, made: Collection[str] = ()
) -> PruneSettings:
    """Settings of which the files that are made save something; see `with_fitting_widths`.

    Args:
        settings: As the user gives them.
        plain: What they say of pruning.
        model: The dense one.
        made: Formats that are exported.
    """
    fitting = with_fitting_widths(plain, model, (*settings.for_quant, *made))
    if fitting != plain and (plain.prune_ratio or settings.target):
        _log.warning(
            "llama.cpp has no architecture for a %s model with a width for each block: all get the same (--uniform)",
            model.config.model_type,
        )
    return fitting


def shape_check(
    settings: PruneConfig, plain: PruneSettings, model: Any, made: Collection[str] = ()
) -> Callable[[ModelShape], None]:
    """What refuses a plan of which a GGUF file was said to be made and llama.cpp has no architecture.

    Args:
        settings: As the user gives them.
        plain: What they say of pruning.
        model: The dense one.
        made: Formats that are exported.

    Raises:
        InputError: At once, where any plan of these settings would be refused.
    """
    files = (*settings.for_quant, *made)
    if not (files and makes_gguf(files)):
        return lambda shape: None
    with LargeScratch("config") as scratch:
        model.config.save_pretrained(scratch.path)
        config = read_config(scratch.path).with_shape(model_shape(model))
    stored = frozenset(model.state_dict())

    def check(shape: ModelShape) -> None:
        try:
            choose_layout(config.with_shape(shape), stored)
        except InputError as error:
            raise InputError(f"what is left is not for the file that is to be made of it: {error}") from error

    if plain.attentions:
        check(config.shape.without(attentions=[len(config.shape.blocks) - 1]))
    return check


def with_fitting_widths(settings: PruneSettings, model: Any, files: Collection[str]) -> PruneSettings:
    """The same width for every block, where some of the files are GGUF and llama.cpp would pad others.

    Blocks that are unlike already stay so.
    """
    config, widths = model.config, set(model_shape(model).ffn_widths)
    held = holds_unlike_blocks(config.model_type, tied=config.tie_word_embeddings)
    if held or len(widths) > 1 or not makes_gguf(files):
        return settings
    return replace(settings, uniform_width=True)
