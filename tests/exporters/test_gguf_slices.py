"""Blocks of a model that is too large to run whole as float32, each proven on what really enters it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import LimitError
from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.gguf_file import read_gguf
from cfsp.models.offload import VARIABLE, WHOLE, Keeping, keeping_of_files
from cfsp.models.source import LoadedModel, ModelSource
from exporters.export_record import BlockProof, ExportRecord
from exporters.family import ExportOptions
from exporters.gguf.architecture import ChosenLayout, read_layout
from exporters.gguf.export import export_gguf, prove_blocks
from exporters.job import Job

pytest.importorskip("llama_cpp")

MakeCheckpoint = Callable[..., Path]
IDS = torch.randint(0, 384, (2, 100), generator=torch.Generator().manual_seed(3))
WIDTHS = (96, 128, 64, 96)


def proof(checkpoint: Path, scratch: Path, chosen: ChosenLayout | None = None) -> BlockProof:
    by_blocks = keeping_of_files(checkpoint).in_files
    options = ExportOptions(parity_windows=IDS, dtype="float32", by_blocks=by_blocks, n_threads=1)
    chosen = chosen or read_layout(checkpoint)
    return prove_blocks(Job(checkpoint, scratch, options, chosen.config, chosen.context_length), chosen)


@pytest.mark.parametrize(
    "asked",
    [
        {"model_type": "llama", "widths": WIDTHS, "silent": (2,), "tied": False},
        {"model_type": "llama", "silent": (1, 2, 3)},
        {"model_type": "qwen3", "widths": WIDTHS},
        {"model_type": "smollm3", "num_hidden_layers": 6},
        {"model_type": "gemma3_text", "num_hidden_layers": 8, "hidden_size": 96},
        {"model_type": "olmo3", "tied": False, "num_hidden_layers": 6},
        {"model_type": "lfm2", "num_hidden_layers": 6},
        {"model_type": "qwen3_5_text", "num_hidden_layers": 6},
    ],
)
def test_every_architectures_blocks_compute_the_same(
    asked: dict[str, Any],
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    found = proof(make_checkpoint(**asked), tmp_path)
    assert found.n_tokens == 100
    assert 0 < found.max_difference < found.limit
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"rope_theta": 1e5}, {"rms_norm_eps": 1e-2}])
def test_what_llama_cpp_computes_otherwise_is_caught(
    setting: dict[str, float], make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    chosen = read_layout(checkpoint)
    with pytest.raises(LimitError, match="block 0 is too far"):
        proof(checkpoint, tmp_path, replace(chosen, config=replace(chosen.config, **setting)))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def half(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A model stored in bfloat16."""
    loaded = LoadedModel(*tiny_model(), ModelSource("tiny", "folder", "tiny"), torch.bfloat16)
    save_checkpoint(loaded, tmp_path / "model")
    return tmp_path / "model"


def test_files_are_the_same_and_say_how_they_were_proven(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, tuple[ExportRecord, ...]] = {}
    quants = ("Q8_0", "bf16", "mixed:200kB", "Q4_0")
    options = ExportOptions(calibration=IDS, parity_windows=IDS, must_fit=False)
    for stream in ("never", "always"):
        monkeypatch.setenv(VARIABLE, stream)
        made[stream] = export_gguf(half, tmp_path / stream, quants, replace(options, tune_scales=False))
    monkeypatch.setenv(VARIABLE, "never")
    held = export_gguf(half, tmp_path / "held", quants, replace(options, dtype="bfloat16"))
    assert [record.sha256 for record in held] == [record.sha256 for record in made["never"]]
    for whole, sliced in zip(made["never"], made["always"], strict=True):
        assert whole.blocks is None
        assert sliced.blocks is not None
        assert sliced.blocks.n_blocks == 4
        assert whole.sha256 == sliced.sha256
        assert whole.parity.kl_mean == pytest.approx(sliced.parity.kl_mean, rel=1e-3, abs=1e-7)
    assert {path.name for path in (tmp_path / "always").iterdir()} == {
        *(record.file for record in made["always"]),
        "export.json",
    }
    tensors = read_gguf(tmp_path / "always" / made["always"][1].file).tensors
    assert {tensor.kind.name for tensor in tensors if len(tensor.shape) == 2} == {"BF16"}


def test_scales_are_not_trained_where_that_takes_the_whole_model(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    options = ExportOptions(calibration=IDS, parity_windows=IDS, tune_scales=True)
    (record,) = export_gguf(half, tmp_path / "out", ("Q4_0",), options)
    assert record.gptq_tensors
    assert not record.tuned_tensors
    assert any("scales were not trained" in warning for warning in record.warnings)


def test_how_a_model_is_read_is_decided_once(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([WHOLE])
    in_files = Keeping(torch.bfloat16, in_files=True)
    monkeypatch.setattr("exporters.job.keeping_of_files", lambda *_: next(answers, in_files))
    options = ExportOptions(calibration=IDS, parity_windows=IDS, tune_scales=True)
    (record,) = export_gguf(half, tmp_path / "out", ("Q4_0",), options)
    assert record.blocks is None
    assert record.tuned_tensors
