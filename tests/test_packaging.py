"""sdist -> wheel -> a clean environment: the command runs and everything that is data came along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA_FILES = (
    "cfsp/py.typed",
    "exporters/py.typed",
    "runtime_bench/py.typed",
    "phoneready/py.typed",
    "cfsp/models/remote_code/modeling_pruned.py",
    "phoneready/settings/demo.toml",
    "phoneready/publish/templates/model_card.md.j2",
    "phoneready/report/templates/report.md.j2",
    "phoneready/report/templates/report.css",
    "phoneready/report/templates/report.html.j2",
    "phoneready/report/templates/report.js",
    "runtime_bench/devices/README.md",
    "runtime_bench/native/CMakeLists.txt",
    "runtime_bench/native/questions.hpp",
    "runtime_bench/native/runner.cpp",
    "runtime_bench/native/llama_source.sha256",
    "runtime_bench/browser/package-lock.json",
)

pytestmark = pytest.mark.everything


def call(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the sdist and the wheel that is built from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    output = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, ROOT)
    return output


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a clean environment: our wheel is installed, its dependencies are seen where they are."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    call(python, "-m", "pip", "install", "--no-deps", "--no-index", next(built.glob("*.whl")))
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # After the environment's own folder, and without the .pth files there: an editable install stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return python


def test_the_sdist_has_what_the_wheel_is_built_from(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "devices/README.md"} <= names
    assert not {name.split("/")[0] for name in names} & {".venv", "tests", "demo-release"}


def test_the_wheel_has_every_module_and_data_file(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        names = set(archive.namelist())
    modules = {
        path.relative_to(ROOT).as_posix()
        for package in ("cfsp", "exporters", "runtime_bench", "phoneready")
        for path in (ROOT / package).rglob("*.py")
    }
    assert modules <= names
    assert set(DATA_FILES) <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_command_runs(environment: Path, tmp_path: Path) -> None:
    command = environment.parent / "phoneready"
    version = call(
        environment, "-c", "import importlib.metadata as m; print(m.version('phoneready'))"
    ).strip()
    assert call(command, "--version").strip() == f"phoneready {version}"
    assert "release" in call(command, "--help")
    assert call(command, "doctor", "--json", PHONEREADY_CACHE=str(tmp_path)).startswith("{")
    shown = json.loads(call(command, "devices", "list", "raspberry-pi-5-8gb", "--json"))
    assert shown["built_in"]
    assert Path(shown["file"]).is_relative_to(environment.parent.parent)


def test_installed_data_is_read_from_the_installation(environment: Path) -> None:
    code = (
        "import importlib.resources as r, phoneready.report as p, cfsp; "
        "from phoneready.settings.release import load_config; "
        "print(cfsp.__file__, load_config(None).model.reference, "
        "r.files(p).joinpath('templates/report.md.j2').is_file())"
    )
    # From another folder: the checkout must not be what is imported.
    result = subprocess.run(
        [str(environment), "-c", code],
        cwd=environment.parent,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    where, reference, template = result.stdout.split()
    assert str(environment.parent.parent) in where
    assert (reference, template) == ("smollm2-135m", "True")
