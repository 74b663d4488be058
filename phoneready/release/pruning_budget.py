"""Widths and shapes that the files of a model can have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from cfsp.errors import InputError
from cfsp.models.architectures import model_shape, spec_for
from cfsp.models.shape import ModelShape
from cfsp.pruning.settings import PruneSettings
from cfsp.scratch import LargeScratch
from exporters.checkpoint_reader import read_config
from exporters.families import makes_gguf
from exporters.gguf.architecture import (
    choose_layout,
)
from phoneready.settings.schema import PruneConfig

_log = logging.getLogger(__name__)


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
    if fitting != plain and plain.prune_ratio:
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
        InputError: At once, if any plan of these settings would be refused.
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
    """The same width for every block, if some of the files are GGUF and llama.cpp would pad others.

    Blocks that are unlike already stay so.
    """
    config, widths = model.config, set(model_shape(model).ffn_widths)
    held = spec_for(config).holds_unlike_blocks(tied=config.tie_word_embeddings)
    if held or len(widths) > 1 or not makes_gguf(files):
        return settings
    return replace(settings, uniform_width=True)
