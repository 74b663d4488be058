"""A release as a run of MLflow: configuration as parameters, figures as metrics, records and reports as artifacts."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from cfsp.errors import InputError, require_extra
from cfsp.progress import Pace, Progress
from cfsp.reading import as_input_error
from cfsp.records import read_record
from phoneready.figures.figures import FIGURES_FILE, SHIPPED, VERDICTS_FILE, FigureSet, Verdicts
from phoneready.history import HISTORY_FILE, read_entries
from phoneready.publish.manifest import MANIFEST_FILE, ReleaseManifest
from phoneready.settings.schema import TrackingConfig

_MOST_PARAMETERS, _MOST_METRICS = 100, 1000
"""Of one request, by MLflow's REST interface."""
_LONGEST_PARAMETER = 500
LIVE_INTERVAL_S = 15.0
"""A step that goes on is logged this often."""
_ID = "phoneready.id"
_KEPT = (".json", ".jsonl", ".md", ".html", ".xml")
# A server that is not there is to be noticed in seconds; MLflow itself would try for minutes. And it reports usage home
# unless it is told not to.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class LiveRun:
    """The run of a release that goes on: share done, minutes left and loss of each step that lasts.

    A context, which marks the run as failed if the release fails. It is made with the first such step; a tracker that
    is away is told to `warn` once, and left alone then.
    """

    def __init__(self, tracking: TrackingConfig, label: str | None, warn: Callable[[str], None]) -> None:
        self.tracking, self.label, self.warn = tracking, label, warn
        self.run_id: str | None = None
        self._pace, self._said, self._away = Pace(), dict[str, float](), False

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.run_id is not None:
            with suppress(InputError), as_input_error("tracking.mlflow"):
                _client(self.tracking).set_terminated(self.run_id, "FAILED")

    @contextmanager
    def progress(self, shown: Callable[[], AbstractContextManager[Progress]]) -> Iterator[Progress]:
        """Progress as it is shown, and in the run."""
        with shown() as show:

            def told(description: str, done: int, total: int) -> None:
                show(description, done, total)
                step, took_s, left_s = self._pace.at(description, done, total)
                due, ends = took_s - self._said.get(step, 0.0) >= LIVE_INTERVAL_S, done >= total
                if self._away or not (self._said.pop(step, None) is not None if ends else due):
                    return
                self._said |= {} if ends else {step: took_s}
                values = {"done": done / total} | ({} if left_s is None else {"minutes_left": left_s / 60})
                figure, _, value = description.partition(": ")[2].partition(" ")
                with suppress(ValueError):
                    values |= {figure: float(value)}
                self._log({_name(f"live/{step}/{name}"): value for name, value in values.items()}, done)

            yield told

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now, tracking = int(time.time() * 1000), self.tracking
        try:
            with as_input_error(f"tracking.mlflow: the release is not followed in {tracking.mlflow}"):
                client = _client(tracking)
                if self.run_id is None:
                    made = client.create_run(_experiment(client, tracking), run_name=self.label)
                    self.run_id = str(made.info.run_id)
                client.log_batch(
                    self.run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()]
                )
        except InputError as error:
            self._away = True
            self.warn(f"warning: {error}")


def log_release(tracking: TrackingConfig, folder: Path, live: LiveRun) -> str:
    """Log a finished release, unless it was logged before, unchanged; returns the id of the run.

    Raises InputError if the tracker cannot be reached or refuses, which leaves the release as it is; MissingExtraError.
    """
    require_extra("mlflow", "track")
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
        client = _client(tracking)
        experiment = _experiment(client, tracking)
        same = f"tags.`{_ID}` = '{tags[_ID]}' and attributes.status = 'FINISHED'"
        for run in client.search_runs([experiment], same):
            if live.run_id is not None:
                client.delete_run(live.run_id)
            return str(run.info.run_id)
        run_id = live.run_id or str(client.create_run(experiment, run_name=live.label).info.run_id)
        status = "FAILED"
        try:
            client.log_batch(run_id, tags=[mlflow.entities.RunTag(*tag) for tag in tags.items()])
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


def _client(tracking: TrackingConfig) -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow.MlflowClient(tracking_uri=tracking.mlflow)


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
