"""ONNX variants of a model whose weights stay in files: the same bytes, and a proof of every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import LimitError
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.offload import VARIABLE
from cfsp.models.source import LoadedModel, ModelSource
from exporters.export_record import ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.job import UNTRAINED
from exporters.onnx import export_onnx

pytest.importorskip("onnxruntime")

IDS = torch.randint(0, 384, (2, 100), generator=torch.Generator().manual_seed(3))
LOOSE = dict.fromkeys(("int4", "int8"), ParityLimits(kl_mean=2.0))
"""Random models are unsure of every token."""
OPTIONS = ExportOptions(calibration=IDS, parity_windows=IDS, limits=LOOSE)


@pytest.mark.parametrize(
    "asked",
    [
        {"model_type": "llama", "widths": (96, 128, 64, 96), "silent": (2,), "tied": False},
        {"model_type": "llama", "groups": {1: (0,)}},
        {"model_type": "olmo3"},
        {"model_type": "lfm2"},
        {"model_type": "qwen3_5_text"},
        {"model_type": "gemma3_text", "num_hidden_layers": 8, "hidden_size": 96},
    ],
)
def test_every_architectures_blocks_compute_the_same(
    asked: dict[str, Any],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    checkpoint = make_checkpoint(**asked)
    (record,) = export_onnx(checkpoint, tmp_path / "out", ("int8",), OPTIONS)
    assert record.blocks is not None
    assert record.blocks.n_blocks == asked.get("num_hidden_layers", 4)
    assert record.blocks.n_tokens == 100
    assert 0 < record.blocks.max_difference < record.blocks.limit
    assert not list((tmp_path / "out").glob("block*"))


@pytest.fixture
def half(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A model stored in bfloat16."""
    loaded = LoadedModel(*tiny_model(tied=False), ModelSource("tiny", "folder", "tiny"), torch.bfloat16)
    save_checkpoint(loaded, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("calibration", [IDS, None])
def test_files_are_the_same_but_for_scales_that_are_not_trained(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: torch.Tensor | None
) -> None:
    made: dict[str, tuple[ExportRecord, ...]] = {}
    for stream in ("never", "always"):
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, stream)
            if stream == "never":
                patch.setattr("exporters.onnx.export.tune", lambda _, mixture, *__, **___: mixture)
            options = replace(OPTIONS, calibration=calibration)
            made[stream] = export_onnx(half, tmp_path / stream, ("int4", "int8"), options)
    for whole, sliced in zip(made["never"], made["always"], strict=True):
        assert whole.blocks is None
        assert sliced.blocks is not None
        assert whole.sha256 == sliced.sha256  # the graph's, which holds the hash of its weights
        assert whole.parity.kl_mean == pytest.approx(sliced.parity.kl_mean, rel=1e-3, abs=1e-7)
        assert UNTRAINED not in whole.warnings
    assert [UNTRAINED in record.warnings for record in made["always"]] == [calibration is not None, False]


def test_a_variant_of_floats_is_made_of_the_whole_model(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    records = export_onnx(half, tmp_path / "out", ("int8", "fp16"), OPTIONS)
    assert [record.blocks for record in records] == [None, None]


def test_a_wrong_block_leaves_nothing(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    monkeypatch.setattr("exporters.proof.LARGEST_LOGIT", 1e9)
    with pytest.raises(LimitError, match=r"block 0 is too far .* in ONNX Runtime.* above"):
        export_onnx(half, tmp_path / "out", ("int8",), OPTIONS)
    assert not (tmp_path / "out").exists()
