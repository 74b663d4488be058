"""Releases in MLflow: a real store, a server that is not there, and nothing logged twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytest.importorskip("mlflow", reason="the track extra is not installed")

from phoneready.main import main

KEPT = {".json", ".jsonl", ".md", ".html", ".xml", ".toml", ""}


def test_a_release_is_logged_once_and_a_missing_server_loses_nothing(
    tiny_folder: Callable[..., Path],
    small_release: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    model, folder, store = tiny_folder(), tmp_path / "release", tmp_path / "runs.db"

    def release(uri: str, *options: str) -> int:
        tracking = f'[tracking]\nmlflow = "{uri}"\nexperiment = "phones"\n'
        path = small_release(model, ("chats = []", "chats = []\nlimit = 8"), tracking)
        return main(["release", str(path), "-o", str(folder), "--threads", "1", "--label", "1.0", *options])

    # Nothing listens there.
    assert release("http://127.0.0.1:9") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: tracking.mlflow: the release in")
    assert "is complete, but could not be logged" in lines[-1]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (folder / manifest["files"][0]["file"]).is_file()
    (warning,) = manifest["warnings"]
    assert warning == "evaluate.limit has no effect without tasks"
    assert lines.count(f"warning: {warning}") == 1

    # A login in the URL is for the server alone.
    assert release("http://me:p%40ss@127.0.0.1:9", "--debug", "--json") == 2
    said = capsys.readouterr()
    assert "could not be logged in http://127.0.0.1:9" in said.err
    published = [
        file.read_text("utf-8", "replace")
        for file in folder.rglob("*")
        if file.is_file() and file.suffix in KEPT
    ]
    lines = [line for text in (said.out, said.err, *published) for line in text.splitlines()]
    assert not [line for line in lines if "p%40ss" in line]
    assert json.loads(said.out)["config"]["tracking"]["mlflow"] == "http://127.0.0.1:9"

    # A missed budget is what the exit status tells, not the tracker's absence.
    assert release("http://127.0.0.1:9", "--set", 'budgets=[{metric="kl_mean", at_most=0.0}]') == 1
    capsys.readouterr()

    for _ in range(2):
        assert release(f"sqlite:///{store}") == 0
    assert "logged as run" in capsys.readouterr().err
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("phones")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("1.0", "FINISHED")
    assert run.data.params["prune.prune_ratio"] == "0.25"
    assert not [name for name in run.data.params if name.startswith("tracking")]
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["figures"]
    assert len(run.data.metrics) == sum(figure["value"] is not None for figure in figures)
    size = next(file["bytes"] for file in manifest["files"] if file["role"] == "pruned")
    assert run.data.metrics["file_bytes/Q8_0"] == size
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"manifest.json", "figures.json", "report.md", "history.jsonl"} <= names
    assert not [name for name in names if name.endswith(".gguf")]
    assert (tmp_path / "runs-artifacts").is_dir()
