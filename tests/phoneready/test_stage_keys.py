"""What makes stages of a release run again: the tool's code, a package that makes results, or a setting."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from cfsp.progress import Progress, no_progress
from phoneready.recipe import explain_release, release_stages
from phoneready.release import inputs
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


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tool's code, to be changed."""
    root = tmp_path_factory.mktemp("code")
    for package in ("cfsp", "exporters", "runtime_bench", "phoneready"):
        shutil.copytree(ROOT / package, root / package)
    return root


def run_again(folder: Path, config: ReleaseConfig = CONFIG) -> dict[str, str]:
    return {name: reason for name, reason in explain_release(config, folder).items() if reason}


@pytest.mark.parametrize(
    "changed",
    [
        "cfsp/text/degeneration.py",
        "runtime_bench/records/reported.py",
        "phoneready/console.py",
        "runtime_bench/browser/a_new_file.js",
    ],
)
def test_any_change_of_the_code_runs_every_stage(
    folder: Path, copy: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phoneready.recipe.made_with", lambda: made_with(copy))
    assert run_again(folder) == {}
    (copy / "cfsp" / "__pycache__").mkdir(exist_ok=True)
    (copy / "cfsp" / "__pycache__" / "other.pyc").write_bytes(b"compiled")
    assert run_again(folder) == {}
    file = copy / changed
    before = file.read_bytes() if file.exists() else None
    file.write_bytes((before or b"") + b"\n")
    found = run_again(folder)
    if before is None:
        file.unlink()
    else:
        file.write_bytes(before)
    assert tuple(found) == ALL
    assert found["dense"].startswith("code was ")


@pytest.mark.parametrize("package", ["torch", "safetensors", "onnxruntime", "llama-cpp-python", "peft"])
def test_another_version_of_a_package_runs_every_stage(
    folder: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = inputs.installed_version
    monkeypatch.setattr(inputs, "installed_version", lambda name: "99" if name == package else before(name))
    found = run_again(folder)
    assert tuple(found) == ALL
    assert f'packages.{package} was "{before(package)}" and is "99"' in found["dense"]


def test_what_only_shows_or_tests_is_no_reason() -> None:
    assert not {"plotly", "rich", "mlflow-skinny", "optuna", "pytest", "phoneready"} & set(
        made_with()["packages"]
    )


def test_a_plugin_that_comes_is_a_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[phoneready.engines]\ntoy = toy:ENGINE\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_again(folder)["dense"] == 'plugins was [] and is ["toy 1.0"]'


def test_what_weights_are_rounded_to_runs_every_stage_and_where_it_is_computed_none(folder: Path) -> None:
    def asked(**changes: str) -> set[str]:
        config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update=changes)})
        return set(run_again(folder, config))

    assert asked(device="cpu") == set()
    assert asked(dtype="bfloat16") == set(ALL)


def test_metered_energy_measures_again(folder: Path) -> None:
    bench = replace(CONFIG.bench, energy=True)
    assert list(run_again(folder, CONFIG.model_copy(update={"bench": bench}))) == ["bench-local"]
