"""What makes stages of a release run again: the tool's code, a package that makes results, or a setting."""

from __future__ import annotations

import importlib.metadata as metadata
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from cfsp.progress import Progress, no_progress
from phoneready.recipe import explain_release, release_stages
from phoneready.release.inputs import ROOT, made_with
from phoneready.release.stages import claim_folder, run_stages
from phoneready.settings.schema import ReleaseConfig

CONFIG = ReleaseConfig.model_validate(
    {
        "model": {"reference": "smollm2-135m"},
        "recover": {},
        "evaluate": {"tasks": ["arc_easy"], "files": ["Q4_0"]},
        "export": {"quants": ["Q4_0"], "onnx": ["int8"]},
    }
)
ALL = (
    *("dense", "prune", "recover", "evaluate", "export-dense", "export-pruned", "answers", "side-by-side"),
    *("evaluate-files", "bench-local"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder whose stages have keys, and no result."""

    def nothing(output: Path, progress: Progress) -> None:
        (output / "bench.jsonl").touch()

    folder = tmp_path_factory.mktemp("release") / "out"
    stages = [replace(stage, run=nothing) for stage in release_stages(CONFIG, folder)]
    assert tuple(stage.name for stage in stages) == ALL
    with claim_folder(folder):
        run_stages(stages, folder, show=lambda name, state: None, progress=lambda: nullcontext(no_progress))
    return folder


def run_again(folder: Path, config: ReleaseConfig = CONFIG) -> dict[str, str]:
    return {name: reason for name, reason in explain_release(config, folder).items() if reason}


def test_any_change_of_the_code_runs_every_stage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("cfsp", "exporters", "runtime_bench", "phoneready"):
        shutil.copytree(ROOT / package, tmp_path / package)
    monkeypatch.setattr("phoneready.recipe.made_with", lambda: made_with(tmp_path))
    (tmp_path / "cfsp" / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "cfsp" / "__pycache__" / "other.pyc").write_bytes(b"compiled")
    assert run_again(folder) == {}
    for changed in ("cfsp/text/degeneration.py", "phoneready/console.py", "runtime_bench/browser/new.js"):
        file = tmp_path / changed
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(before + b"\n")
        found = run_again(folder)
        file.write_bytes(before)
        if not before:
            file.unlink()
        assert tuple(found) == ALL
        assert found["dense"].startswith("code was ")


def test_another_package_or_plugin_runs_every_stage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "99" if name == "torch" else before(name))
        found = run_again(folder)
    assert tuple(found) == ALL
    assert f'packages.torch was "{before("torch")}" and is "99"' in found["dense"]
    packages = set(made_with()["packages"])
    assert packages >= {"torch", "safetensors", "onnxruntime", "llama-cpp-python", "peft"}
    assert not {"plotly", "rich", "mlflow-skinny", "pytest", "phoneready"} & packages, (
        "they only show or test"
    )
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[phoneready.engines]\ntoy = toy:ENGINE\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_again(folder)["dense"] == 'plugins was [] and is ["toy 1.0"]'


def test_settings_run_what_reads_them(folder: Path) -> None:
    def asked(**changes: str) -> set[str]:
        config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update=changes)})
        return set(run_again(folder, config))

    assert asked(device="cpu") == set()
    assert asked(dtype="bfloat16") == set(ALL)
    bench = replace(CONFIG.bench, energy=True)
    assert list(run_again(folder, CONFIG.model_copy(update={"bench": bench}))) == ["bench-local"]
