"""What the variants of one ONNX export share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from exporters.job import Job
from exporters.onnx.mixed import Small
from exporters.onnx.variants import BlockFormat, Variant


@dataclass(frozen=True)
class OnnxJob:
    """An export, and what only ONNX variants want.

    Attributes:
        common: What every export has.
        model: The checkpoint, float32; no variant changes it.
        calibration: Token ids (nsamples, seqlen) that 4-bit variants are rounded for; None rounds to nearest.
        calibration_sha256: Their hash.
        mixed_bytes: Most bytes of a mixture of bits; None for the default.
        ort: Also write .ort files.
        opset: Of ONNX's own operators; None for each graph's own.
        small: The model in each format that was rounded for text; variants share them.
    """

    common: Job
    model: Any
    calibration: torch.Tensor | None
    calibration_sha256: str | None
    mixed_bytes: int | None
    ort: bool
    opset: int | None
    small: dict[BlockFormat, Small] = field(default_factory=dict)

    def text_for(self, variant: Variant) -> torch.Tensor | None:
        """What a variant is rounded for."""
        return self.calibration if variant.calibrated else None
