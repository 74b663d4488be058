"""The examples of putting a release into an app or a service, run on a release folder as far as this machine can."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cfsp.files import sha256_file
from cfsp.models.checkpoint import CheckpointInfo
from cfsp.models.shape import ModelShape
from phoneready.main import main
from phoneready.publish.contents import describe_files
from phoneready.publish.manifest import ReleasedFile, make_manifest
from phoneready.publish.publish import seal_release
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.jsonl import check_appendable, read_jsonl
from runtime_bench.workload import BenchSettings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GROOVY = EXAMPLES / "android" / "buildSrc" / "src" / "main" / "groovy" / "ReleasedModel.groovy"


@pytest.fixture(scope="module")
def gguf(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


@pytest.fixture
def release(gguf: Path, make_report_input: Callable[..., Any], tmp_path: Path) -> Path:
    """A sealed release with one GGUF file and one ONNX folder, at a path that a careless script trips over."""
    folder = tmp_path / "a release's $(folder)"
    onnx = folder / "tiny-int4" / "onnx"
    onnx.mkdir(parents=True)
    shutil.copy(gguf, folder / "tiny-Q8_0.gguf")
    (onnx / "model_q4.onnx").write_bytes(b"graph")
    (onnx / "model_q4.onnx_data").write_bytes(b"weights")
    (folder / "tiny-int4" / "tokenizer.json").write_text("{}", encoding="utf-8")
    report = make_report_input("tiny")
    info = CheckpointInfo(
        report.figures.source, ModelShape.of_ffn_widths((128,)), None, "0" * 64, "float32", {}, 0
    )
    files = tuple(
        ReleasedFile(name, "pruned", kind, quant, "llama", 1, sha256_file(folder / name / inside))
        for name, kind, quant, inside in (
            ("tiny-Q8_0.gguf", "gguf", "Q8_0", ""),
            ("tiny-int4", "onnx", "int4", "onnx/model_q4.onnx"),
        )
    )
    contents = describe_files(folder, [file.file for file in files], {})
    manifest = make_manifest(report.config, report.figures, info, [])
    seal_release(folder, replace(manifest, files=files, contents=contents))
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expected(release: Path, name: str) -> dict[str, bytes]:
    return {path: data for path, data in files_in(release).items() if path.partition("/")[0] == name}


def spoil(release: Path) -> None:
    path = release / "tiny-int4" / "onnx" / "model_q4.onnx_data"
    path.write_bytes(path.read_bytes() + b"!")


def build_phase(release: Path, folder: Path, quant: str) -> subprocess.CompletedProcess[str]:
    """The build phase as Xcode runs it."""
    variables = {
        "SRCROOT": str(EXAMPLES / "ios"),
        "TARGET_BUILD_DIR": str(folder / "Build Products"),
        "UNLOCALIZED_RESOURCES_FOLDER_PATH": "My App.app",
        "MODEL_RELEASE": str(release),
        "MODEL_QUANT": quant,
    }
    command = ["/bin/sh", "-c", '"$SRCROOT/copy_model.sh"']
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_xcode_build_phase_places_the_chosen_model_once(release: Path, tmp_path: Path) -> None:
    models = tmp_path / "Build Products" / "My App.app" / "Models"
    for quant, name in (("Q8_0", "tiny-Q8_0.gguf"), ("int4", "tiny-int4")):
        result = build_phase(release, tmp_path, quant)
        assert result.returncode == 0, result.stderr
        assert expected(release, name) == expected(models, name)
    assert build_phase(release, tmp_path, "int4").stdout == "", "copied again"
    result = build_phase(release, tmp_path, "Q2_K")
    assert result.returncode == 1
    assert "error: " in result.stderr
    shutil.rmtree(models)
    spoil(release)
    result = build_phase(release, tmp_path, "int4")
    assert result.returncode == 1
    assert "is not the released file" in result.stderr
    assert not [path for path in files_in(models) if path.endswith((".part", "onnx_data"))]


@pytest.mark.skipif(shutil.which("groovy") is None, reason="no groovy here (Debian's package groovy)")
def test_the_logic_of_the_gradle_task_places_the_chosen_model(release: Path, tmp_path: Path) -> None:
    assets = tmp_path / "assets"

    def place(quant: str) -> subprocess.CompletedProcess[str]:
        command = ["groovy", str(GROOVY), str(release), quant, str(assets)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for quant, name in (("Q8_0", "tiny-Q8_0.gguf"), ("int4", "tiny-int4")):
        result = place(quant)
        assert result.returncode == 0, result.stderr
        assert files_in(assets) == expected(release, name), "the other model has to go"
    result = place("Q2_K")
    assert (result.returncode, result.stderr) == (1, "error: no Q2_K in the release; there are Q8_0, int4\n")
    spoil(release)
    result = place("int4")
    assert result.returncode == 1
    assert "is not the released file" in result.stderr


@pytest.mark.skipif(shutil.which("gradle") is None, reason="no Gradle here")
def test_gradle_runs_the_task(release: Path, tmp_path: Path) -> None:
    project = tmp_path / "android"
    shutil.copytree(EXAMPLES / "android", project)
    command = ["gradle", "--quiet", "--configure-on-demand", ":model:placeModel"]
    command += [f"-PmodelRelease={release}", "-PmodelQuant=int4"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if "com.android." in result.stderr and "was not found" in result.stderr:
        pytest.skip("Gradle cannot fetch the Android plugin")
    assert result.returncode == 0, result.stderr
    assert files_in(project / "model" / "src" / "main" / "assets") == expected(release, "tiny-int4")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("swift") is None, reason="no Swift here (Debian's package swiftlang)")
def test_the_swift_package_measures_what_bench_measures(
    tiny_gguf: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled here without what Apple's systems alone have, and linked to the llama.cpp that Python runs."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    libraries = Path(llama_cpp.__file__).parent / "lib"
    include = libraries.parents[1] / "include"
    package, build = tmp_path / "PhonereadyBench", tmp_path / "build"
    shutil.copytree(EXAMPLES / "ios" / "PhonereadyBench", package)
    flags = [
        "-Xcc",
        f"-I{include}",
        "-Xlinker",
        f"-L{libraries}",
        "-Xlinker",
        "-rpath",
        "-Xlinker",
        libraries,
    ]
    flags += ["--package-path", package, "--scratch-path", build, "-j", "1"]

    def swift(*words: str) -> str:
        done = subprocess.run(
            ["swift", *words, *map(str, flags)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    release = ("-c", "release", "-Xswiftc", "-enable-testing")
    swift("build", "--build-tests", *release)
    assert "Executed 1 test, with 0 failures" in swift("test", "--skip-build", *release)
    models = [tmp_path / "dense.gguf", tmp_path / "pruned.gguf"]
    for path, width in zip(models, (128, 64), strict=True):
        shutil.copy(tiny_gguf(intermediate_size=width), path)
    records = tmp_path / "phone.jsonl"

    def measure(*words: object) -> subprocess.CompletedProcess[str]:
        command = [build / "release" / "phoneready-bench", *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    sizes = ("--pp", 8, "--tg", 4, "--ttft", 6, "--threads", 1)
    done = measure(records, *models, *sizes, "--rounds", 5, "--samples", 2)
    assert (done.returncode, done.stderr) == (0, "")
    rows = read_jsonl(records)
    assert [(row.test, row.model_filename) for row in rows] == [
        (f"{test} @ warm", path.name) for test in ("pp8", "tg4", "ttft6") for path in models
    ]
    assert all(len(row.samples_ns) == len(row.cpu_samples_ns) == 10 for row in rows)
    assert [len(set(row.rounds)) for row in rows] == [5] * len(rows)
    assert [len(row.peak_rss_samples_bytes) for row in rows] == [1, 0, 0, 0, 0, 0]
    assert all(len(row.load_samples_ns) == len(row.conditions) == 5 for row in rows)
    settings = BenchSettings(
        n_prompt=(8,), n_gen=(4,), ttft=(6,), regimes=("warm",), n_threads=(1,), repetitions=3,
        samples_per_process=3, check_text=False,
    )  # fmt: skip
    for ours, theirs in zip(rows[::2], run_bench(models[:1], settings), strict=True):
        same = ("test", "engine", "kind", "model_type", "model_size", "model_n_params", "file_size_bytes")
        same += ("backends", "n_batch", "n_ubatch", "n_threads", "warmup", "regime", "n_prompt", "n_gen")
        assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
        assert ours.engine_settings.weight_buffers == theirs.engine_settings.weight_buffers
        assert ours.engine_settings.flash_attention == theirs.engine_settings.flash_attention
        assert ours.environment.cpu_model == theirs.environment.cpu_model
    assert main(["compare", str(records)]) == 0
    shown = capsys.readouterr().out
    assert all(f"{test} @ warm" in shown for test in ("pp8", "tg4", "ttft6"))
    before = records.read_bytes()
    for words, problem in {
        (records, tmp_path / "nowhere.gguf"): "cannot read",
        (records, models[0], models[0]): "two files have one name",
        (records, models[0], "--tg", "none"): "--tg: wants a number above 0 (got 'none')",
        (records, Path(__file__)): "llama.cpp cannot load",
    }.items():
        done = measure(*words)
        assert (done.returncode, done.stderr.count("\n"), problem in done.stderr) == (2, 1, True), done.stderr
    assert records.read_bytes() == before
    records.write_bytes(before[:-20])
    assert (
        measure(records, models[0], "--tg", 2, "--rounds", 1, "--samples", 1, "--threads", 1).returncode == 0
    )
    assert [row.test for row in read_jsonl(records)][5:] == ["tg2 @ warm"], "the torn line is lost alone"
    check_appendable(records)


def ask(url: str, payload: object | None = None) -> Any:
    data = None if payload is None else json.dumps(payload).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=120) as response:
        return json.load(response)


def test_the_service_checks_and_serves_the_released_file(release: Path) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    command = [sys.executable, str(EXAMPLES / "python_service" / "serve.py"), str(release), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [*command, "--quant", "Q8_0", "--context", "128"], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        match = re.fullmatch(r"tiny-Q8_0\.gguf on (http://127\.0\.0\.1:\d+)\n", said)
        assert match is not None, said
        assert ask(f"{match[1]}/health") == {"status": "ok", "model": "tiny-Q8_0.gguf"}
        chat = {"messages": [{"role": "user", "content": "List three fruits."}], "max_tokens": 4}
        answer = ask(f"{match[1]}/v1/chat/completions", chat)
        assert isinstance(answer["choices"][0]["message"]["content"], str)
        assert 0 < answer["usage"]["completion_tokens"] <= 4
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(f"{match[1]}/v1/chat/completions", {"messages": "no"})
    finally:
        process.terminate()
        process.wait(timeout=60)
    with (release / "tiny-Q8_0.gguf").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x07")
    for quant, reason in (("Q8_0", "is not the released file"), ("Q2_K", "no Q2_K in the release")):
        result = subprocess.run(
            [*command, "--quant", quant], capture_output=True, text=True, env=environment, check=False
        )
        assert result.returncode == 1
        assert reason in result.stderr
