"""What the variants of one ONNX export share."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cfsp.memory import give_back_memory
from cfsp.text.tokens import tokens_sha256
from exporters.export_record import ParityReport
from exporters.job import Job
from exporters.onnx.graph_file import Labels
from exporters.onnx.mixed import default_budget
from exporters.onnx.quantize import QuantizedModel
from exporters.onnx.runtime import PREFILL_TOKENS, OnnxModel, open_model
from exporters.onnx.variants import BlockFormat, Variant


@dataclass(frozen=True)
class OnnxJob:
    """An export, and what only ONNX variants want.

    Attributes:
        common: What every export has.
        model: The checkpoint, float32; no variant changes it.
        measured: What each format that is rounded for text costs the model's layers; variants share it.
    """

    common: Job
    model: Any
    measured: dict[BlockFormat, QuantizedModel] = field(default_factory=dict)

    def text_for(self, variant: Variant) -> torch.Tensor | None:
        """What a variant is rounded for."""
        return self.common.settings.calibration if variant.calibrated else None

    def text_sha256(self, variant: Variant) -> str | None:
        """Its hash."""
        text = self.text_for(variant)
        return None if text is None else tokens_sha256(text)

    def labels(self, variant: Variant) -> Labels:
        """What its graph says of itself."""
        common = self.common
        return Labels.of(variant, common.provenance, self.text_sha256(variant), common.settings.opset)

    def opened(self, path: Path) -> closing[OnnxModel]:
        """A graph in its runtime, for windows of the proof's text."""
        give_back_memory()  # of the layers that were written, or the graph before: a runtime has its weights once more
        n_ctx = self.common.reference.windows.ids.shape[1]
        return closing(open_model(path, n_ctx=n_ctx, n_threads=self.common.n_threads, n_batch=PREFILL_TOKENS))

    def divergence(self, variant: Variant, path: Path) -> ParityReport:
        """Hold a graph against the checkpoint; its limits are stored, not checked."""
        with self.opened(path) as model:
            return self.common.compare(variant, model.iter_logits)

    def budget_bytes(self, variant: Variant) -> int | None:
        """Most that a mixture may take; None where it is not chosen for a size."""
        return self.common.settings.mixed_bytes or default_budget(self.model) if variant.mixed else None
