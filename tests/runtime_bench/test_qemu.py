"""The runner for 64-bit Arm under qemu-user: it answers what this machine answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from greedily import continued

from cfsp.errors import InputError
from exporters.gguf.matrix import quantize
from exporters.gguf.runtime import Context, open_model
from runtime_bench.engines import SessionSettings
from runtime_bench.process import exchange
from runtime_bench.records.jsonl import read_jsonl
from runtime_bench.targets.local import EMULATED_RUNNER, EMULATORS, QemuAarch64, qemu_aarch64

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.everything

SETTINGS = SessionSettings(n_ctx=64, n_threads=1, n_batch=2048, n_ubatch=512)
Q8_0 = 7


@pytest.fixture(scope="module")
def target(runner_for: Callable[[str], Path]) -> QemuAarch64:
    if not any(map(shutil.which, EMULATORS)):
        pytest.skip("qemu-user is not installed (make debian)")
    runner_for(EMULATED_RUNNER)
    return qemu_aarch64()


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


def generate(command: list[str], path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    payload = {"path": str(path), "session": asdict(SETTINGS), "generate": wanted}
    answer: dict[str, Any] = json.loads(exchange(command, payload, 300))
    return answer


def test_it_generates_what_this_machine_generates(
    target: QemuAarch64, runner_for: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "quantized.gguf"
    quantize(model, quantized, Q8_0)
    for path in (model, quantized):
        with open_model(path, Context(n_ctx=64)) as opened:
            prompt = opened.tokenize("The capital of France is")
            expected = continued(opened, prompt, 16)
        wanted = {"prompt": prompt, "max_new_tokens": 16, "stop_at_end": False}
        assert len(set(expected)) > 3
        for command in ([str(runner_for("native"))], target.command):
            assert generate(command, path, wanted)["tokens"] == expected


def test_bench_gives_emulated_records_that_show_no_speed(
    target: QemuAarch64, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "phoneready", "bench", str(model), "--on", "qemu-aarch64"]
    command += [
        "-p",
        "8",
        "-n",
        "2",
        "--set",
        "ttft=4",
        "-r",
        "1",
        "-t",
        "1",
        "--record",
        str(tmp_path / "rows"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert " ms " not in done.stdout
    assert "its times say nothing" in done.stdout
    records = read_jsonl(tmp_path / "rows")
    assert [record.test for record in records] == ["load", "pp8", "tg2", "ttft4"]
    for record in records:
        assert (record.kind, record.target, record.status) == ("emulated", "qemu-aarch64", "ok")
        assert record.peak_rss_bytes is None
        assert len(record.samples_ns) == 1
        assert record.environment.system_info is not None
        assert "DOTPROD = 1" in record.environment.system_info


def test_a_missing_file_is_a_failed_result(target: QemuAarch64) -> None:
    answer = generate(target.command, Path("/nowhere.gguf"), {"prompt": [1], "max_new_tokens": 1})
    assert "/nowhere.gguf" in answer["error"]


def test_other_engines_are_refused(target: QemuAarch64) -> None:
    with pytest.raises(InputError, match="runs GGUF files"):
        target.require("onnxruntime")


def test_a_processor_without_its_features_is_told_so(target: QemuAarch64, model: Path) -> None:
    old = [target.emulator, "-cpu", "cortex-a53", str(target.runner)]
    answer = generate(old, model, {"prompt": [1], "max_new_tokens": 1})
    assert "built for aarch64-linux and this processor lacks asimddp" in answer["error"]
