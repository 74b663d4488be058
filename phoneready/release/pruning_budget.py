"""The budget that settings with a target ask for."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from cfsp.models.source import LoadedModel
from cfsp.pruning.budget import Budget
from cfsp.pruning.parameters import count_parameters
from cfsp.units import parse_bytes, parse_count
from exporters.families import DEFAULT_FORMAT
from exporters.gguf.architecture import (
    holds_blocks_of_unlike_heads,
    holds_blocks_without_attention,
    holds_fewer_blocks,
)
from exporters.gguf.family import GGUF
from phoneready.settings.schema import PruneConfig
from phoneready.sizes import DecodeTimes, FileSizes, Sizes


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
    sizes = Sizes(loaded, folder, use_imatrix, seed, torch.get_num_threads(), items)
    if settings.target_speed is not None:
        target = 1 / settings.target_speed
        return Budget("target_speed", target, DecodeTimes(sizes, items), "decode", settings.target_axes)
    target = parse_bytes(settings.target_size or "", "target_size")
    return Budget("target_size", target, FileSizes(sizes, items), "bytes", settings.target_axes)


def _axes(settings: PruneConfig, loaded: LoadedModel, made: Collection[str]) -> tuple[str, ...]:
    """What may be removed: where GGUF files are made, only what they can do without."""
    files = settings.for_quant or tuple(made) or (DEFAULT_FORMAT,)
    config = loaded.model.config
    holds = {
        "blocks": holds_fewer_blocks(config.model_type),
        "attentions": holds_blocks_without_attention(config.model_type),
        "kv_groups": holds_blocks_of_unlike_heads(config.model_type, tied=config.tie_word_embeddings),
    }
    in_gguf = any(map(GGUF.has, files))
    return tuple(axis for axis in settings.target_axes if holds.get(axis, True) or not in_gguf)
