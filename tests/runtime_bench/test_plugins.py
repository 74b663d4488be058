"""Engines and targets of another distribution, found by entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = '''
from runtime_bench.engines import EngineFacts, EngineSpec
from runtime_bench.targets import Local
from runtime_bench.targets.table import TargetRow

ENGINE = EngineSpec(module="toy_plugin", package="toy_plugin", distribution="toy", suffix=".toy")


class Session:
    """An engine that decodes nothing, quickly."""

    facts = EngineFacts("toy", 3, 1, "CPU", {"toy": "1.0"}, None)
    n_vocab, bos = 7, None

    def clear(self): pass
    def decode(self, tokens): sum(range(1000))
    def tokenize(self, text): return [1] * len(text)
    def sample(self): return 1
    def close(self): pass


def prepare(): pass
def open_session(path, settings): return Session()


class Place(Local):
    def __init__(self, address): self.name = f"toy:{address}"


TARGET = TargetRow("toy:PLACE", lambda address, options, progress: Place(address))


class Old:
    """Of a time in which targets had fewer members."""

    name, kind = "toy", "measured"


OLD = TargetRow("toy:PLACE", lambda address, options, progress: Old())
'''

InstallPlugin = Callable[..., dict[str, str]]


@pytest.fixture
def install_plugin(tmp_path: Path) -> InstallPlugin:
    """Factory `install_plugin(name, groups)` of an installed distribution; returns the environment that has it."""
    site = tmp_path / "site"

    def install(name: str, groups: Mapping[str, str]) -> dict[str, str]:
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / "toy_plugin.py").write_text(CODE)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "".join(f"[phoneready.{group}]\n{entry}\n" for group, entry in groups.items())
        (info / "entry_points.txt").write_text(lines)
        paths = os.pathsep.join([str(site), str(ROOT)])
        return os.environ | {"PYTHONPATH": paths, "PHONEREADY_CACHE": str(tmp_path / "cache")}

    return install


def phoneready(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "phoneready", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def bench(environment: dict[str, str], file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    file.write_bytes(b"toy")
    sizes = ("-p", "0", "-n", "4", "--set", "ttft=0", "-t", "1", "-r", "1", "--set", "check_text=false")
    return phoneready(environment, "bench", str(file), *sizes, "--json", *arguments)


def test_an_engine_and_a_target_of_another_distribution_measure(
    install_plugin: InstallPlugin, tmp_path: Path
) -> None:
    environment = install_plugin(
        "toy", {"engines": "toy = toy_plugin:ENGINE", "targets": "toy = toy_plugin:TARGET"}
    )
    result = bench(environment, tmp_path / "model.toy", "--engine", "toy", "--on", "toy:here")
    assert result.returncode == 0, result.stderr
    _, record = json.loads(result.stdout)
    assert (record["engine"], record["target"], record["status"]) == ("toy", "toy:here", "ok")
    assert record["environment"]["versions"]["toy"] == "1.0"
    by_suffix = bench(environment, tmp_path / "model.toy")
    assert json.loads(by_suffix.stdout)[0]["engine"] == "toy"
    found = {
        check["name"]: check
        for check in json.loads(phoneready(environment, "doctor", "--json").stdout)["checks"]
    }
    assert found["engine toy"]["found"] == found["target toy"]["found"] == "plugin of toy 1.0"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("toy = toy_plugin:NOTHING", "plugin toy of broken 1.0 cannot be imported: AttributeError"),
        ("toy = not_there", "plugin toy of broken 1.0 cannot be imported: ModuleNotFoundError"),
        ("toy = toy_plugin:CODE_OF_NONE", "plugin toy of broken 1.0 cannot be imported"),
        ("toy = toy_plugin:prepare", "plugin toy of broken 1.0 is of type function; allowed: EngineSpec"),
        ("llama.cpp = toy_plugin:ENGINE", "plugin llama.cpp of broken 1.0 is called like a built-in one"),
        ("other = toy_plugin:ENGINE", "engine: unknown engine (got 'toy'); allowed: llama.cpp"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(
    install_plugin: InstallPlugin, tmp_path: Path, entry: str, reason: str
) -> None:
    result = bench(install_plugin("broken", {"engines": entry}), tmp_path / "model.toy", "--engine", "toy")
    assert (result.returncode, result.stdout) == (2, "")
    assert reason in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_target_that_lacks_members_is_one_line(install_plugin: InstallPlugin, tmp_path: Path) -> None:
    environment = install_plugin("old", {"targets": "toy = toy_plugin:OLD"})
    result = bench(environment, tmp_path / "model.toy", "--engine", "llama.cpp", "--on", "toy:here")
    assert (result.returncode, result.stdout) == (2, "")
    assert "Old lacks conditions, default_engine, environment, lasts, memory_limit_bytes" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_two_plugins_of_one_name_are_refused_by_name(install_plugin: InstallPlugin, tmp_path: Path) -> None:
    install_plugin("first", {"targets": "toy = toy_plugin:TARGET"})
    environment = install_plugin("second", {"targets": "toy = toy_plugin:TARGET"})
    result = bench(environment, tmp_path / "model.toy", "--on", "toy:here")
    assert result.returncode == 2
    assert "several plugins are called toy: first 1.0, second 1.0; uninstall all but one" in result.stderr
    checks = json.loads(phoneready(environment, "doctor", "--json").stdout)["checks"]
    assert [check["state"] for check in checks if check["name"] == "target toy"] == ["warning", "warning"]
