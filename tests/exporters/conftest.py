"""Tiny pruned checkpoints, with everything that an export reads of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.architectures import decoder_layers, feed_forward
from cfsp.checkpoint import save_checkpoint
from cfsp.model_reference import LoadedModel, ModelSource
from cfsp.statistics import collect_input_moments
from cfsp.surgery import cut_channels, set_config_widths

MakeCheckpoint = Callable[..., Path]


def _narrow(model: Any, widths: tuple[int, ...]) -> None:
    """Keep the first channels of every FFN."""
    with torch.no_grad():
        for layer, width in zip(decoder_layers(model), widths, strict=True):
            cut_channels(feed_forward(model, layer), torch.arange(width))
    set_config_widths(model)


@pytest.fixture(scope="session")
def make_checkpoint(
    tiny_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> MakeCheckpoint:
    """Factory with `tiny_model`'s arguments, `widths=` and `moments=` -> a checkpoint folder."""

    def make(
        *args: Any, widths: tuple[int, ...] | None = None, moments: bool = True, **overrides: Any
    ) -> Path:
        model, tokenizer = tiny_model(*args, **overrides)
        if widths:
            _narrow(model, widths)
        source = ModelSource(
            "owner/dense",
            "hub",
            "Dense-1B",
            sha256="a" * 64,
            license="apache-2.0",
            base_model="owner/Base-1B",
        )
        windows = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
        folder = tmp_path_factory.mktemp("checkpoint") / "pruned"
        save_checkpoint(
            LoadedModel(model, tokenizer, source),
            folder,
            input_moments=collect_input_moments(model, windows) if moments else None,
            seed=7,
        )
        return folder

    return make
