"""The Swift package: compiled without what Apple's systems alone have, and linked to the llama.cpp that Python runs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from phoneready.main import main
from runtime_bench.measuring.measure import run_bench
from runtime_bench.records.jsonl import check_appendable, read_jsonl
from runtime_bench.workload import BenchSettings

pytestmark = pytest.mark.everything
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the package's programs, whose own tests have passed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    if shutil.which("swift") is None:
        pytest.skip("no Swift here (Debian's package swiftlang)")
    libraries = Path(llama_cpp.__file__).parent / "lib"
    include = libraries.parents[1] / "include"
    folder = tmp_path_factory.mktemp("swift")
    package, build = folder / "PhonereadyBench", folder / "build"
    shutil.copytree(EXAMPLES / "ios" / "PhonereadyBench", package)
    linked = (f"-L{libraries}", "-rpath", libraries)
    flags = ["-Xcc", f"-I{include}", *(word for part in linked for word in ("-Xlinker", part))]
    flags += ["--package-path", package, "--scratch-path", build, "-j", "1"]

    def swift(*words: str) -> str:
        done = subprocess.run(
            ["swift", *words, *map(str, flags)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    release = ("-c", "release", "-Xswiftc", "-enable-testing")
    swift("build", "--build-tests", *release)
    assert "Executed 2 tests, with 0 failures" in swift("test", "--skip-build", *release)
    return build / "release"


def test_it_measures_what_bench_measures(
    programs: Path, tiny_gguf: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [tmp_path / "dense.gguf", tmp_path / "pruned.gguf"]
    for path, width in zip(models, (128, 64), strict=True):
        shutil.copy(tiny_gguf(intermediate_size=width), path)
    records = tmp_path / "phone.jsonl"

    def measure(*words: object) -> subprocess.CompletedProcess[str]:
        command = [programs / "phoneready-bench", *words]
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


def test_it_answers_as_llama_cpp_does(
    programs: Path, smollm2_gguf: Path, llama_cpp_answers: Callable[..., list[str]]
) -> None:
    def chat(*words: object, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [programs / "phoneready-chat", *words]
        return subprocess.run(
            list(map(str, command)), input=text, capture_output=True, text=True, check=False
        )

    asked = ["What is 'thank you' in Japanese? Answer in Japanese only.", "Name a fruit."]
    first = [("system", "You are a helpful assistant."), ("user", asked[0])]
    [said] = llama_cpp_answers(smollm2_gguf, 512, first)
    second = [*first, ("assistant", said), ("user", asked[1])]
    known = llama_cpp_answers(smollm2_gguf, 512, first, second)
    done = chat(smollm2_gguf, 512, text="".join(f"{line}\n" for line in asked))
    assert (done.returncode, done.stdout, done.stderr) == (0, "".join(f"{text}\n" for text in known), "")
    for words, problem in {
        (smollm2_gguf, 10**6): "the model has learnt contexts of up to 8192 tokens",
        (smollm2_gguf, 0): "contextTokens and threads are above 0",
        ("none.gguf",): "cannot read ",
        (Path(__file__),): "cannot load test_ios.py: gguf_init",
        (): "wants a model",
    }.items():
        done = chat(*words)
        assert (done.returncode, done.stderr.count("\n"), problem in done.stderr) == (2, 1, True), done.stderr
