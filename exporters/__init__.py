"""From a pruned checkpoint to files that phones run, each proven against the checkpoint."""

from __future__ import annotations

from exporters.export_record import ExportManifest, ExportRecord, ParityReport, TensorFallback

__all__ = ["ExportManifest", "ExportRecord", "ParityReport", "TensorFallback"]
