"""Sizes of ONNX files that are not made, against files that are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import load_pruned
from cfsp.pruning.outline import cut_to_shape, outline
from exporters.export_record import ParityLimits
from exporters.family import ExportOptions
from exporters.onnx import VARIANTS, export_onnx, largest_size
from exporters.provenance import read_provenance

MakeCheckpoint = Callable[..., Path]
SIZED = [name for name, variant in VARIANTS.items() if variant.is_sized]
WINDOWS = torch.randint(0, 384, (2, 96), generator=torch.Generator().manual_seed(0))
# Next-token distributions of random weights are nearly flat, so quantization moves them far.
LOOSE = {name: ParityLimits(kl_mean=3.0) for name in SIZED if name != "fp32"}


def test_all_but_a_mixture_and_what_optimum_traces_have_a_size() -> None:
    assert SIZED == ["fp32", "fp16", "int8", "int4", "int4-b128", "int8-dynamic"]


@pytest.mark.parametrize(
    ("arguments", "cut"),
    [
        (("llama",), {"widths": (96, 64, 33, 40)}),
        (("llama", False), {"widths": (96, 96, 96, 96)}),
        (("llama",), {"silent": (2,), "groups": {1: (0,)}}),
        (("qwen2",), {"widths": (128, 17, 128, 128), "groups": {3: (1,)}}),
        (("qwen3", False), {"silent": (1, 3)}),
        (("lfm2",), {"widths": (96, 64, 33, 40)}),
        (("qwen3_5_text",), {"widths": (96, 64, 33, 40)}),
        (("gemma3_text",), {"widths": (40, 64, 96, 128)}),
        (("smollm3",), {"widths": (64, 64, 64, 64)}),
    ],
)
def test_a_size_is_that_of_the_file(
    arguments: tuple[Any, ...],
    cut: dict[str, Any],
    tiny_model: Callable[..., Any],
    make_checkpoint: MakeCheckpoint,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(*arguments, hidden_size=72, head_dim=16, **cut)
    options = ExportOptions(limits=LOOSE, parity_windows=WINDOWS, n_threads=1, calibration=WINDOWS)
    records = export_onnx(checkpoint, tmp_path / "out", SIZED, options)
    model = outline(tiny_model(*arguments, hidden_size=72, head_dim=16)[0])
    cut_to_shape(model, model_shape(load_pruned(checkpoint)))
    origin = read_provenance(checkpoint)
    for record in records:
        size = largest_size(model, record.quant, origin)
        if VARIANTS[record.quant].calibrated:
            assert record.file_bytes <= size < 1.03 * record.file_bytes + 500
        else:
            assert record.file_bytes == size, record.quant
    files = [tmp_path / "out" / record.file for record in records]
    assert [record.file_bytes for record in records] == [
        path.stat().st_size + path.with_name(f"{path.name}_data").stat().st_size for path in files
    ]


def test_an_outline_reads_no_weights_and_changes_none(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama")
    shape = model_shape(model)
    smaller = shape.without(blocks=[1], attentions=[2]).with_ffn_widths([8, 16, 24])
    made = outline(model)
    cut_to_shape(made, smaller)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    assert model_shape(model) == shape
    assert model_shape(made).with_origins(smaller) == smaller
    assert made.get_input_embeddings().weight is made.get_output_embeddings().weight
