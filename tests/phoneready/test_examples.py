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
from phoneready.publish.manifest import ReleasedFile, describe_files, make_manifest
from phoneready.publish.publish import seal_release

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
        ReleasedFile(name, "shipped", kind, quant, "llama", 1, sha256_file(folder / name / inside))
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


@pytest.mark.everything
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
        assert (
            ask(f"{match[1]}/v1/chat/completions", chat | {"max_tokens": -1})["usage"]["completion_tokens"]
            == 1
        )
        answer = ask(f"{match[1]}/v1/chat/completions", chat)
        assert isinstance(answer["choices"][0]["message"]["content"], str)
        assert 0 < answer["usage"]["completion_tokens"] <= 4
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(f"{match[1]}/v1/chat/completions", {"messages": "no"})
        long = {"messages": [{"role": "user", "content": "fruit " * 500}]}
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            ask(f"{match[1]}/v1/chat/completions", long)
        assert "context" in json.load(caught.value)["error"]
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
