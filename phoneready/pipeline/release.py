"""The release: from a model reference to proven files, figures, a report and a manifest, stage by stage.

    dense          load the model, draw the calibration windows, keep both
    prune          make a plan, apply it, save the pruned checkpoint
    evaluate       pruned against dense on text and chats, answers of both
    export-dense   GGUF files and ONNX folders of the dense model, each held against it
    export-pruned  GGUF files and ONNX folders of the pruned model, each held against it
    answers        what the exports themselves answer, each in its own runtime
    bench          all of them, in turns

Report and manifest are written from what the stages left, in every run; the files are linked into the folder.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from cfsp.builtin import BUILTIN_MODELS
from cfsp.files import sha256_file
from cfsp.progress import Progress
from cfsp.records import tool_version
from phoneready.exporting import require_onnx_export
from phoneready.pipeline.config import ReleaseConfig
from phoneready.pipeline.manifest import ReleaseManifest, publish
from phoneready.pipeline.stages import Stage, claim_folder, run_stages
from phoneready.pipeline.steps import Steps
from runtime_bench.environment import cpu_model

__all__ = ["release_stages", "run_release"]

PACKAGES = ("torch", "transformers", "tokenizers", "gguf", "llama-cpp-python", "onnx-ir", "onnxruntime")
"""Packages whose version changes what a stage makes."""


def run_release(
    config: ReleaseConfig,
    folder: Path,
    *,
    show: Callable[[str, str], None],
    progress: Callable[[], AbstractContextManager[Progress]],
    threads: int | None = None,
) -> ReleaseManifest:
    """Do what is not done yet; write report.md, manifest.json and the files.

    Args:
        config: What to make.
        folder: Where; made when missing, continued when it holds a release.
        show: Told each stage's name and state.
        progress: Opens a progress display.
        threads: Threads outside torch and the benchmark; torch's number by default.

    Raises:
        InputError: A setting or an input that cannot be used, or a folder that is not a release's.
        MissingExtraError: The configuration asks for ONNX variants and the extra is not installed.
        LimitError: An exported file is too far from its checkpoint.
    """
    if config.export.onnx:
        require_onnx_export()
    with claim_folder(folder):
        stages = release_stages(config, folder, threads)
        records = run_stages(stages, folder, show=show, progress=progress)
        return publish(config, folder, list(records.values()))


def release_stages(config: ReleaseConfig, folder: Path, threads: int | None = None) -> list[Stage]:
    """The stages in order, with everything that their results depend on."""
    steps, c = Steps(config, folder, threads), config
    source = c.model.model_dump(mode="json") | {"identity": _identity(c.model.reference)}
    dense = {
        "tool": tool_version(),
        "packages": _versions(),
        "seed": c.seed,
        "model": source,
        "calibration": _identities(c.prune.calibration),
        "windows": [c.prune.nsamples, c.prune.seqlen],
        "moments": steps.needs_moments,
    }
    judged = c.evaluate.model_dump(mode="json")
    judged |= {"text": _identities(c.evaluate.text), "chats": _identities(c.evaluate.chats)}
    judged["prompts"] = list(steps.prompts)
    exported = c.export.model_dump(mode="json")
    asked = {"prompts": list(steps.prompts), "max_new_tokens": c.evaluate.max_new_tokens}
    measured = c.bench.model_dump(mode="json") | {"cpu": cpu_model()}
    exports = ("export-dense", "export-pruned")
    return [
        Stage("dense", dense, (), steps.dense),
        Stage("prune", dataclasses.asdict(c.prune_settings()), ("dense",), steps.prune),
        Stage("evaluate", judged, ("dense", "prune"), steps.evaluate),
        Stage("export-dense", exported, ("dense",), steps.export_dense),
        Stage("export-pruned", exported, ("prune",), steps.export_pruned),
        Stage("answers", asked, exports, steps.answers),
        Stage("bench", measured, exports, steps.bench),
    ]


def _versions() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in map(_distribution, PACKAGES) if d is not None}
    return dict(sorted(found.items()))


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _identities(references: Iterable[str]) -> list[list[str]]:
    return [[reference, _identity(reference)] for reference in references]


def _identity(reference: str) -> str:
    """What stands behind a reference now: a hash of its files, or "" where the reference itself says it all."""
    if reference in BUILTIN_MODELS:
        return BUILTIN_MODELS[reference].sha256
    path = Path(reference)
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return " ".join(f"{file.relative_to(path).as_posix()}:{sha256_file(file)}" for file in files)
    return ""
