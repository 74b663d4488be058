"""Files of a model whose weights stay on disk: the same bytes, and a proof of each block on what really enters it."""

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
from cfsp.models.offload import VARIABLE, WHOLE, Keeping
from cfsp.models.source import LoadedModel, ModelSource
from exporters.export_record import ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.gguf import architecture
from exporters.gguf.export import export_gguf
from exporters.job import UNTRAINED
from exporters.onnx.export import export_onnx

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime")

MakeCheckpoint = Callable[..., Path]
IDS = torch.randint(0, 384, (2, 100), generator=torch.Generator().manual_seed(3))
# Random models are unsure of every token.
LOOSE = dict.fromkeys(("int4", "int8", "Q8_0", "Q4_0", "bf16", "mixed-200kB"), ParityLimits(kl_mean=2.0))
OPTIONS = ExportOptions(calibration=IDS, parity_windows=IDS, limits=LOOSE, must_fit=False)


@pytest.fixture
def half(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A model stored in bfloat16."""
    loaded = LoadedModel(*tiny_model(tied=False), ModelSource("tiny", "folder", "tiny"), torch.bfloat16)
    save_checkpoint(loaded, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "asked",
    [
        {"model_type": "llama", "widths": (96, 128, 64, 96), "silent": (2,), "tied": False},
        {"model_type": "llama", "groups": {1: (0,)}},
        {"model_type": "qwen3", "widths": (96, 128, 64, 96)},
        {"model_type": "smollm3", "num_hidden_layers": 6},
        {"model_type": "gemma3_text", "num_hidden_layers": 8, "hidden_size": 96},
        {"model_type": "olmo3", "tied": False, "num_hidden_layers": 6},
        {"model_type": "lfm2", "num_hidden_layers": 6},
        {"model_type": "qwen3_5_text", "num_hidden_layers": 6},
    ],
)
def test_every_architectures_blocks_compute_the_same(
    asked: dict[str, Any], make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    checkpoint = make_checkpoint(**asked)
    for export, kind in ((export_gguf, "Q8_0"), (export_onnx, "int8")):
        (record,) = export(checkpoint, tmp_path / kind, (kind,), OPTIONS)
        assert record.blocks is not None
        assert record.blocks.n_blocks == asked.get("num_hidden_layers", 4)
        assert record.blocks.n_tokens == 100
        assert 0 < record.blocks.max_difference < record.blocks.limit
        assert {path.name for path in (tmp_path / kind).iterdir()} == {
            record.file.partition("/")[0],
            "export.json",
        }


def test_a_block_that_computes_otherwise_leaves_nothing(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "always")
    rope = architecture.rope_metadata
    monkeypatch.setattr(architecture, "rope_metadata", lambda c: rope(c) | {"rope.freq_base": 1e5})
    with pytest.raises(LimitError, match="block 0 is too far"):
        export_gguf(half, tmp_path / "out", ("Q8_0",), OPTIONS)
    monkeypatch.setattr("exporters.proof.LARGEST_LOGIT", 1e9)
    with pytest.raises(LimitError, match=r"block 0 is too far .* in ONNX Runtime.* above"):
        export_onnx(half, tmp_path / "out", ("int8",), OPTIONS)
    assert not (tmp_path / "out").exists()


def same_files(whole: ExportRecord, sliced: ExportRecord) -> None:
    assert whole.blocks is None
    assert sliced.blocks is not None
    assert sliced.blocks.n_blocks == 4
    assert whole.sha256 == sliced.sha256  # of a graph it holds the hash of its weights
    assert whole.parity.kl_mean == pytest.approx(sliced.parity.kl_mean, rel=1e-3, abs=1e-7)


def test_gguf_files_are_the_same(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, tuple[ExportRecord, ...]] = {}
    quants, options = ("Q8_0", "bf16", "mixed:200kB", "Q4_0"), replace(OPTIONS, tune_scales=False)
    for stream in ("never", "always"):
        monkeypatch.setenv(VARIABLE, stream)
        made[stream] = export_gguf(half, tmp_path / stream, quants, options)
    monkeypatch.setenv(VARIABLE, "never")
    held = export_gguf(half, tmp_path / "held", quants, replace(options, dtype="bfloat16"))
    assert [record.sha256 for record in held] == [record.sha256 for record in made["never"]]
    for whole, sliced in zip(made["never"], made["always"], strict=True):
        same_files(whole, sliced)
    tensors = read_gguf(tmp_path / "always" / made["always"][1].file).tensors
    assert {tensor.kind.name for tensor in tensors if len(tensor.shape) == 2} == {"BF16"}


@pytest.mark.parametrize("calibration", [IDS, None])
def test_graphs_are_the_same_but_for_scales_that_are_not_trained(
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
        same_files(whole, sliced)
        assert UNTRAINED not in whole.warnings
    assert [UNTRAINED in record.warnings for record in made["always"]] == [calibration is not None, False]


def test_what_takes_the_whole_model(
    half: Path, make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales are not trained, a graph of floats is made of it; how a model is read is decided once."""
    options = replace(OPTIONS, tune_scales=True)
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, "always")
        (record,) = export_gguf(half, tmp_path / "gguf", ("Q4_0",), options)
        assert record.gptq_tensors
        assert not record.tuned_tensors
        assert any("scales were not trained" in warning for warning in record.warnings)
        records = export_onnx(half, tmp_path / "onnx", ("int8", "fp16"), OPTIONS)
        assert [record.blocks for record in records] == [None, None]
        # A block alone would lack what it is given of a token.
        (record,) = export_gguf(make_checkpoint("gemma4_text"), tmp_path / "gemma", ("Q8_0",), OPTIONS)
        assert record.blocks is None
    answers, in_files = iter([WHOLE]), Keeping(torch.bfloat16, in_files=True)
    monkeypatch.setattr("exporters.job.keeping_of_files", lambda *_: next(answers, in_files))
    (record,) = export_gguf(half, tmp_path / "out", ("Q4_0",), options)
    assert record.blocks is None
    assert record.tuned_tensors
