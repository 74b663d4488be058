"""The runner for 64-bit Arm under qemu-user: it answers what this machine answers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.errors import InputError
from exporters.gguf.llama_library import quantize
from exporters.gguf.runtime import open_model
from runtime_bench.engines import SessionSettings
from runtime_bench.native.run import generate_tokens, generation_request
from runtime_bench.records.jsonl import read_jsonl
from runtime_bench.targets.qemu import EMULATORS, RUNNER, QemuAarch64, qemu_aarch64

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

SETTINGS = SessionSettings(n_ctx=64, n_threads=1, n_batch=2048, n_ubatch=512)
Q8_0 = 7


@pytest.fixture(scope="module")
def target(runner_for: Callable[[str], Path]) -> QemuAarch64:
    if not any(map(shutil.which, EMULATORS)):
        pytest.skip("qemu-user is not installed (make debian)")
    runner_for(RUNNER)
    return qemu_aarch64()


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


def test_it_generates_what_this_machine_generates(
    target: QemuAarch64, runner_for: Callable[[str], Path], model: Path, tmp_path: Path
) -> None:
    quantized = tmp_path / "quantized.gguf"
    quantize(model, quantized, Q8_0)
    for path in (model, quantized):
        with open_model(path, n_ctx=64) as opened:
            prompt = opened.tokenize("The capital of France is")
            expected = opened.generate(prompt, 16, stop_at_end=False)
        wanted = generation_request(str(path), SETTINGS, prompt, 16, stop_at_end=False)
        assert len(set(expected)) > 3
        assert generate_tokens([str(runner_for("native"))], wanted, 120) == expected
        assert generate_tokens(target.command, wanted, 300) == expected


def test_bench_gives_emulated_records_that_show_no_speed(
    target: QemuAarch64, model: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "phoneready", "bench", str(model), "--on", "qemu-aarch64"]
    command += ["-p", "8", "-n", "2", "--ttft", "4", "-r", "1", "-t", "1", "--record", str(tmp_path / "rows")]
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
    wanted = generation_request("/nowhere.gguf", SETTINGS, [1], 1)
    with pytest.raises(InputError, match=r"/nowhere\.gguf"):
        generate_tokens(target.command, wanted, 120)


def test_other_engines_are_refused(target: QemuAarch64) -> None:
    with pytest.raises(InputError, match="runs GGUF files"):
        target.require("onnxruntime")


def test_a_processor_without_its_features_is_told_so(target: QemuAarch64, model: Path) -> None:
    old = [target.emulator, "-cpu", "cortex-a53", str(target.runner)]
    wanted = generation_request(str(model), SETTINGS, [1], 1)
    with pytest.raises(InputError, match="built for aarch64-linux and this processor lacks asimddp"):
        generate_tokens(old, wanted, 120)
