"""Stages: done once, keyed by what they depend on, and safe from a kill at any moment."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import InputError
from cfsp.progress import Progress, no_progress
from phoneready.release.inputs import made_with
from phoneready.release.stages import LOCK_FILE, Stage, claim_folder, run_stages, stage_folder
from phoneready.releasing import explain_release, release_stages
from phoneready.settings.schema import ReleaseConfig

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = """
import random, sys, time
from contextlib import nullcontext
from pathlib import Path
from cfsp.progress import no_progress
from phoneready.release.stages import Stage, claim_folder, run_stages, stage_folder

folder = Path(sys.argv[1])

def make(name, before):
    def run(output, progress):
        text = "".join((stage_folder(folder, n) / "deep" / "data.txt").read_text() for n in before) + name
        (output / "deep").mkdir()
        for number in range(3):
            (output / "deep" / f"part{number}.txt").write_text(name * 1000)
            time.sleep(0.01)
        (output / "deep" / "data.txt").write_text(text)
    return Stage(name, lambda: {"n": name}, before, run)

stages = [make("a", ()), make("b", ("a",)), make("c", ("a", "b"))]
with claim_folder(folder):
    print("claimed", flush=True)
    show = lambda name, state: print(name, state, flush=True)
    run_stages(stages, folder, show=show, progress=lambda: nullcontext(no_progress))
"""


def writing(name: str, after: tuple[str, ...] = (), **settings: object) -> Stage:
    def run(output: Path, progress: Progress) -> None:
        (output / "data.txt").write_text(name)

    return Stage(name, lambda: settings, after, run)


def states(stages: list[Stage], folder: Path) -> dict[str, str]:
    """The last state shown of each stage, without the time."""
    shown: dict[str, str] = {}
    with claim_folder(folder):
        run_stages(
            stages,
            folder,
            show=lambda name, state: shown.__setitem__(name, state.partition(" in ")[0]),
            progress=lambda: nullcontext(no_progress),
        )
    return shown


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the stages' records, whose times differ."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "stage.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_second_run_does_nothing_and_a_change_redoes_what_depends_on_it(tmp_path: Path) -> None:
    def pipeline(a: int = 1, b: int = 1) -> list[Stage]:
        return [writing("a", n=a), writing("b", ("a",), n=b), writing("c", ("a",), n=1)]

    folder = tmp_path / "out"
    assert set(states(pipeline(), folder).values()) == {"finished"}
    assert set(states(pipeline(), folder).values()) == {"done before"}
    assert states(pipeline(b=2), folder) == {"a": "done before", "b": "finished", "c": "done before"}
    assert set(states(pipeline(a=2, b=2), folder).values()) == {"finished"}


def test_a_stage_that_resumes_goes_on_with_what_it_has(tmp_path: Path) -> None:
    made: list[str] = []

    def pipeline(names: str, n: int = 1, fails_at: str = "") -> list[Stage]:
        def run(output: Path, progress: Progress) -> None:
            for path in output.glob("*.txt"):
                _ = path.stem in names or path.unlink()
            for name in names:
                if name == fails_at:
                    raise InputError("killed")
                if not (output / f"{name}.txt").exists():
                    made.append(name)
                    (output / f"{name}.txt").write_text(name)

        settings = {"names": names, "n": n}
        first = Stage("a", lambda: settings, (), run, resumes=True, rows=("names",))
        return [first, Stage("b", dict, ("a",), run, resumes=True)]

    def run(*asked: Any) -> str:
        made.clear()
        states(pipeline(*asked), tmp_path)
        left = {path.name for path in stage_folder(tmp_path, "a").iterdir()}
        assert left == {"stage.json", *(f"{name}.txt" for name in asked[0])}
        return "".join(made)

    assert run("xy") == "xyxy"
    assert run("xyz") == "zz"
    assert run("z") == run("z") == ""
    assert run("zy") == "yy"
    assert run("zy", 2) == "zyzy", "another setting begins anew"
    with pytest.raises(InputError, match="killed"):
        run("zyvw", 2, "w")
    assert run("zyvw", 2) == "wvw"
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["a", "b"]


def test_a_damaged_stage_is_done_again(tmp_path: Path) -> None:
    stages, output = [writing("a", n=1)], stage_folder(tmp_path, "a")
    for damaged, content in (("data.txt", None), ("data.txt", ""), ("stage.json", "{")):
        states(stages, tmp_path)
        (output / damaged).unlink()
        if content is not None:
            (output / damaged).write_text(content)
        assert states(stages, tmp_path) == {"a": "finished"}
        assert (output / "data.txt").read_text() == "a"


def test_a_failing_stage_leaves_nothing_and_keeps_what_was_done(tmp_path: Path) -> None:
    def fail(output: Path, progress: Progress) -> None:
        (output / "half.txt").write_text("half")
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        states([writing("a"), Stage("b", dict, ("a",), fail)], tmp_path)
    assert sorted(path.name for path in (tmp_path / "stages").iterdir()) == ["a"]
    assert states([writing("a")], tmp_path) == {"a": "done before"}


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not a release folder"), claim_folder(tmp_path):
        pass
    with pytest.raises(InputError, match="not a release folder"), claim_folder(tmp_path / "mine.txt"):
        pass
    with pytest.raises(InputError, match="cannot write"), claim_folder(tmp_path / "mine.txt" / "below"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_error_before_anything_was_done_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    def fail(output: Path, progress: Progress) -> None:
        (output / "half.txt").write_text("half")
        raise InputError("no")

    def made(folder: Path, *, mark: bool) -> Path:
        folder.mkdir(parents=True)
        _ = mark and (folder / LOCK_FILE).touch()
        return folder

    release = tmp_path / "release"
    states([writing("a")], release)
    plain, marked = made(tmp_path / "plain", mark=False), made(tmp_path / "marked", mark=True)
    for folder in (tmp_path / "above" / "new", plain, marked, release):
        left = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="no"):
            states([Stage("b", dict, (), fail)], folder)
        assert sorted(tmp_path.rglob("*")) == left


def test_who_waits_for_the_lock_of_a_run_that_fails_has_the_folder_alone(tmp_path: Path) -> None:
    """Many begin at once and fail: of those whose lock's file is gone none believes to hold it."""
    folder, inside, overlaps = tmp_path / "out", [0], []

    def run() -> None:
        for _ in range(100):
            with suppress(InputError), claim_folder(folder):
                inside[0] += 1
                overlaps.append(inside[0] > 1 or not (folder / LOCK_FILE).is_file())
                time.sleep(0)
                inside[0] -= 1
                raise InputError("no")

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(run) for _ in range(4)]:
            future.result()
    assert overlaps
    assert not any(overlaps)
    assert {path.name for path in tmp_path.rglob("*")} <= {"out", LOCK_FILE}


def run_pipeline(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", PIPELINE, str(folder)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with run_pipeline(tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(InputError, match="another run"), claim_folder(tmp_path):
            pass
        process.communicate(timeout=60)
    assert process.returncode == 0
    with claim_folder(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_killed_at_random_moments_it_ends_with_the_same_and_repeats_nothing(tmp_path: Path) -> None:
    whole = run_pipeline(tmp_path / "whole")
    assert whole.communicate(timeout=60)[1] == ""
    generator, folder = random.Random(0), tmp_path / "killed"
    done: set[str] = set()
    attempts = 0
    while done != {"a", "b", "c"}:
        attempts += 1
        assert attempts <= 60, f"60 runs of up to 3 s each finished {sorted(done)} alone"
        with run_pipeline(folder) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline()]  # the interpreter has started: moments are those of the run
            time.sleep(generator.uniform(0, 0.1 + 0.05 * attempts))  # on a busy machine a stage takes longer
            process.kill()
            lines += process.communicate(timeout=60)[0].splitlines()
        started = {line.split()[0] for line in lines if line.strip().endswith("running")}
        assert not started & done, "a finished stage ran again"
        stages = folder / "stages"
        done = {path.parent.name for path in stages.glob("[!.]*/stage.json")} if stages.exists() else set()
    last = run_pipeline(folder)
    output, errors = last.communicate(timeout=60)
    assert (last.returncode, errors) == (0, "")
    assert not {line.split()[0] for line in output.splitlines() if line.endswith("running")} & done
    assert tree(folder) == tree(tmp_path / "whole")


CONFIG = ReleaseConfig.model_validate(
    {
        "model": {"reference": "smollm2-135m"},
        "recover": {},
        "evaluate": {"tasks": ["arc_easy"], "files": ["Q4_0"]},
        "quantize": {"to": ["Q4_0", "int8"]},
    }
)


ALL = (
    *("dense", "prune", "recover", "evaluate", "export-dense", "export", "answers", "side-by-side"),
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
    monkeypatch.setattr("phoneready.releasing.made_with", lambda: made_with(tmp_path))
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
