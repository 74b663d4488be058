"""The examples for build systems, run as they stand against a tiny model: green, and red where a budget is missed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from cfsp.files import sha256_file
from phoneready.main import main

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytestmark = pytest.mark.everything

TinyPath = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "examples" / "ci"
CONFIG = """
[model]
reference = "{model}"
[prune]
prune_ratio = 0.25
calibration = ["builtin:python-docs"]
nsamples = 2
seqlen = 64
[evaluate]
text = ["builtin:python-docs"]
chats = []
seqlen = 64
max_windows = 1
prompts = ["Who?"]
max_new_tokens = 2
[quantize]
to = ["Q8_0"]
[bench]
n_prompt = [0]
n_gen = [0]
ttft = [0]
n_threads = [1]
repetitions = 1
check_text = false
[[budgets]]
metric = "file_bytes"
relative_to = "dense"
at_most = 0.95
"""
MET, MISSED = "at_most = 0.95", "at_most = 0.5"


@pytest.fixture(scope="module")
def made(tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder: release.toml and its finished release."""
    folder = tmp_path_factory.mktemp("project")
    model = tiny_folder(intermediate_size=256)
    (folder / "release.toml").write_text(CONFIG.format(model=model), encoding="utf-8")
    assert main(["release", str(folder / "release.toml"), "-o", str(folder / "release")]) == 0
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """The project with the example files beside it."""
    folder = tmp_path / "project"
    shutil.copytree(made, folder)
    for file in CI.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With the command `phoneready` of this checkout first on the path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    command = tools / "phoneready"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m phoneready "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    summary = {"GITHUB_STEP_SUMMARY": str(tmp_path / "step.md"), "QUANT": "Q8_0"}
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | summary


def run(line: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def miss(project: Path) -> None:
    """Set a budget that cannot be met."""
    config = project / "release.toml"
    config.write_text(config.read_text(encoding="utf-8").replace(MET, MISSED), encoding="utf-8")


def released(project: Path) -> Path:
    (file,) = (project / "release").glob("*[!e]-Q*.gguf")
    return file


def workflow() -> list[dict[str, Any]]:
    content = yaml.safe_load((CI / "github-actions.yml").read_text(encoding="utf-8"))
    steps: list[dict[str, Any]] = content["jobs"]["model"]["steps"]
    return steps


def test_github_actions(project: Path, environment: dict[str, str]) -> None:
    """All but the installation, which wants a published distribution."""
    shells = {step["name"]: step["run"] for step in workflow() if "run" in step}
    assert list(shells) == ["Install", "Say what will run", "Release"]
    said = run(["bash", "-e", "-c", shells["Say what will run"]], project, environment)
    assert {line.split(maxsplit=1)[1] for line in said.stdout.splitlines()} == {"done before"}
    done = run(["bash", "-e", "-c", shells["Release"]], project, environment)
    assert done.returncode == 0, done.stderr
    summary = Path(environment["GITHUB_STEP_SUMMARY"])
    assert "PASS" in summary.read_text(encoding="utf-8")
    miss(project)
    red = run(["bash", "-e", "-c", shells["Release"]], project, environment)
    assert red.returncode == 1
    assert "1 of 1 budgets missed" in red.stderr
    assert "❌ missed" in summary.read_text(encoding="utf-8")
    (upload,) = (step for step in workflow() if step.get("uses", "").startswith("actions/upload-artifact"))
    for pattern in upload["with"]["path"].split():
        assert list(project.glob(pattern)), pattern


def test_what_a_red_run_has_made_is_kept_for_the_next_one() -> None:
    """actions/cache saves at the end of green jobs alone; GitLab's cache unless `when` says more."""
    names = [step.get("uses", step.get("name", "")) for step in workflow()]
    assert not any(name.startswith("actions/cache@") for name in names)
    (restore,), (save,) = (
        [step for step in workflow() if step.get("uses", "").startswith(f"actions/cache/{what}@")]
        for what in ("restore", "save")
    )
    assert save["if"] == "always()"
    assert save["with"] == {name: restore["with"][name] for name in ("path", "key")}
    assert (
        "github.run_attempt" in save["with"]["key"]
    )  # a key is written once, and a run may be started again
    assert names.index("Release") < names.index(save["uses"])
    job = yaml.safe_load((CI / "gitlab-ci.yml").read_text(encoding="utf-8"))["model"]
    assert (job["cache"]["paths"], job["cache"]["when"]) == (["release"], "always")


def test_gitlab(project: Path, environment: dict[str, str]) -> None:
    job = yaml.safe_load((CI / "gitlab-ci.yml").read_text(encoding="utf-8"))["model"]
    miss(project)
    red = run(["bash", "-e", "-c", "\n".join(job["script"])], project, environment)
    assert red.returncode == 1
    for pattern in job["artifacts"]["paths"]:
        assert list(project.glob(pattern)), pattern
    suite = ElementTree.parse(project / job["artifacts"]["reports"]["junit"]).getroot()
    assert suite.get("failures") == "1"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make(project: Path, environment: dict[str, str]) -> None:
    assert run(["make", "model"], project, environment).returncode == 0
    assert sha256_file(project / "build" / "model.gguf") == sha256_file(released(project))
    (project / "build" / "model.gguf").unlink()
    miss(project)
    assert run(["make", "model"], project, environment).returncode != 0
    assert not (project / "build" / "model.gguf").exists()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="CMake is not installed")
def test_cmake(project: Path, environment: dict[str, str]) -> None:
    settings = {"PHONEREADY_RELEASE": project / "release", "PHONEREADY_QUANT": "Q8_0"}
    configure = ["cmake", "-B", "build", *(f"-D{name}={value}" for name, value in settings.items())]
    assert run(configure, project, environment).returncode == 0
    built = run(["cmake", "--build", "build"], project, environment)
    assert built.returncode == 0, built.stdout + built.stderr
    assert sha256_file(project / "build" / "assets" / "model.gguf") == sha256_file(released(project))
    miss(project)
    assert run(["cmake", "--build", "build"], project, environment).returncode != 0
