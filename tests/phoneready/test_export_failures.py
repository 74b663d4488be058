"""`phoneready export --onnx` with what it cannot use: one line, a status, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch

from phoneready.main import main

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

ROOT = Path(__file__).resolve().parents[2]
TinyPath = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: TinyPath, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pruned by the command; do not change it in a test."""
    folder = tmp_path_factory.mktemp("pruned") / "checkpoint"
    sizes = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32", "--align", "1"]
    assert main(["prune", str(tiny_folder()), "-o", str(folder), "--prune-ratio", "0.25", *sizes]) == 0
    return folder


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """(exit status, what stderr says in its one line)."""
    capsys.readouterr()
    status = main(["export", *map(str, arguments), "--threads", "1"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return status, captured.err


def change_weights(folder: Path) -> None:
    """A block narrower than its plan, in the weights alone."""
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].clone()
    safetensors.torch.save_file(tensors, file)


def change_plan(folder: Path) -> None:
    """A plan that was edited after its weights were cut."""
    file = folder / "pruning_plan.json"
    plan = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(plan | {"seed": plan["seed"] + 1}), encoding="utf-8")


def change_widths(folder: Path) -> None:
    """A config that tells other widths than the weights have."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["per_layer_config"]["1"]["intermediate_size"] -= 8
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_weights, "model.layers.1.mlp.up_proj"),
        (change_plan, "is not the plan that these weights were made with"),
        (change_widths, "model.layers.1.mlp"),
    ],
)
def test_weights_that_are_not_their_plans_are_refused(
    change: Callable[[Path], None],
    reason: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    change(copy)
    status, message = fails(capsys, copy, "-o", tmp_path / "out", "--onnx", "fp32")
    assert status == 2
    assert reason in message
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_variant_beyond_its_limit_fails_the_whole_export(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Next-token distributions of random weights are nearly flat, so four bits move them beyond any limit."""
    options = ["--onnx", "fp32,int4", "--calibration", "none"]
    status, message = fails(capsys, checkpoint, "-o", tmp_path / "out", *options)
    assert status == 1
    assert "int4 (model_q4.onnx) is too far from the checkpoint" in message
    assert "its limit" in message
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    status, message = fails(capsys, checkpoint, "-o", tmp_path / "out", "--onnx", "fp32")
    assert status == 2
    assert "--force" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def command(*arguments: object, without: str = "") -> list[str]:
    """The command in a process of its own, which cannot find a package where one is named."""
    code = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {without!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, p=None: None if n.partition('.')[0] == {without!r} else find(n, p)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from phoneready.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("variant", "opset", "reason"),
    [
        ("int8-dynamic", 13, "ReduceMax with 2 inputs"),
        ("fp32", 12, "13 to"),
        ("fp32", 99, "13 to"),
    ],
)
def test_an_operator_that_an_opset_lacks_is_named(
    variant: str,
    opset: int,
    reason: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--onnx", variant, "--opset", opset]
    status, message = fails(capsys, checkpoint, "-o", tmp_path / "out", *options)
    assert status == 2
    assert "opset" in message
    assert reason in message
    assert not list(tmp_path.iterdir())


def test_an_older_opset_gives_a_file_that_older_runtimes_read(checkpoint: Path, tmp_path: Path) -> None:
    options = ["-o", str(tmp_path / "out"), "--onnx", "fp32", "--opset", "13", "--threads", "1"]
    assert main(["export", str(checkpoint), *options]) == 0
    graph = onnx.load(tmp_path / "out" / "fp32" / "onnx" / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 13
    assert graph.ir_version == 7


@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("onnxruntime", ["export", "CHECKPOINT", "-o", "OUT", "--onnx", "fp32"]),
        ("onnx_ir", ["export", "CHECKPOINT", "-o", "OUT", "--onnx", "fp32"]),
        ("optimum", ["export", "CHECKPOINT", "-o", "OUT", "--onnx", "portable"]),
        ("onnxruntime_genai", ["bench", "GRAPH", "--engine", "onnxruntime-genai"]),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    package: str,
    arguments: list[str],
    checkpoint: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    graph = tmp_path_factory.mktemp("graph") / "model.onnx"
    graph.touch()
    places = {"CHECKPOINT": checkpoint, "OUT": tmp_path / "out", "GRAPH": graph}
    line = command(*(places.get(word, word) for word in arguments), without=package)
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2
    assert done.stdout == ""
    assert "is not installed; run: pip install 'phoneready[" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_output(stop: int, checkpoint: Path, tmp_path: Path) -> None:
    """Stopped once it has written a graph; what a kill leaves, the next run clears."""
    output = tmp_path / "out"
    line = command(
        "export", checkpoint, "-o", output, "--onnx", "fp32,fp16,int8,int8-dynamic", "--threads", "1"
    )
    with subprocess.Popen(line, stdout=-1, stderr=-1, text=True, env=environment()) as process:
        wait_for(lambda: any(tmp_path.glob(".out.tmp-*/fp32/onnx/*.onnx")), process)
        process.send_signal(stop)
        out, errors = process.communicate()
    assert not output.exists()
    assert out == ""
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "error: interrupted"
        assert not list(tmp_path.iterdir())
    else:
        assert process.returncode == -signal.SIGKILL
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left[0] == ".out.lock"
        assert [name.startswith(".out.tmp-") for name in left[1:]] == [True]
    assert main(["export", str(checkpoint), "-o", str(output), "--onnx", "fp32", "--threads", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
