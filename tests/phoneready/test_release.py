"""The release from end to end on a tiny model, with the real libraries, and killed on its way."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.files import sha256_file

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

TinyPath = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
[model]
reference = "{model}"
[prune]
prune_ratio = 0.25
calibration = ["builtin:python-docs"]
nsamples = 4
seqlen = 64
[evaluate]
text = ["builtin:python-docs"]
chats = ["chats.jsonl"]
seqlen = 64
max_windows = 2
prompts = ["List three fruits.", "What is 2+2?"]
max_new_tokens = 4
[export]
quants = ["{quants}"]
onnx = ["int8"]
[bench]
n_prompt = [8]
n_gen = [2]
ttft = [4]
n_threads = [1]
repetitions = 5
samples_per_process = 5
devices = ["pixel-8a", "galaxy-s24-ultra"]
[[budgets]]
metric = "file_bytes"
at_most = 0.999
relative_to = "dense"
[[budgets]]
metric = "kl_mean"
on = ["chats"]
at_most = 10.0
[[budgets]]
metric = "projected_memory_bytes"
at_most = "1 GB"
"""
STAGES = ("dense", "prune", "evaluate", "export-dense", "export-pruned", "answers", "bench-local")


def write_config(folder: Path, model: Path, quants: str = "Q8_0") -> Path:
    chat = {"messages": [{"role": r, "content": "List three fruits. " * 4} for r in ("user", "assistant")]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 4, encoding="utf-8")
    path = folder / "release.toml"
    path.write_text(CONFIG.format(model=model, quants='", "'.join(quants.split(","))), encoding="utf-8")
    return path


def start(config: Path, output: Path, *extra: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PHONEREADY_CACHE"] = str(config.parent / "cache")
    line = [
        sys.executable,
        "-m",
        "phoneready",
        "release",
        str(config),
        "-o",
        str(output),
        "--threads",
        "1",
        *extra,
    ]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def states(errors: str) -> dict[str, str]:
    """The last state shown of each stage."""
    shown = [line.split(maxsplit=1) for line in errors.splitlines() if line.split(maxsplit=1)[:1]]
    return {
        name: state.partition(" in ")[0]
        for name, state in (s for s in shown if len(s) == 2)
        if name in STAGES
    }


@pytest.fixture(scope="module")
def released(tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, release folder) of a finished release."""
    folder = tmp_path_factory.mktemp("release")
    config = write_config(folder, tiny_folder(intermediate_size=256))
    process = start(config, folder / "out", "--json")
    output, errors = process.communicate(timeout=800)
    assert process.returncode == 0, errors
    assert states(errors) == dict.fromkeys(STAGES, "finished")
    manifest = json.loads(output)
    assert manifest == json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))
    return config, folder / "out"


@pytest.mark.slow
def test_manifest_and_files_agree(released: tuple[Path, Path]) -> None:
    folder = released[1]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert {file["role"] for file in manifest["files"]} == {"dense", "pruned"}
    assert [(file["format"], file["quant"]) for file in manifest["files"]] == [
        ("gguf", "Q8_0"),
        ("onnx", "int8"),
    ] * 2
    for file in manifest["files"]:
        path = folder / file["file"]
        parts = [path]
        if file["format"] == "onnx":
            graph = path / "onnx" / "model_quantized.onnx"
            parts = [graph, graph.with_suffix(".onnx_data")]
            assert (path / "genai_config.json").is_file()
        assert sum(part.stat().st_size for part in parts) == file["bytes"]
        assert sha256_file(parts[0]) == file["sha256"]
        assert all(part.stat().st_nlink == 2 for part in parts), "a second copy instead of a link"
    assert sum(manifest["widths"]) == 4 * 192
    assert manifest["removed_ffn_share"] == pytest.approx(0.25)
    assert tuple(manifest["stages"]) == STAGES
    assert manifest["source"]["sha256"]
    assert not list(folder.rglob(".*.tmp-*"))


@pytest.mark.slow
def test_the_report_says_what_was_measured_and_how(released: tuple[Path, Path]) -> None:
    report = (released[1] / "report.md").read_text(encoding="utf-8")
    for part in (
        "25.0% of the FFN channels",
        "pp8",
        "tg2",
        "ttft4",
        "peak memory",
        "KL mean",
        "same top-1",
        "builtin:python-docs",
    ):
        assert part in report
    for part in (
        "chats: chats.jsonl",
        "windows of 64 tokens",
        "List three fruits.",
        "## int8: dense and pruned",
        "1 thread",
        "126",
    ):
        assert part in report
    for line in report.splitlines():
        if line.startswith("    phoneready "):
            assert "--seed" in line or "export" in line


@pytest.mark.slow
def test_report_makes_both_reports_again_without_a_model(released: tuple[Path, Path]) -> None:
    folder = released[1]
    before = {name: (folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md")}
    for name in before:
        (folder / name).unlink()
    line = [sys.executable, "-m", "phoneready", "report", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(line, env=environment, check=True, capture_output=True)
    assert {name: (folder / name).read_text(encoding="utf-8") for name in before} == before
    page = before["report.html"]
    for part in (
        "tiny-model-pruned25-Q8_0.gguf",
        "Pixel 8a",
        "kl_mean",
        "builtin:python-docs",
        "budgets met",
    ):
        assert part in page, part


@pytest.mark.slow
def test_a_second_run_repeats_nothing_and_writes_the_same(released: tuple[Path, Path]) -> None:
    config, folder = released
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    process = start(config, folder)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert states(errors) == dict.fromkeys(STAGES, "done before")
    assert "Report: " in output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_files(
    released: tuple[Path, Path], tmp_path: Path
) -> None:
    config, whole = released
    generator, folder = random.Random(0), tmp_path / "out"
    done: set[str] = set()
    for attempt in range(6):
        process = start(config, folder)
        assert process.stderr is not None
        first = process.stderr.readline()  # starting the interpreter takes longest, and nothing happens in it
        time.sleep(generator.uniform(0, 2 + attempt))
        process.kill()
        errors = first + process.communicate(timeout=60)[1]
        assert not {name for name, state in states(errors).items() if state != "done before"} & done
        done = {path.parent.name for path in (folder / "stages").glob("[!.]*/stage.json")}
    process = start(config, folder)
    _, errors = process.communicate(timeout=800)
    assert process.returncode == 0, errors
    assert {name for name, state in states(errors).items() if state == "done before"} == done
    files = [*whole.glob("*.gguf"), *(path for path in whole.glob("*-int8/**/*") if path.is_file())]
    assert len(files) > 4
    for path in files:
        assert sha256_file(folder / path.relative_to(whole)) == sha256_file(path)
    assert not list(folder.rglob(".*.tmp-*"))


@pytest.mark.slow
def test_a_failing_export_names_its_reason_and_leaves_no_file(tiny_folder: TinyPath, tmp_path: Path) -> None:
    model = tiny_folder(intermediate_size=96)
    config = write_config(tmp_path, model)
    config.write_text(
        config.read_text().replace("prune_ratio = 0.25", "prune_ratio = 0.999"), encoding="utf-8"
    )
    process = start(config, tmp_path / "out")
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 2, errors
    assert output == ""
    assert errors.splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "out").glob("*.gguf"))
    assert not list((tmp_path / "out").rglob(".*.tmp-*"))
