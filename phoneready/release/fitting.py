"""Widths and shapes that the files of a model can have."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from cfsp.errors import InputError
from cfsp.files import LargeScratch
from cfsp.models.architectures import model_shape, spec_for
from cfsp.models.shape import ModelShape
from cfsp.pruning.settings import PruneSettings
from exporters.checkpoint_reader import read_config
from exporters.families import makes_gguf
from exporters.gguf.architecture import choose_layout

_log = logging.getLogger(__name__)


def fitting_settings(settings: PruneSettings, model: Any, files: Collection[str]) -> PruneSettings:
    """The same width for every block, if some of the files are GGUF and llama.cpp would pad others.

    Blocks that are unlike already stay so.
    """
    config, widths = model.config, set(model_shape(model).ffn_widths)
    tied, layouts = config.tie_word_embeddings, spec_for(config).layouts
    held = any(layout.per_layer_sizes and (tied or layout.untied) for layout in layouts)
    if held or len(widths) > 1 or not makes_gguf(files):
        return settings
    if settings.prune_ratio and not settings.uniform_width:
        _say_uniform(config.model_type)
    return replace(settings, uniform_width=True)


@functools.cache
def _say_uniform(model_type: str) -> None:
    _log.warning(
        "llama.cpp has no architecture for a %s model with a width for each block: all get the same (--uniform)",
        model_type,
    )


def shape_check(settings: PruneSettings, model: Any, files: Collection[str]) -> Callable[[ModelShape], None]:
    """What refuses a plan of which a GGUF file was said to be made and llama.cpp has no architecture.

    Raises:
        InputError: At once, if any plan of these settings would be refused.
    """
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

    if settings.attentions:
        check(config.shape.without(attentions=[len(config.shape.blocks) - 1]))
    return check
