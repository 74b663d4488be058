"""A release as a run of MLflow: configuration as parameters, figures as metrics, records and reports as artifacts."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cfsp.errors import require_extra
from cfsp.reading import as_input_error
from cfsp.records import read_record
from phoneready.figures.figures import FIGURES_FILE, SHIPPED, VERDICTS_FILE, FigureSet, Verdicts
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
    """Log a finished release, unless it was logged before, unchanged; returns the id of the run.

    Raises InputError if the tracker cannot be reached or refuses, which leaves the release as it is; MissingExtraError.
    """
    require_extra("mlflow", "track")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.entities

    manifest = read_record(ReleaseManifest, folder / MANIFEST_FILE)
    figures = read_record(FigureSet, folder / FIGURES_FILE)
    tags = {
        _ID: read_entries(folder / HISTORY_FILE)[-1].id,
        "phoneready.source": manifest.source.reference,
        "phoneready.source_sha256": manifest.source.sha256 or "",
        "phoneready.outcome": read_record(Verdicts, folder / VERDICTS_FILE).outcome,
        "phoneready.version": manifest.versions.get("phoneready", ""),
    }
    parameters = [
        mlflow.entities.Param(_name(n), v[:_LONGEST_PARAMETER]) for n, v in _flat("", manifest.config)
    ]
    parameters.append(mlflow.entities.Param("removed_ffn_share", f"{manifest.removed_ffn_share:.6f}"))
    now = int(time.time() * 1000)
    metrics = []
    for figure in figures.figures:
        if figure.value is not None:
            role = "" if figure.role == SHIPPED else f"{figure.role}/"
            name = _name(f"{role}{figure.key.describe()}".replace(", ", "/"))
            metrics.append(mlflow.entities.Metric(name, figure.value, now, 0))
    # Records and reports at the top of the folder, and the exported files if they are wanted.
    exported = {file.file for file in manifest.files}
    kept = [
        path
        for path in sorted(folder.iterdir())
        if (tracking.files if path.name in exported else path.is_file() and path.suffix in _KEPT)
    ]
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
            for start in range(0, len(parameters), _MOST_PARAMETERS):
                client.log_batch(run_id, params=parameters[start : start + _MOST_PARAMETERS])
            for start in range(0, len(metrics), _MOST_METRICS):
                client.log_batch(run_id, metrics=metrics[start : start + _MOST_METRICS])
            for path in kept:
                if path.is_dir():
                    client.log_artifacts(run_id, str(path), path.name)
                else:
                    client.log_artifact(run_id, str(path))
            status = "FINISHED"
        finally:
            client.set_terminated(run_id, status)
    return run_id


def _experiment(client: Any, tracking: TrackingConfig) -> str:
    """Its id; it is made if it is missing."""
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is not None:
        return str(experiment.experiment_id)
    kind, _, path = tracking.mlflow.partition(":///")
    place = None
    if kind == "sqlite":  # artifacts go beside the database, not into the working folder
        database = Path(path).resolve()
        place = (database.parent / f"{database.stem}-artifacts").as_uri()
    return str(client.create_experiment(tracking.experiment, artifact_location=place))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if (prefix, key) != ("", "tracking"):
                yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif value is not None:
        yield prefix, str(value)


def _name(text: str) -> str:
    """In the characters that every MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", text)
