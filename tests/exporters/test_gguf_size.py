"""Sizes of GGUF files are computed exactly from a file of other widths; drafts are the bytes that an export writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.models.families import FAMILIES
from cfsp.models.shape import ModelShape
from exporters.family import ExportOptions
from exporters.gguf.architecture import read_layout
from exporters.gguf.files import draft_gguf
from exporters.gguf.quants import QUANTS
from exporters.gguf.tensors import size_template

MakeCheckpoint = Callable[..., Path]
NAMED = ExportOptions(name="template")


@pytest.mark.parametrize(
    ("model_type", "moments"),
    [("llama", False), ("qwen3", True), ("gemma4_text", True), ("qwen3_5_text", True)],
)
def test_sizes_of_other_widths_are_exact(
    model_type: str, moments: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    dense: dict[str, Any] = {
        "intermediate_size": 512,
        "tied": any(one.tied for one in FAMILIES[model_type].layouts),
    }
    quants = [name for name, quant in QUANTS.items() if moments or not quant.needs_imatrix]
    first, others = (512, 256, 512, 512), [(256, 512, 256, 256), (33, 64, 40, 480)]
    if not any(one.per_layer_sizes for one in FAMILIES[model_type].layouts):
        first, others = (512,) * 4, [(256,) * 4, (40,) * 4]
    template_of = make_checkpoint(model_type, widths=first, moments=moments, **dense)
    templates = {
        quant: size_template(path, quant)
        for quant, path in draft_gguf(template_of, tmp_path, quants, NAMED).items()
    }
    layout = read_layout(template_of)
    for number, widths in enumerate(others):
        other = make_checkpoint(model_type, widths=widths, moments=moments, **dense)
        (tmp_path / str(number)).mkdir()
        written = draft_gguf(other, tmp_path / str(number), quants, NAMED)
        for quant, path in written.items():
            of_widths = layout.of_shape(ModelShape.of_ffn_widths(widths))
            assert templates[quant].file_bytes(of_widths) == path.stat().st_size, (quant, widths)
