"""Scales and norms of GGUF files, trained on a text: every type, every layout, nothing else changed, less lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.models.checkpoint import save_checkpoint
from cfsp.models.gguf_file import GGUFTensor, read_gguf
from cfsp.models.source import LoadedModel, ModelSource
from exporters.export_record import ExportRecord, ParityLimits
from exporters.family import ExportOptions
from exporters.gguf import QUANTS, export_gguf
from exporters.gguf.architecture import read_layout
from exporters.gguf.matrix import PACKINGS, SCALES, WHOLE_BLOCKS, StoredMatrix
from exporters.gguf.numbers import FileNumbers
from exporters.quantize.training import TunedScales

MakeCheckpoint = Callable[..., Path]
TEXT, UNSEEN = (
    torch.randint(0, 64, (count, 96), generator=torch.Generator().manual_seed(seed))
    for seed, count in ((3, 24), (4, 4))
)


def export(
    checkpoint: Path, output: Path, quants: tuple[str, ...], **settings: Any
) -> tuple[ExportRecord, ...]:
    loose = dict.fromkeys(QUANTS, ParityLimits(kl_mean=10.0)) | {"f32": ParityLimits(max_logit_diff=1e-3)}
    given = {"calibration": TEXT, "n_threads": 1, "name": "m", "parity_windows": UNSEEN, "limits": loose}
    return export_gguf(checkpoint, output, quants, ExportOptions(**(given | settings)))


def tensors(path: Path) -> dict[str, GGUFTensor]:
    return {tensor.name: tensor for tensor in read_gguf(path).tensors}


def test_every_type_that_a_file_may_have_can_be_scaled() -> None:
    assert SCALES.keys() == {*PACKINGS, *WHOLE_BLOCKS, "Q8_0", "F16"}


@pytest.mark.parametrize("kind", SCALES)
def test_rows_are_multiplied_where_ggml_reads_them(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((5, 512), dtype=np.float32)
    importance = np.ones(512, dtype=np.float32) if kind in WHOLE_BLOCKS else None
    written = StoredMatrix.nearest(values, kind, importance)
    factors = torch.tensor([1, 0.5, 1.03, 0.97, 2])
    found = written.scaled(factors[:, None])
    np.testing.assert_allclose(
        found.values(), written.values() * factors[:, None].numpy(), rtol=3e-3, atol=5e-3
    )
    np.testing.assert_array_equal(found.data[0], written.data[0])


MODELS = [
    ("llama", {"tied": False, "intermediate_size": 256, "widths": (256, 64, 128, 64), "silent": (2,)}),
    ("qwen3", {"tied": True, "intermediate_size": 256, "widths": (256, 64, 128, 64)}),
]


@pytest.mark.parametrize(("model_type", "settings"), MODELS, ids=lambda value: str(value)[:60])
def test_a_tuned_file_loses_less_on_text_it_has_not_seen(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    checkpoint, quants = make_checkpoint(model_type, **settings), ("Q2_K",)
    tuned = export(checkpoint, tmp_path / "tuned", quants, gptq=False, tune_scales=True)
    plain = export(checkpoint, tmp_path / "plain", quants, gptq=False)
    for ours, theirs in zip(tuned, plain, strict=True):
        assert ours.parity.kl_mean < 0.99 * theirs.parity.kl_mean
        assert (ours.file_bytes, ours.tensor_types) == (theirs.file_bytes, theirs.tensor_types)
        assert (ours.gptq_tensors, theirs.tuned_tensors) == (theirs.gptq_tensors, 0)
        before, after = (tensors(tmp_path / n / r.file) for n, r in (("plain", theirs), ("tuned", ours)))
        changed = {name for name in after if after[name].data.tobytes() != before[name].data.tobytes()}
        stays = {"token_embd.weight", "output.weight", *(name for name in after if name.endswith(".bias"))}
        assert changed == after.keys() - stays
        assert ours.tuned_tensors == len(changed)


@pytest.mark.parametrize(("model_type", "settings"), MODELS, ids=lambda value: str(value)[:60])
def test_factors_are_those_of_the_modules_rows(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, model_type: str, settings: dict[str, Any]
) -> None:
    checkpoint = make_checkpoint(model_type, **settings)
    (file,) = export(checkpoint, tmp_path / "out", ("Q8_0",))
    path = tmp_path / "out" / file.file
    numbers = FileNumbers(path, path, read_layout(checkpoint))
    specs = [spec for spec in numbers.specs if spec.is_matrix]
    shapes = {name.removesuffix(".weight"): shape for spec in specs for name, shape in spec.sources}
    rows = {name: 2.0 ** (torch.arange(shape[0]) % 5) for name, shape in shapes.items()}
    for spec in specs:
        tuned = numbers.tuned(spec, TunedScales(rows, {}))
        assert isinstance(tuned, StoredMatrix)
        before, after = (spec.split(each.values()) for each in (numbers.matrix(spec), tuned))
        for name, values in before.items():
            factors = rows[name.removesuffix(".weight")].numpy()[:, None]
            np.testing.assert_array_equal(after[name], values * factors)


def test_what_is_not_of_few_bits_is_not_tuned(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    records = export(make_checkpoint("llama"), tmp_path / "out", ("f16", "Q8_0"), tune_scales=True)
    assert [record.tuned_tensors for record in records] == [0, 0]


def test_tuning_needs_no_other_rounding_for_the_text_and_gives_the_same_bytes_twice(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", intermediate_size=256)
    found = [export(checkpoint, tmp_path / n, ("Q4_0",), gptq=False, tune_scales=True) for n in ("a", "b")]
    ((first,), (second,)) = found
    assert first.sha256 == second.sha256
    assert (first.gptq_tensors, first.calibration_tokens) == (0, TEXT.numel())
    assert first.tuned_tensors


def test_scales_of_a_model_in_16_bits_are_trained_in_float32(
    tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    model, tokenizer = tiny_model("llama", intermediate_size=256)
    loaded = LoadedModel(model.to(torch.bfloat16), tokenizer, ModelSource("x", "folder", "x"))
    save_checkpoint(loaded, tmp_path / "model")
    settings = {"gptq": False, "tune_scales": True, "use_imatrix": False}
    found = [
        export(tmp_path / "model", tmp_path / dtype, ("Q4_0",), **settings, dtype=dtype)
        for dtype in ("bfloat16", "float32")
    ]
    ((narrow,), (whole,)) = found
    assert narrow.tuned_tensors == whole.tuned_tensors > 0
