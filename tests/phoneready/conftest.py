"""A release's records made by hand, and a browser, for the reports."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cfsp.evaluation.loss import Distance
from cfsp.models.shape import ModelShape
from cfsp.models.source import ModelSource
from cfsp.pruning.plan import BlockPlan, PruningPlan
from cfsp.pruning.settings import PruneSettings
from exporters.export_record import ExportRecord, ParityReport
from phoneready.evaluation.evaluation_record import Degeneration, Evaluation, ModelIdentity, TextLoss
from phoneready.figures.figures import BudgetVerdict, Verdicts
from phoneready.main import main
from phoneready.release.results import ReleaseFigures
from phoneready.release.steps import Answers, FileLosses
from phoneready.report.report import ReportInput
from phoneready.settings.schema import ReleaseConfig
from runtime_bench.devices import ModelFacts, load_profiles
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.workload import Workload

ROOT = Path(__file__).resolve().parents[2]
MakeReportInput = Callable[..., ReportInput]
SMALL_RELEASE = """
[model]
reference = "{model}"
[prune]
prune_ratio = 0.25
calibration = ["builtin:python-docs"]
nsamples = 4
seqlen = 64
[evaluate]
text = ["builtin:python-docs"]
chats = []
seqlen = 32
max_windows = 2
max_new_tokens = 2
prompts = ["List three fruits."]
[quantize]
to = ["Q8_0"]
[bench]
n_prompt = [8]
n_gen = [2]
ttft = [4]
n_threads = [1]
repetitions = 1
check_text = false
"""
"""A configuration of a release that takes seconds of a tiny model."""
BLOCKS, DENSE_WIDTH = 6, 256
BuildOnce = Callable[[str, Callable[[Path], int]], Path]
SMALL = [
    "--calibration",
    "builtin:python-docs",
    "--set",
    "nsamples=2",
    "--set",
    "seqlen=32",
    "--set",
    "align=1",
]

_TASK = """task: fruits
dataset_path: json
dataset_kwargs: {data_files: {validation: fruits.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""


@pytest.fixture(scope="session")
def dense(tiny_folder: Callable[..., Path]) -> str:
    """Folder of a tiny model. As the three below, it is not to be changed."""
    return str(tiny_folder())


@pytest.fixture(scope="session")
def pruned(dense: str, build_once: BuildOnce) -> Path:
    """The dense model without a quarter of its channels, as the command prunes it."""
    asked = ["prune", dense, "--prune-ratio", "0.25", *SMALL]
    return build_once("pruned", lambda folder: main([*asked, "-o", str(folder)]))


@pytest.fixture(scope="session")
def trimmed(dense: str, build_once: BuildOnce) -> Path:
    """The dense model with 300 of its tokens."""
    asked = ["prune", dense, "--prune-ratio", "0", "--vocabulary", "300", *SMALL]
    return build_once("trimmed", lambda folder: main([*asked, "-o", str(folder)]))


@pytest.fixture(scope="session")
def dense_onnx(dense: str, build_once: BuildOnce) -> str:
    """Folder of the dense model's float32 ONNX variant."""
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    asked = ["quantize", dense, "--to", "fp32", "--threads", "1", "--text", "none"]
    return str(build_once("dense-onnx", lambda folder: main([*asked, "-o", str(folder)])) / "fp32")


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`shown("eval", MODEL, ...)`: what a command that succeeds writes with --json."""

    def run(*arguments: object) -> Any:
        capsys.readouterr()
        status = main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused("eval", MODEL, ..., status=2)`: the only line that a command that fails writes to stderr."""

    def run(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        assert main([*map(str, arguments)]) == status
        captured = capsys.readouterr()
        assert captured.err.startswith("error: "), captured.err
        assert captured.err.count("\n") == 1, captured.err
        assert status != 2 or captured.out == ""
        return captured.err

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as session:
        chromium = session.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def small_release(tmp_path: Path) -> Callable[..., Path]:
    """`small_release(model, change, ...)` writes a release.toml; a change is (line, other line), or text to add."""

    def write(model: Path, *changes: str | tuple[str, str]) -> Path:
        text = SMALL_RELEASE.format(model=model)
        for change in changes:
            assert isinstance(change, str) or change[0] in text
            text = text + change if isinstance(change, str) else text.replace(*change)
        path = tmp_path / "release.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    """`script("benchmarks/kill_release")`: a script of the repository, imported."""
    before = list(sys.path)

    def load(place: str) -> ModuleType:
        file = ROOT / f"{place}.py"
        sys.path.insert(0, str(file.parent))
        return importlib.import_module(file.stem)

    yield load
    sys.path[:] = before


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file of ten questions, its data beside it."""
    lazy = ["the lazy dog " * times for times in (1, 2, 3)]
    rows = [
        {"goal": f"list {i} fruits", "sol1": "an apple", "sol2": lazy[i % 3], "label": i % 2}
        for i in range(10)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "fruits.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "fruits.yaml").write_text(_TASK, encoding="utf-8")
    return tmp_path / "fruits.yaml"


@pytest.fixture
def make_report_input(make_record: Callable[..., BenchRecord]) -> MakeReportInput:
    """`make_report_input(name="Tiny")`: two quantizations, two targets, verdicts, projections.

    `name` is in every text that comes from a model, a file, a device or a user.
    """

    def make(name: str = "Tiny") -> ReportInput:
        figures = _figures(name, make_record)
        verdicts = tuple(
            BudgetVerdict(
                *("tg128", f"{name}.gguf", name, f"at most {name}"),
                1.1,
                1.0,
                1.2,
                outcome,
                f"{name} says so",
                "x",
            )
            for outcome in ("pass", "missed", "inconclusive")
        )
        return ReportInput(
            config=ReleaseConfig.model_validate({"model": {"reference": name}}),
            figures=figures,
            versions={"phoneready": "1.0", "runtime": name},
            commands=(f"phoneready prune '{name}'",),
            seconds={"dense": 1.0},
            verdicts=Verdicts("missed", name, None, f"{name}.json", verdicts),
            projected={f"{name}.gguf": _facts(name)},
            devices=tuple(
                entry.profile.model_copy(update={"name": name}) for entry in load_profiles().values()
            ),
        )

    return make


def _figures(name: str, make_record: Callable[..., BenchRecord]) -> ReleaseFigures:
    exports = {
        (role, quant): _export(f"{name}-{role}-{quant}.gguf", quant, factor)
        for role, factor in (("dense", 1.0), ("shipped", 0.9))
        for quant in ("Q8_0", "Q4_0")
    }
    dense, shipped = (
        tuple(record for (part, _), record in exports.items() if part == role)
        for role in ("dense", "shipped")
    )
    files = [record.file for record in (*dense, *shipped)]
    return ReleaseFigures(
        source=ModelSource(name, "hub", name, license=name, sha256="ab" * 32),
        plan=_plan(name),
        evaluation=_evaluation(name),
        dense=dense,
        shipped=shipped,
        answers=Answers(
            (name,), {file: (f"{file} answers {name}",) for file in files}, dict.fromkeys(files, (None,))
        ),
        bench=tuple(_records(files, name, make_record)),
        losses=tuple(_losses(name, role, record) for (role, _), record in exports.items()),
    )


def _losses(name: str, role: str, record: ExportRecord) -> FileLosses:
    """Of dense files 0.9 and 0.92 bits per byte on both windows, of pruned ones 1.0 and 1.02."""
    bits = {"dense": 0.9, "shipped": 1.0}[role] + {"Q8_0": 0.0, "Q4_0": 0.02}[record.quant]
    sizes = (200, 220)
    nats = tuple(math.log(2) * bits * size for size in sizes)
    distance = Distance((6.3, 6.3), (63, 63), (57, 57), 0.05, 1.0, 2.0)
    text = TextLoss("text", name, 64, "f" * 64, sizes, (63, 63), nats, (63, 63), nats, distance)
    return FileLosses(record.file, record.file_bytes, (text,), role, record.quant)


def _records(files: list[str], name: str, make_record: Callable[..., BenchRecord]) -> list[BenchRecord]:
    workloads = (Workload("tg", n_gen=128), Workload("pp", n_prompt=64), Workload("load"))
    places = (("measured", "local"), ("constrained-host", name))
    found = []
    for kind, target in places:
        for number, file in enumerate(files):
            samples = tuple(10**9 + 10**7 * (number * 3 + i) for i in range(5))
            shared = {"kind": kind, "target": target, "model_filename": file, "samples_ns": samples}
            found += [make_record(workload, **shared) for workload in workloads]
    gone = make_record(workloads[0], status="failed", failure=f"{name} went away", samples_ns=(), sequence=())
    return [*found, gone]


def _plan(name: str) -> PruningPlan:
    blocks = []
    for i in range(BLOCKS):
        ranking = tuple((channel * 7 + i) % DENSE_WIDTH for channel in range(DENSE_WIDTH))
        blocks.append(BlockPlan(192 + 8 * i, 0.1 + 0.01 * i, ranking))
    widths = (DENSE_WIDTH,) * BLOCKS
    return PruningPlan(
        "llama", name, None, (name,), "cd" * 32, 1024, 0, PruneSettings(), widths, tuple(blocks)
    )


def _evaluation(name: str) -> Evaluation:
    tokens = (512, 512)
    nats, dense = ((512 * math.log(perplexity),) * 2 for perplexity in (15, 13))
    distance = Distance((51.2, 51.2), tokens, (410, 410), 0.05, 1.0, 2.0)
    flags = Degeneration("0", 64, 1.0, (name,), 0.0, (None,))
    return Evaluation(
        ModelIdentity("pruned"),
        ModelIdentity(name),
        1,
        (TextLoss("text", name, 64, "ef" * 32, (2000, 2000), tokens, nats, tokens, dense, distance),),
        (name,),
        (f"pruned answers {name}",),
        (f"dense answers {name}",),
        flags,
    )


def _export(file: str, quant: str, factor: float) -> ExportRecord:
    parity = ParityReport(
        2048, 4, 512, file, 0.5, 0.01, 0.005, 0.2, 0.95, 15.0, 15.5, 15.5 / 15, {"kl_mean": 0.1}
    )
    return ExportRecord(
        file=file,
        format="gguf",
        quant=quant,
        architecture="llama",
        file_bytes=int(150e6 * factor * (0.6 if quant == "Q4_0" else 1)),
        sha256="12" * 32,
        n_params=134_515_008,
        tensor_types={quant: 10},
        imatrix_tensors=0,
        shape=ModelShape.of_ffn_widths((DENSE_WIDTH,) * BLOCKS),
        context_length=2048,
        tokenizer_strings=126,
        source_model=file,
        source_sha256=None,
        checkpoint_sha256=None,
        plan_sha256=None,
        seed=0,
        parity=parity,
        warnings=(f"{file} is odd",),
        runtime=file,
    )


def _facts(name: str) -> ModelFacts:
    return ModelFacts(Path(name), 10**8, 10**8, 10**8, {"Q8_0": 10**8}, 5760, 576, 1536, 49152, 2048)
