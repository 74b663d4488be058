"""What makes a stage of a release run again: a package or code of its own, and nothing that others use."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from cfsp.progress import Progress, no_progress
from exporters.families import FAMILIES
from phoneready.recipe import explain_release, release_stages
from phoneready.release import dependencies
from phoneready.release.stages import claim_folder, run_stages
from phoneready.settings.schema import ReleaseConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ReleaseConfig.model_validate(
    {
        "model": {"reference": "smollm2-135m"},
        "recover": {},
        "evaluate": {"tasks": ["arc_easy"], "files": ["Q4_0"]},
        "export": {"quants": ["Q4_0"], "onnx": ["int8"]},
    }
)
EXPORTED = ("export-dense", "export-pruned", "answers", "side-by-side", "evaluate-files", "bench-local")
ALL = ("dense", "prune", "recover", "evaluate", *EXPORTED)


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


def run_again(folder: Path) -> dict[str, str]:
    return {name: reason for name, reason in explain_release(CONFIG, folder).items() if reason}


@pytest.mark.parametrize(
    ("package", "own"),
    [
        ("onnxruntime", EXPORTED),
        ("onnx-ir", EXPORTED),
        ("llama-cpp-python", EXPORTED),
        ("lm_eval", ("evaluate", "evaluate-files")),
        ("peft", ("recover",)),
        ("accelerate", ("recover",)),
        ("torch", ("dense",)),
        ("onnxruntime-genai", EXPORTED),
        ("plotly", ()),
    ],
)
def test_a_new_version_runs_the_stages_that_use_the_package_and_what_comes_after(
    folder: Path, package: str, own: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_again(folder) == {}
    before = dependencies.installed_version
    monkeypatch.setattr(
        dependencies, "installed_version", lambda name: "99" if name == package else before(name)
    )
    found = run_again(folder)
    named = {name for name, reason in found.items() if f"packages.{package} was " in reason}
    assert named == set(own)
    after = {name for name, reason in found.items() if "has changed" in reason}
    if "recover" in own:
        assert set(found) - named == {"evaluate", *EXPORTED} & after
    elif "dense" in own or package == "llama-cpp-python":  # which writes the text that is pruned on, too
        assert set(found) == set(ALL)
    else:
        assert set(found) == named


@pytest.mark.parametrize(
    ("room", "own"),
    [
        ("cfsp/recovery", {"recover"}),
        ("exporters/onnx", set(EXPORTED)),
        ("cfsp/evaluation", {"evaluate", "answers", "side-by-side", "evaluate-files"}),
        ("runtime_bench/measuring", {"bench-local"}),
        ("phoneready/report", set()),
    ],
)
def test_changed_code_runs_the_stages_that_use_it(
    folder: Path, room: str, own: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dependencies.code_sha256
    monkeypatch.setattr(dependencies, "code_sha256", lambda name: "00" if name == room else before(name))
    assert {name for name, reason in run_again(folder).items() if f"code.{room} was" in reason} == own


def test_what_weights_are_rounded_to_runs_every_stage_and_where_it_is_computed_none(folder: Path) -> None:
    def asked(**changes: str) -> set[str]:
        config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update=changes)})
        return {name for name, reason in explain_release(config, folder).items() if reason}

    assert asked(device="cpu") == set()
    assert asked(dtype="bfloat16") == set(ALL)


def test_metered_energy_measures_again(folder: Path) -> None:
    bench = replace(CONFIG.bench, energy=True)
    config = CONFIG.model_copy(update={"bench": bench})
    assert [name for name, reason in explain_release(config, folder).items() if reason] == ["bench-local"]


def test_the_hash_of_code_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "_ROOT", tmp_path)
    (tmp_path / "room" / "__pycache__").mkdir(parents=True)
    file = tmp_path / "room" / "a.py"
    hashes = set()
    for text, name in (("x = 1", "a.py"), ("x = 2", "a.py"), ("x = 2", "b.py")):
        file.write_text(text, encoding="utf-8")
        file = file.rename(file.with_name(name))
        dependencies.code_sha256.cache_clear()
        hashes.add(dependencies.code_sha256("room"))
    (tmp_path / "room" / "__pycache__" / "b.pyc").write_bytes(b"compiled")
    dependencies.code_sha256.cache_clear()
    assert dependencies.code_sha256("room") in hashes
    assert len(hashes) == 3
    dependencies.code_sha256.cache_clear()


# What begins the work of a stage, and the stages before it.
WORK = {
    "dense": (
        (),
        ("cfsp.models.reference", "cfsp.models.checkpoint", "cfsp.text.calibration", "cfsp.pruning.moments"),
    ),
    "text": (("dense",), ("phoneready.text",)),
    "prune": (("dense",), ("cfsp.pruning.prune",)),
    "recover": (("dense", "prune"), ("cfsp.recovery.recover",)),
    "evaluate": (("dense", "prune"), ("phoneready.evaluation.run",)),
    "export": (("dense", "prune"), ("exporters.gguf.export", "exporters.onnx.export")),
    "answers": (
        ("dense", "prune", "export"),
        ("cfsp.evaluation.answers", "exporters.gguf.language_model", "exporters.onnx.language_model"),
    ),
    "bench": (
        ("dense", "prune", "export", "answers"),
        ("runtime_bench.measuring.measure", "runtime_bench.worker", "runtime_bench.targets.table"),
    ),
}
# Errors, records, declarations, what only asks or shows: they make no figure.
NEUTRAL = (
    *(
        f"cfsp/{name}.py"
        for name in (
            "__init__",
            "errors",
            "files",
            "forecast",
            "memory",
            "plugins",
            "progress",
            "records",
            "scratch",
            "units",
        )
    ),
    *("cfsp/settings.py", "cfsp/validation.py"),
    *(f"exporters/{name}.py" for name in ("__init__", "export_record", "family", "outline", "settings")),
    *(
        f"runtime_bench/{name}"
        for name in ("__init__.py", "records", "devices", "presentation", "questions.py")
    ),
    *("phoneready/__init__.py", "phoneready/console.py", "phoneready/figures"),
)


def imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            yield from files_of(name)


def files_of(module: str) -> Iterator[Path]:
    base = ROOT.joinpath(*module.split("."))
    yield from (file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file())


@pytest.mark.parametrize("kind", WORK)
def test_all_code_of_a_stage_counts_for_it_or_for_a_stage_before_it(kind: str) -> None:
    before, starts = WORK[kind]
    rows = [dependencies.STAGES[name] for name in (*before, kind)]
    rooms = {room for row in rows for room in row.rooms}
    if any(row.families for row in rows):
        rooms |= {f"exporters/{family}" for family in FAMILIES}
    waiting = [file for start in starts for file in files_of(start)]
    assert len(waiting) == len(starts)
    seen: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += imported(file)
    names = {file.relative_to(ROOT).as_posix() for file in seen}
    assert sorted(name for name in names if not name.startswith((*rooms, *NEUTRAL))) == []


def test_all_rooms_are_there() -> None:
    rooms = {room for row in dependencies.STAGES.values() for room in row.rooms}
    assert [room for room in rooms if not (ROOT / room).exists()] == []


def test_a_folder_of_the_version_before_says_why_it_runs_again(folder: Path, tmp_path: Path) -> None:
    """Then the versions of all packages stood in the first stage, and no code."""
    record = json.loads((folder / "stages" / "dense" / "stage.json").read_text(encoding="utf-8"))
    versions = {"torch": "2.6.0", "onnxruntime": "1.23.0"}
    settings = {k: v for k, v in record["settings"].items() if k != "code"} | {"packages": versions}
    record |= {"settings": settings, "key": "00" * 32}
    stage = tmp_path / "stages" / "dense"
    stage.mkdir(parents=True)
    (stage / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    reasons = explain_release(CONFIG, tmp_path)
    assert 'packages.onnxruntime was "1.23.0" and is null' in reasons["dense"]
    assert "code was null and is " in reasons["dense"]


@pytest.mark.parametrize(("sized", "family"), [("int8", "onnx"), ("Q4_0", "gguf")])
def test_a_target_depends_on_the_code_of_the_files_that_it_is_of(
    sized: str, family: str, tmp_path: Path
) -> None:
    asked = {"target_size": "60MB", "for_quant": [sized]}
    config = ReleaseConfig.model_validate({"model": {"reference": "smollm2-135m"}, "prune": asked})
    stages = {stage.name: stage for stage in release_stages(config, tmp_path)}
    code = stages["prune"].settings["code"]
    assert {room for room in code if room in ("exporters/gguf", "exporters/onnx")} == {f"exporters/{family}"}
    assert "phoneready/sizes.py" in code
