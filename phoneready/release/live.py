"""What a run says on the way: the figures that each stage has found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from cfsp.models.checkpoint import PLAN_FILE
from cfsp.progress import Progress
from cfsp.pruning.plan import PruningPlan
from cfsp.records import read_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.units import format_bytes
from exporters.export_record import ExportManifest
from phoneready.evaluation.evaluation_record import Evaluation, TextResult
from phoneready.release.artifact import SIDE_BY_SIDE_FILE, SideBySide
from phoneready.release.stages import RECORD_FILE, stage_folder
from runtime_bench.presentation.record_table import speed_text
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.jsonl import read_jsonl


def stage_figures(folder: Path, name: str) -> str:
    """The figures that a finished stage has found, in a few words; nothing where it has none."""
    describers = (describe for beginning, describe in _FIGURES.items() if name.startswith(beginning))
    describe = next(describers, None)
    return describe(stage_folder(folder, name)) if describe else ""


def rows_so_far(progress: Progress) -> tuple[Progress, Callable[[BenchRecord], None]]:
    """A progress that also shows the latest row of a benchmark, and what to tell each row to."""
    latest = ""

    def tell(record: BenchRecord) -> None:
        nonlocal latest
        latest = f": {Path(record.model_filename).name} {_row(record)}"

    def report(description: str, done: int, total: int) -> None:
        progress(description + latest, done, total)

    return report, tell


def _pruned(output: Path) -> str:
    return read_record(PruningPlan, output / "model" / PLAN_FILE).removed


def _recovered(output: Path) -> str:
    record = read_record(RecoveryRecord, output / "model" / RECOVERY_FILE)
    return "; ".join(filter(None, (f"validation {record.change}", record.shortcoming)))


def _evaluated(output: Path) -> str:
    parts = []
    for path in sorted(output.glob("*.json")):
        if path.name == RECORD_FILE:
            continue
        evaluation = read_record(Evaluation, path)
        parts += [
            f"{evaluation.model.reference} on {text.kind}: {outcome}"
            for text in evaluation.texts
            if (outcome := _outcome(text))
        ]
    return "; ".join(parts)


def _outcome(text: TextResult) -> str:
    """Against the dense model; of another vocabulary's, by what can be compared."""
    if text.divergence:
        return f"perplexity {text.divergence.perplexity_ratio:.3f} x dense, KL {text.divergence.kl_mean:.3f}"
    if text.bits_per_byte is None or text.against_bits_per_byte is None:
        return ""
    return f"bits per byte {text.bits_per_byte / text.against_bits_per_byte:.4f} x dense"


def _side_by_side(output: Path) -> str:
    files = read_record(SideBySide, output / SIDE_BY_SIDE_FILE).files
    return "bits per byte " + ", ".join(f"{one.label} {one.bits_per_byte:.4f}" for one in files)


def _exported(output: Path) -> str:
    manifests = [read_record(ExportManifest, path) for path in sorted(output.glob("*/export.json"))]
    return ", ".join(f"{r.quant} {format_bytes(r.file_bytes)}" for m in manifests for r in m.exports)


def _measured(output: Path) -> str:
    rows = [
        record for record in read_jsonl(output / "bench.jsonl") if record.workload == "tg" or not record.ok
    ]
    return "; ".join(f"{record.model_filename} {_row(record)}" for record in rows)


def _row(record: BenchRecord) -> str:
    aside = f", {record.fallback} did not compute" if record.fallback else ""
    return f"{record.test} {speed_text(record) + aside if record.ok else f'failed: {record.failure}'}"


_FIGURES: Mapping[str, Callable[[Path], str]] = MappingProxyType(
    {
        "prune": _pruned,
        "recover": _recovered,
        "evaluate": _evaluated,
        "export-": _exported,
        "side-by-side": _side_by_side,
        "bench-": _measured,
        "decide-": _measured,
    }
)
"""Beginning of a stage's name -> what describes its output."""
