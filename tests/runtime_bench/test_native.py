"""The native runner: compiled here from llama.cpp's source, and held against the Python worker."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from greedily import continued

from cfsp.errors import InputError
from cfsp.models.builtin import cache_directory
from exporters.gguf.runtime import Context, open_model, open_vocabulary
from runtime_bench.engines import SessionSettings
from runtime_bench.measuring.measure import run_bench
from runtime_bench.native import build
from runtime_bench.native.build import (
    RUNNER_BACKENDS,
    RUNNER_TARGETS,
    build_runner,
    cpu_features,
    find_toolchain,
    read_build,
    runner_target_for,
)
from runtime_bench.process import exchange, measure_in, run_worker
from runtime_bench.records.jsonl import record_to_json
from runtime_bench.targets.local import Native
from runtime_bench.targets.table import open_target
from runtime_bench.worker import WorkerRequest, WorkerResult
from runtime_bench.workload import BenchSettings, Workload

pytest.importorskip("llama_cpp")

RUNNER_NAME = "phoneready-runner"
WORKLOADS = (
    Workload("load"),
    Workload("pp", n_prompt=24),
    Workload("pp", n_prompt=8, n_depth=16),
    Workload("tg", n_gen=6),
    Workload("ttft", n_prompt=16, n_gen=1),
    Workload("start", n_prompt=16, n_gen=1),
)
SETTINGS = SessionSettings(n_ctx=64, n_threads=1, n_batch=2048, n_ubatch=512)


@pytest.fixture(scope="module")
def model(tiny_gguf: Callable[..., Path]) -> Path:
    return tiny_gguf()


@pytest.fixture(scope="module")
def runner(runner_for: Callable[[str], Path]) -> Path:
    return runner_for("native")


def request(path: Path, workload: Workload, **changes: Any) -> WorkerRequest:
    settings = replace(SETTINGS, n_ctx=workload.n_ctx)
    return WorkerRequest(str(path), "llama.cpp", workload, settings, **changes)


def ask(runner: Path, payload: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(exchange([str(runner)], payload, 120))
    return answer


@pytest.mark.everything
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.test)
def test_it_answers_as_the_python_worker_does(runner: Path, model: Path, workload: Workload) -> None:
    wanted = request(model, workload, samples=1 if workload.opens else 3, page_cache="warm")
    native, python = measure_in([str(runner)], asdict(wanted), 120), run_worker(wanted, 120)
    assert native.error is None
    assert len(native.samples_ns) == len(python.samples_ns)
    assert min(native.samples_ns) > 0
    for name in ("cpu_ns", "waited_ns", "held_ns", "spans_ns"):
        assert len(getattr(native, name)) == len(getattr(python, name)), name
    for (began, ended), ns in zip(native.spans_ns, native.samples_ns, strict=False):
        assert abs(ended - began - ns) < 10**8
    assert native.load_ns is not None
    assert native.page_cache_share == python.page_cache_share == 1.0
    assert native.baseline_rss_bytes is not None
    assert native.peak_rss_bytes is not None
    assert 0 < native.baseline_rss_bytes < native.peak_rss_bytes
    assert native.facts is not None
    assert python.facts is not None
    for name in ("model_type", "model_size", "model_n_params", "backends", "settings"):
        assert getattr(native.facts, name) == getattr(python.facts, name)
    assert native.facts.versions["llama.cpp"] == python.facts.versions["llama.cpp"]


@pytest.mark.everything
def test_its_answer_has_every_field_of_a_result(runner: Path, model: Path) -> None:
    others = (
        "throttling",
        "contention",
        "conditions",
        "energy",
    )  # a browser's, and what is seen from outside
    names = [field.name for field in fields(WorkerResult) if field.name not in others]
    assert list(ask(runner, asdict(request(model, WORKLOADS[1])))) == names
    assert list(ask(runner, asdict(request(Path("nothing.gguf"), WORKLOADS[1])))) == names


@pytest.mark.everything
@pytest.mark.parametrize("cache_type", [None, "q8_0", "q4_0"])
def test_its_cache_is_the_one_that_is_asked_for(
    runner: Path, tiny_gguf: Callable[..., Path], cache_type: str | None
) -> None:
    path = tiny_gguf("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    with open_model(path, Context(n_ctx=64, cache_type=cache_type or "f16")) as opened:
        prompt = opened.tokenize("Once upon a time there was")
        expected = continued(opened, prompt, 24)
    settings = asdict(replace(SETTINGS, cache_type=cache_type))
    wanted = {"prompt": prompt, "max_new_tokens": 24, "stop_at_end": False}
    answer = ask(runner, {"path": str(path), "session": settings, "generate": wanted})
    assert answer["tokens"] == expected
    found = answer["facts"]["settings"]
    assert (found["cache_type"], found["flash_attention"]) == (cache_type or "f16", True)


@pytest.mark.everything
def test_random_tokens_are_those_of_the_python_worker(runner: Path, model: Path) -> None:
    seed = 2**40 + 3
    wanted = {"n_random": 700, "max_new_tokens": 0}
    payload = {
        "path": str(model),
        "session": asdict(replace(SETTINGS, n_ctx=1024)),
        "seed": seed,
        "generate": wanted,
    }
    with open_vocabulary(model) as opened:
        generator, size = random.Random(seed), opened.vocab_size
    assert ask(runner, payload)["prompt"] == [generator.randrange(size) for _ in range(700)]


@pytest.mark.everything
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"path": '/nowhere/it\'s "here"; $(x).gguf'}, '/nowhere/it\'s "here"; $(x).gguf: No such file'),
        ({"path": "/"}, "/ is not a file"),
        ({"engine": "onnxruntime"}, "no engine onnxruntime"),
        ({"page_cache": "frozen"}, "no state of the page cache frozen"),
        ({"workload": {"kind": "sing"}}, "no workload sing"),
        ({"session": {"n_ctx": 8}}, "unreadable request"),
        ({"session": asdict(replace(SETTINGS, cache_type="q2_K"))}, "no type of a cache q2_K"),
        ({"session": asdict(replace(SETTINGS, backend="gpu"))}, "without the backend gpu; it has cpu"),
        (
            {"session": asdict(replace(SETTINGS, backend="vulkan0"))},
            "without the backend vulkan0; it has cpu",
        ),
        ({"session": asdict(replace(SETTINGS, cache_type="q8_0"))}, "does not divide n_embd_head_k=16"),
        (
            {"session": asdict(replace(SETTINGS, n_ctx=8)), "workload": {"kind": "pp", "n_prompt": 300}},
            "context",
        ),
    ],
)
def test_what_cannot_be_measured_is_a_result_with_the_reason(
    runner: Path, model: Path, changes: dict[str, Any], reason: str
) -> None:
    answer = ask(runner, asdict(request(model, WORKLOADS[1])) | changes)
    assert reason in answer["error"]
    assert "\n" not in answer["error"]
    assert not answer["samples_ns"]


@pytest.mark.everything
def test_a_damaged_file_is_named_with_llama_cpps_reason(runner: Path, model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(model.read_bytes()[:5000])
    result = measure_in([str(runner)], asdict(request(damaged, WORKLOADS[1])), 120)
    assert result.error is not None
    assert result.error.startswith(f"llama.cpp cannot load {damaged}: ")
    assert "gave no reason" not in result.error


@pytest.mark.everything
def test_it_says_what_it_is_and_refuses_what_is_no_request(runner: Path) -> None:
    about = json.loads(subprocess.run([runner, "--about"], capture_output=True, check=True).stdout)
    made = read_build(runner)
    assert (about["target"], about["key"], about["missing"]) == ("native", made.key, [])
    assert made.source_sha256
    linked = subprocess.run(["ldd", runner], capture_output=True, text=True, check=False)
    assert "not a dynamic executable" in linked.stdout + linked.stderr
    done = subprocess.run([runner], input=b"{", capture_output=True, check=True)
    assert "unreadable request" in json.loads(done.stdout)["error"]
    assert subprocess.run([runner, "--help"], capture_output=True, check=False).returncode == 2


@pytest.mark.everything
def test_a_damaged_program_is_not_served(
    runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / runner.parent.name
    folder.mkdir()
    for file in runner.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert build.is_whole(folder)
    (folder / runner.name).write_bytes(runner.read_bytes()[:-1])
    assert not build.is_whole(folder)


def test_all_of_its_sources_are_in_a_builds_name() -> None:
    folder = Path(build.__file__).parent
    assert set(build._SOURCES) == {
        file.name for file in folder.iterdir() if file.suffix in (".cpp", ".hpp", ".txt")
    }


def test_an_ndk_is_known_by_its_revision(tmp_path: Path) -> None:
    toolchain = tmp_path / "build" / "cmake" / "android.toolchain.cmake"
    toolchain.parent.mkdir(parents=True)
    toolchain.touch()
    (tmp_path / "source.properties").write_text("Pkg.Desc = Android NDK\nPkg.Revision = 27.2.12479018\n")
    _, options, version = find_toolchain("android-arm64", tmp_path)
    assert version == "NDK 27.2.12479018"
    assert f"-DCMAKE_TOOLCHAIN_FILE={toolchain}" in options


@pytest.mark.parametrize(
    ("target", "ndk", "reason"),
    [
        ("riscv", None, "unknown target"),
        ("native", "ndk", "for Android's targets"),
        ("android-arm64", None, "want the Android NDK"),
        ("android-arm64", "ndk", "not an Android NDK"),
    ],
)
def test_what_cannot_be_built_is_refused(target: str, ndk: str | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        build_runner(target, ndk=None if ndk is None else tmp_path / ndk)


@pytest.mark.parametrize(
    ("system", "machine", "features", "target"),
    [
        ("linux", "aarch64", "fp asimd evtstrm crc32", "aarch64-linux-v8"),
        ("linux", "arm64", "fp asimd atomics asimdhp asimddp", "aarch64-linux"),
        ("android", "aarch64", "fp asimd atomics asimdhp asimddp i8mm bf16 sve2", "android-arm64-i8mm"),
        ("android", "x86_64", "fpu sse4_2 popcnt hypervisor", "android-x86_64"),
    ],
)
def test_a_machine_gets_the_build_that_makes_most_of_it(
    system: str, machine: str, features: str, target: str
) -> None:
    assert runner_target_for(system, machine, features.split()) == target


def test_this_machine_gets_its_own_build_and_one_that_none_is_for_is_named() -> None:
    row = RUNNER_TARGETS["native"]
    assert runner_target_for("linux", row.machine, cpu_features()) == "native"
    with pytest.raises(InputError, match="riscv64 linux"):
        runner_target_for("linux", "riscv64", ["rv64gc"])


@pytest.mark.everything
def test_its_records_are_those_of_the_python_worker(runner: Path, model: Path) -> None:
    settings = BenchSettings(
        check_text=False,
        n_prompt=(24,),
        n_gen=(8,),
        ttft=(16,),
        repetitions=2,
        n_threads=(1,),
        spread_limit=1e9,
        timeout_s=120,
    )
    here, there = run_bench([model], settings), run_bench([model], settings, target=Native(runner))
    for python, native in zip(here, there, strict=True):
        left, right = record_to_json(python), record_to_json(native)
        assert native.ok
        assert (native.kind, native.target) == ("measured", "native")
        # A note says how busy the machine was, which it need not be both times.
        assert {key for key in left if type(left[key]) is not type(right[key])} <= {"note"}
        assert python.peak_rss_bytes is not None
        assert native.peak_rss_bytes is not None
        assert native.peak_rss_bytes < python.peak_rss_bytes


def test_a_given_program_must_be_there_and_runs_gguf_files_only(tmp_path: Path) -> None:
    program = tmp_path / "runner"
    with pytest.raises(InputError, match="runner: no such program"):
        open_target(f"native:runner={program}")
    program.touch()
    target = open_target(f"native:runner={os.path.relpath(program)}")
    assert isinstance(target, Native)
    assert target.command == [str(program)]
    assert target.default_engine(Path("a.GGUF")) == "llama.cpp"
    with pytest.raises(InputError, match="runs GGUF files"):
        target.default_engine(Path("a.onnx"))
    with pytest.raises(InputError, match="runs GGUF files"):
        target.require("onnxruntime")
    result = target.run(request(tmp_path / "a.gguf", WORKLOADS[0]), 10)
    assert "cannot be started" in (result.error or "")


@pytest.mark.everything
@pytest.mark.usefixtures("runner")
def test_a_build_that_fails_quotes_the_compiler_or_says_what_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").symlink_to(cache_directory() / "wheels")
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path))
    monkeypatch.setattr(
        build, "RUNNER_BACKENDS", {"openvino": (("-DGGML_OPENVINO=ON",), "a toolkit of its own")}
    )
    with pytest.raises(
        InputError, match=r"runner for native-openvino failed .*; allowed: a toolkit of its own"
    ):
        build_runner("native", backend="openvino")
    with pytest.raises(InputError, match="unknown backend"):
        build_runner("native", backend="vulkan")
    monkeypatch.setenv("CXX", "c++ --no-such-option")
    with pytest.raises(InputError, match=r"building the runner for native failed .*no-such-option"):
        build_runner("native")
    assert not [path for path in (tmp_path / "runners").iterdir() if path.suffix != ".lock"]


def test_what_drives_a_gpu_is_loaded_when_the_program_runs() -> None:
    for name in RUNNER_BACKENDS:
        row = build.require_target("aarch64-linux", name)
        assert not row.static
        assert row.needs == RUNNER_TARGETS["aarch64-linux"].needs
        assert set(RUNNER_BACKENDS[name][0]) <= set(row.cmake)


def test_an_archive_that_is_not_the_known_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version("llama-cpp-python")
    archive = tmp_path / "wheels" / f"llama_cpp_python-{version}.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"something else")
    monkeypatch.setenv("PHONEREADY_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="is not an archive that is known here") as caught:
        build.fetch_source()
    digest = hashlib.sha256(b"something else").hexdigest()
    assert digest in str(caught.value)
    assert f"or what {build.ALLOWED} says" in str(caught.value)
    monkeypatch.setenv(build.ALLOWED, digest)
    assert build.fetch_source() == build.LlamaSource(archive, version, digest)


@pytest.mark.everything
@pytest.mark.usefixtures("runner")
def test_a_build_that_is_killed_leaves_nothing_to_serve(tmp_path: Path) -> None:
    (tmp_path / "wheels").symlink_to(cache_directory() / "wheels")
    runners = tmp_path / "runners"
    command = [sys.executable, "-m", "phoneready", "devices", "build-runner", "--target", "native"]
    for _ in range(2):
        with subprocess.Popen(
            ["nice", *command],
            env=os.environ | {"PHONEREADY_CACHE": str(tmp_path), "CMAKE_BUILD_PARALLEL_LEVEL": "1"},
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            # The first object file is there.
            assert next((line for line in process.stderr if " of 7" in line), None)
            process.kill()
        names = [path.name for path in runners.iterdir() if not path.name.endswith(".lock")]
        # One unfinished folder, hidden: the second build has removed the first one's.
        assert len(names) == 1
        assert names[0].startswith(".native-")
        assert not list(runners.glob(f"*/{RUNNER_NAME}"))
