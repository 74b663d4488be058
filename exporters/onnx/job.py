"""What the variants of one ONNX export share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cfsp.text.tokens import tokens_sha256
from exporters.job import Job
from exporters.onnx.graph_file import Labels
from exporters.onnx.mixed import default_budget
from exporters.onnx.quantize import QuantizedModel
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

    def budget_bytes(self, variant: Variant) -> int | None:
        """Most that a mixture may take; None where it is not chosen for a size."""
        return self.common.settings.mixed_bytes or default_budget(self.model) if variant.mixed else None
