"""A release as a run of MLflow: configuration as parameters, figures as metrics, records and reports as artifacts."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfsp.errors import require_extra
from cfsp.reading import as_input_error
from cfsp.records import read_record
from phoneready.figures.budgets import VERDICTS_FILE, Verdicts
from phoneready.figures.figure_set import FIGURES_FILE, PRUNED, Figure, FigureSet
from phoneready.history import HISTORY_FILE, read_entries
from phoneready.publish.manifest import MANIFEST_FILE, ReleaseManifest
from phoneready.settings.schema import TrackingConfig

_MOST_PARAMETERS, _MOST_METRICS = 100, 1000
"""Of one request, by MLflow's REST interface."""
_LONGEST_PARAMETER = 500
_ID = "phoneready.id"
_KEPT = (".json", ".jsonl", ".md", ".html", ".xml")
# A server that is not there is to be noticed in seconds; MLflow itself would try for minutes. And it reports usage home
# unless it is told not to.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def log_release(tracking: TrackingConfig, folder: Path, *, label: str | None = None) -> str:
    """Log a finished release; one that was logged before, unchanged, is not logged again.

    Returns:
        Id of the run.

    Raises:
        InputError: The tracker cannot be reached or refuses; the release is not touched.
        MissingExtraError: MLflow is not installed.
    """
    require_extra("mlflow", "track")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    manifest = read_record(ReleaseManifest, folder / MANIFEST_FILE)
    figures = read_record(FigureSet, folder / FIGURES_FILE)
    tags = _tags(folder, manifest)
    with as_input_error(
        f"tracking.mlflow: the release in {folder} is complete, but could not be logged in {tracking.mlflow}"
    ):
        client: Any = mlflow.MlflowClient(tracking_uri=tracking.mlflow)
        experiment = _experiment(client, tracking)
        same = f"tags.`{_ID}` = '{tags[_ID]}' and attributes.status = 'FINISHED'"
        for run in client.search_runs([experiment], same):
            return str(run.info.run_id)
        run_id = str(client.create_run(experiment, run_name=label, tags=tags).info.run_id)
        status = "FAILED"
        try:
            _log_figures(client, run_id, manifest, figures)
            for path in _artifacts(folder, manifest, files=tracking.files):
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), path.name)
                else:
                    client.log_artifact(run_id, str(path))
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
    return run_id


def _log_figures(client: Any, run_id: str, manifest: ReleaseManifest, figures: FigureSet) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    parameters = [
        Param(_name(name), value[:_LONGEST_PARAMETER]) for name, value in _flat("", manifest.config)
    ]
    parameters.append(Param("removed_ffn_share", f"{manifest.removed_ffn_share:.6f}"))
    metrics = [Metric(name, value, now, 0) for name, value in _metrics(figures.figures)]
    for start in range(0, len(parameters), _MOST_PARAMETERS):
        client.log_batch(run_id, params=parameters[start : start + _MOST_PARAMETERS])
    for start in range(0, len(metrics), _MOST_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + _MOST_METRICS])


def _experiment(client: Any, tracking: TrackingConfig) -> str:
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    kind, _, path = tracking.mlflow.partition(":///")
    place = None
    if kind == "sqlite":  # artifacts go beside the database, not into the working folder
        database = Path(path).resolve()
        place = (database.parent / f"{database.stem}-artifacts").as_uri()
    return str(client.create_experiment(tracking.experiment, artifact_location=place))


def _tags(folder: Path, manifest: ReleaseManifest) -> dict[str, str]:
    return {
        _ID: read_entries(folder / HISTORY_FILE)[-1].id,
        "phoneready.source": manifest.source.reference,
        "phoneready.source_sha256": manifest.source.sha256 or "",
        "phoneready.outcome": read_record(Verdicts, folder / VERDICTS_FILE).outcome,
        "phoneready.version": manifest.versions.get("phoneready", ""),
    }


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if (prefix, key) != ("", "tracking"):
                yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif value is not None:
        yield prefix, str(value)


def _metrics(figures: Sequence[Figure]) -> Iterator[tuple[str, float]]:
    for figure in figures:
        if figure.value is not None:
            role = "" if figure.role == PRUNED else f"{figure.role}/"
            yield _name(f"{role}{figure.key.describe()}".replace(", ", "/")), figure.value


def _name(text: str) -> str:
    """In the characters that every MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", text)


def _artifacts(folder: Path, manifest: ReleaseManifest, *, files: bool) -> Iterator[Path]:
    """Records and reports at the top of the folder, and the exported files where they are wanted."""
    exported = {file.file for file in manifest.files}
    for path in sorted(folder.iterdir()):
        if path.name in exported:
            if files:
                yield path
        elif path.is_file() and path.suffix in _KEPT:
            yield path
