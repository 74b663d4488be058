"""`phoneready quantize --to` with what it cannot use: one line, a status, and nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import safetensors.torch

from phoneready.main import main

pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

ROOT = Path(__file__).resolve().parents[2]
Refused = Callable[..., str]
ONE = ["--threads", "1"]


def change_weights(folder: Path) -> None:
    """A block narrower than its plan, only in the weights."""
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


def test_weights_that_are_not_their_plans_are_refused(pruned: Path, tmp_path: Path, refused: Refused) -> None:
    for change, reason in (
        (change_weights, "model.layers.1.mlp.up_proj"),
        (change_plan, "is not the plan that these weights were made with"),
        (change_widths, "model.layers.1.mlp"),
    ):
        copy = Path(shutil.copytree(pruned, tmp_path / "copy"))
        change(copy)
        assert reason in refused("quantize", copy, "-o", tmp_path / "out", "--to", "fp32", *ONE)
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]
        shutil.rmtree(copy)


def test_what_cannot_be_exported_leaves_what_was_there(
    pruned: Path, tmp_path: Path, refused: Refused
) -> None:
    out = tmp_path / "out"
    # Next-token distributions of random weights are nearly flat, so four bits move them beyond any limit.
    options = ["--to", "fp32,int4", "--calibration", "none", *ONE]
    message = refused("quantize", pruned, "-o", out, *options, status=1)
    assert "int4 (model_q4.onnx) is too far from the checkpoint" in message
    assert "its limit" in message
    said = refused("quantize", pruned, "-o", out, "--to", "int8-dynamic", "--set", "opset=13", *ONE)
    assert "opset" in said
    assert "ReduceMax with 2 inputs" in said
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    assert "--force" in refused("quantize", pruned, "-o", out, "--to", "fp32", *ONE)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_older_opset_gives_a_file_that_older_runtimes_read(pruned: Path, tmp_path: Path) -> None:
    options = ["-o", str(tmp_path / "out"), "--to", "fp32", "--set", "opset=13", *ONE]
    assert main(["quantize", str(pruned), *options]) == 0
    graph = onnx.load(tmp_path / "out" / "fp32" / "onnx" / "model.onnx", load_external_data=False)
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 13
    assert graph.ir_version == 7


@pytest.mark.parametrize(
    ("package", "line"),
    [
        ("onnxruntime", "quantize MODEL -o OUT --to fp32"),
        ("onnx_ir", "quantize MODEL -o OUT --to fp32"),
        ("optimum", "quantize MODEL -o OUT --to portable"),
        ("onnxruntime_genai", "bench GRAPH --engine onnxruntime-genai"),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra(
    package: str, line: str, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, place=None: None if name.partition(".")[0] == package else find(name, place),
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "model.onnx").touch()
    places = {"MODEL": pruned, "OUT": tmp_path / "out", "GRAPH": tmp_path / "model.onnx"}
    said = refused(*(places.get(word, word) for word in line.split()))
    assert "is not installed; run: pip install 'phoneready[" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("stop", [pytest.param(signal.SIGINT, marks=pytest.mark.everything), signal.SIGKILL])
def test_an_interrupted_export_leaves_no_output(stop: int, pruned: Path, tmp_path: Path) -> None:
    """Stopped once it has written a graph; what a kill leaves, the next run clears."""
    output = tmp_path / "out"
    line = [sys.executable, "-m", "phoneready", "quantize", str(pruned), "-o", str(output), *ONE]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [*line, "--to", "fp32,fp16,int8,int8-dynamic"], stdout=-1, stderr=-1, text=True, env=environment
    ) as process:
        while not any(tmp_path.glob(".out.tmp-*/fp32/onnx/*.onnx")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
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
    assert main(["quantize", str(pruned), "-o", str(output), "--to", "fp32", *ONE]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
