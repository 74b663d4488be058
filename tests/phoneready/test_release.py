"""The release from end to end on a tiny model, with the real libraries, and killed on its way."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir
import pytest

from cfsp.files import sha256_file
from cfsp.records import read_record
from exporters.families import FAMILIES
from exporters.family import ExportOptions
from phoneready import tracking
from phoneready.figures.figures import SHIPPED, FigureKey, FigureSet, Verdicts
from phoneready.history import HISTORY_FILE, read_entries
from phoneready.main import main
from phoneready.publish.manifest import verify_release
from phoneready.release import steps
from phoneready.settings.release import load_config, planned_figures
from phoneready.settings.schema import TrackingConfig
from runtime_bench.records.bench_record import BenchRecord
from runtime_bench.records.compare import Comparison, compare_records
from runtime_bench.records.jsonl import read_jsonl, write_jsonl
from runtime_bench.records.reported import Contention

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

TinyPath = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
seed = 3
[model]
reference = "{model}"
[prune]
prune_ratio = 0.25
strength = 0.5
calibration = ["builtin:python-docs"]
nsamples = 4
seqlen = 64
[recover]
data = ["builtin:python-docs"]
max_tokens = 1024
seqlen = 64
batch_size = 2
[evaluate]
text = ["builtin:python-docs"]
chats = ["chats.jsonl"]
seqlen = 64
max_windows = 6
prompts = ["List three fruits.", "What is 2+2?"]
max_new_tokens = 4
[quantize]
to = ["{quants}", "int8"]
[bench]
n_prompt = [8]
n_gen = [2]
ttft = [4]
n_threads = [1]
repetitions = 5
check_text = false
samples_per_process = 5
devices = ["pixel-8a", "galaxy-s24-ultra"]
[[budgets]]
metric = "file_bytes"
at_most = 0.999
relative_to = "dense"
[[budgets]]
metric = "kl_mean"
files = ["checkpoint", "Q8_0"]
at_most = 5
[[budgets]]
metric = "load"
at_most = "100 s"
[[budgets]]
metric = "projected_memory_bytes"
at_most = "1 GB"
"""
STAGES = (
    *("dense", "prune", "recover", "evaluate", "export-dense", "export", "answers"),
    *("side-by-side", "bench-local", "decide-local"),
)
FILE = "tiny-model-Q8_0.gguf"


def write_config(folder: Path, model: Path, quants: str = "Q8_0") -> Path:
    chat = {"messages": [{"role": r, "content": "List three fruits. " * 4} for r in ("user", "assistant")]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 4, encoding="utf-8")
    path = folder / "release.toml"
    path.write_text(CONFIG.format(model=model, quants='", "'.join(quants.split(","))), encoding="utf-8")
    return path


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
    config = write_config(folder, tiny_folder(intermediate_size=256, head_dim=32))
    line = [sys.executable, "-m", "phoneready", "release", str(config), "-o", str(folder / "out"), "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PHONEREADY_CACHE": str(folder / "cache")}
    process = subprocess.run(
        [*line, "--threads", "1"], env=environment, capture_output=True, text=True, check=False
    )
    output, errors = process.stdout, process.stderr
    assert process.returncode == 0, errors
    assert states(errors) == dict.fromkeys(STAGES, "finished")
    told = [line.strip() for line in errors.splitlines() if line.startswith("  ")]
    assert [line.split(";")[0] for line in told] == [
        f"{n} of {len(STAGES)}" for n in range(1, len(STAGES) + 1)
    ]
    assert "25.0% of the FFN channels removed" in told[1]
    assert "validation loss" in told[2]
    assert "; perplexity" in told[2]
    assert "x dense, KL " in told[3]
    assert "Q8_0 " in told[5]
    assert "tg2 " in told[-2]
    assert "tg2 " in told[-1]
    manifest = json.loads(output)
    assert manifest == json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))
    return config, folder / "out"


def test_what_a_release_leaves_agrees_and_is_made_again_from_records(
    released: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, folder = released
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    made = [(file["role"], file["format"], file["quant"]) for file in manifest["files"]]
    assert made == [
        (role, *one) for role in ("shipped", "dense") for one in (("gguf", "Q8_0"), ("onnx", "int8"))
    ]
    for file in manifest["files"]:
        parts = [folder / file["file"]]
        if file["format"] == "onnx":
            graph = parts[0] / "onnx" / "model_quantized.onnx"
            parts = [graph, graph.with_suffix(".onnx_data")]
            # Both refuse weights that have a second name, as GGUF files have while the stages are there.
            assert {weight.name for weight in onnx.load(graph).graph.initializer} == set(
                onnx_ir.load(graph).graph.initializers
            )
        assert sum(part.stat().st_size for part in parts) == file["bytes"]
        assert sha256_file(parts[0]) == file["sha256"]
        assert {part.stat().st_nlink for part in parts} == {2 if file["format"] == "gguf" else 1}
    assert sum(block["ffn_width"] for block in manifest["shape"]["blocks"]) == 4 * 192
    assert tuple(manifest["stages"]) == STAGES
    assert not list(folder.rglob(".*.tmp-*"))
    verdicts = read_record(Verdicts, folder / "verdicts.json")
    found = {(v.metric, v.subject, v.target): v for v in verdicts.verdicts}
    assert (verdicts.outcome, len(found)) == ("pass", 2 + 4 + 2 + 2)
    load = found["load, 1 thread", FILE, "local"]
    assert 0 < (load.low or 0) <= (load.value or 0) <= (load.high or 0) < 100_000
    of_file, of_checkpoint = (
        found["kl_mean, chats chats.jsonl", name, None] for name in (FILE, "checkpoint")
    )
    assert of_file.value != of_checkpoint.value, "the file was not judged itself"
    figures = read_record(FigureSet, folder / "figures.json").by_key(SHIPPED)
    assert set(planned_figures(load_config(config))) == set(figures), (
        "budgets are checked against what is planned"
    )
    assert (folder / "junit.xml").is_file()
    (entry,) = read_entries(folder / HISTORY_FILE)
    assert set(entry.stages) == set(STAGES)
    assert {figure.key.metric for figure in entry.figures} >= {
        "file_bytes",
        "tg2",
        "kl_mean",
        "peak_rss_bytes",
    }

    # A second run repeats nothing and writes the same, as does `report`, without a model.
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["release", str(config), "-o", str(folder), "--threads", "1"]) == 0
    assert states(capsys.readouterr().err) == dict.fromkeys(STAGES, "done before")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    said = {
        "report.md": "25.0% of the FFN channels|pp8|tg2|ttft4|peak memory|KL mean|same top-1|builtin:python-docs|378|"
        "chats: chats.jsonl|windows of 64 tokens|List three fruits.|## int8: dense and pruned|1 thread",
        "report.html": f"{FILE}|Pixel 8a|kl_mean|builtin:python-docs|budgets met",
    }
    with monkeypatch.context() as without_plots:
        without_plots.setitem(sys.modules, "plotly", None)
        assert main(["report", str(folder)]) == 2
    assert "pip install 'phoneready[report]'" in capsys.readouterr().err
    for name, parts_said in said.items():
        assert (folder / name).read_bytes() == before[folder / name]
        assert not [part for part in parts_said.split("|") if part not in before[folder / name].decode()]
        (folder / name).unlink()
    assert main(["report", str(folder)]) == 0
    assert all((folder / name).read_bytes() == before[folder / name] for name in said)
    assert verify_release(folder)[1] == []


@pytest.fixture
def copied(released: tuple[Path, Path], tmp_path: Path) -> Callable[..., int]:
    """`copied(*options)` runs a release in a copy of the finished one's folder and returns its exit status."""
    config, whole = released
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)

    def run(*options: str) -> int:
        return main(["release", str(config), "-o", str(folder), "--threads", "1", *options])

    return run


def test_only_what_a_change_concerns_is_done_again(
    copied: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    released: tuple[Path, Path],
) -> None:
    def reasons(change: str) -> dict[str, str]:
        capsys.readouterr()
        assert copied("--explain", "--json", "--set", change) == 0
        captured = capsys.readouterr()
        assert states(captured.err) == {}
        return {name: why for name, why in json.loads(captured.out).items() if why}

    assert reasons("bench.check_text=true") == {
        "bench-local": "check_text was false and is true",
        "decide-local": "bench-local has changed",
    }
    again = reasons("prune.prune_ratio=0.5")
    assert (again["prune"], again["recover"]) == ("prune_ratio was 0.25 and is 0.5", "prune has changed")
    assert "dense" not in again

    # An anchor takes turns with the files, and is in the figures only.
    anchor = tmp_path / "reference.gguf"
    shutil.copy(next((released[1]).rglob("*dense-Q8_0.gguf")), anchor)
    assert copied("--set", f'bench.anchor="{tmp_path}/nowhere.gguf"') == 2
    assert "bench.anchor: no such file" in capsys.readouterr().err
    words = (f'anchor="{anchor}"', 'files=["Q8_0"]', 'cache_type="q8_0"', "energy=true")
    assert copied(*(word for each in words for word in ("--set", f"bench.{each}"))) == 0
    measured = {"bench-local": "finished", "decide-local": "finished"}
    assert states(capsys.readouterr().err) == dict.fromkeys(STAGES, "done before") | measured
    figures = read_record(FigureSet, tmp_path / "out" / "figures.json").figures
    speeds = [figure for figure in figures if figure.key.metric.startswith("tg")]
    assert {figure.role for figure in speeds} == {"dense", "shipped"}
    assert all(
        figure.anchor and figure.samples and len(figure.anchor.times) == len(figure.samples.times) == 5
        for figure in speeds
    )
    assert all({"anchor"} <= figure.conditions.keys() - {"processor"} for figure in speeds)
    assert {figure.conditions["key-value cache"] for figure in speeds} == {"q8_0"}
    energies = [figure for figure in figures if figure.unit == "J"]
    assert {figure.key.metric for figure in energies} == {"joules_pp8", "joules_tg2"}
    assert all(figure.value is not None or figure.failure for figure in energies)
    assert "reference.gguf" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    followed = read_entries(tmp_path / "out" / "history.jsonl")[-1].figures
    assert {figure.unit for figure in followed if figure.key.metric.startswith("tg")} <= {"x anchor"}


def test_what_the_samples_leave_open_is_measured_on(
    copied: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def rows(stage: str) -> dict[str, BenchRecord]:
        found = read_jsonl(out / "stages" / stage / "bench.jsonl")
        return {one.model_filename: one for one in found if one.test == "tg2"}

    # One process of five samples says nothing; the file and the dense one take turns until there are eight.
    budget = 'metric="tg2", files=["Q8_0"], relative_to="dense", at_least=0.0001'
    status = copied("--set", f"budgets=[{{{budget}}}]")
    done = states(capsys.readouterr().err)
    assert done.pop("bench-local") in ("done before", "finished"), (
        "a crowded machine's rows are measured again"
    )
    assert done == dict.fromkeys([one for one in STAGES if one != "bench-local"], "done before") | {
        "decide-local": "finished"
    }
    dense, pruned = (name for name in rows("bench-local") if name.endswith("Q8_0.gguf"))
    decided = rows("decide-local")
    for name, before in rows("bench-local").items():
        more = decided[name]
        if name not in (dense, pruned):
            assert more == before
            continue
        assert (len(set(before.rounds)), more.samples_ns[:5]) == (1, before.samples_ns)
        assert 1 < len(set(more.rounds)) <= 16
        assert len(more.sequence) == len(more.samples_ns) == len(more.cpu_samples_ns)
        assert len(more.peak_rss_samples_bytes) == len(more.contention) == len(set(more.rounds))
        assert more.measured_on is not None
        assert (more.measured_on.seconds > 0, more.measured_on.time_over) == (True, False)
    # The report prints the comparison that the budget was held against.
    compared = compare_records(decided[dense], decided[pruned])
    assert isinstance(compared, Comparison)
    assert (compared.paired, compared.confidence) == (True, pytest.approx(0.99))
    (verdict,) = read_record(Verdicts, out / "verdicts.json").verdicts
    # A busy machine may leave it open to the end; then both say so.
    assert (status, compared.ratio is None) == ((0, False) if verdict.outcome == "pass" else (3, True))
    if compared.ratio is not None:
        ends = [compared.ratio, compared.low, compared.high]
        assert [verdict.value, verdict.low, verdict.high] == pytest.approx(ends)
        lines = (out / "report.md").read_text("utf-8").splitlines()
        said = next(line for line in lines if "99% interval" in line)
        assert f"({compared.low:.2f} to {compared.high:.2f})" in said

    # On the limit nothing is decided, and the time for it ends.
    at_limit = f'budgets=[{{metric="tg2", files=["Q8_0"], at_least={decided[pruned].median_ts}}}]'
    assert copied("--set", at_limit, "--set", "bench.decide_s=1") == 3
    captured = capsys.readouterr()
    assert f"1 of 1 budgets not decided: tg2, 1 thread of {FILE}" in captured.err
    assert "the time of bench.decide_s is over" in captured.err
    assert captured.out.splitlines()[-1] == "[INCONCLUSIVE] tiny-model: 1 inconclusive"
    # The next run goes on from there.
    before = rows("decide-local")[pruned]
    assert copied("--set", at_limit, "--set", "bench.decide_s=1") in (0, 1, 3)
    after = rows("decide-local")[pruned]
    assert len(after.samples_ns) >= len(before.samples_ns)
    assert after.samples_ns[: len(before.samples_ns)] == before.samples_ns
    assert before.measured_on
    assert after.measured_on
    assert (before.measured_on.looks, after.measured_on.looks) == (5, 9)


def test_a_disturbed_row_is_measured_again_if_it_leaves_a_budget_open(
    copied: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def crowd(stage: str) -> set[str | None]:
        """Make the host have taken the cores while it was measured; its sessions."""
        folder = tmp_path / "out" / "stages" / stage
        rows = read_jsonl(folder / "bench.jsonl")
        crowded = [replace(row, contention=(Contention(0.0, 1e4),) * len(row.contention)) for row in rows]
        write_jsonl(folder / "bench.jsonl", crowded)
        done = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        done["files"]["bench.jsonl"] = (folder / "bench.jsonl").stat().st_size
        (folder / "stage.json").write_text(json.dumps(done), encoding="utf-8")
        return {row.session for row in rows}

    def budget(limit: float) -> tuple[str, str]:
        return "--set", f'budgets=[{{metric="tg2", files=["Q8_0"], at_least={limit}}}]'

    assert copied(*budget(1e-6)) == 0
    before = crowd("bench-local") | crowd("decide-local")
    capsys.readouterr()
    assert copied(*budget(1e-6)) == 0, "what passes on a busy machine passes"
    assert states(capsys.readouterr().err) == dict.fromkeys(STAGES, "done before")
    copied(*budget(1e9), "--set", "bench.decide_s=1", "--explain", "--json")
    why = json.loads(capsys.readouterr().out)
    assert why["bench-local"] == "some of it failed or is not decided, and is tried again"
    assert copied(*budget(1e9), "--set", "bench.decide_s=1") in (1, 3)
    rows = read_jsonl(tmp_path / "out" / "stages" / "bench-local" / "bench.jsonl")
    assert not {row.session for row in rows if row.test == "tg2"} & before
    assert {row.session for row in rows if row.test != "tg2"} <= before
    decided = read_jsonl(tmp_path / "out" / "stages" / "decide-local" / "bench.jsonl")
    assert {row.session for row in rows} == {row.session for row in decided}


def test_budgets_make_the_exit_status(
    copied: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert copied("--set", 'budgets=[{metric="file_bytes", at_most=1, files=["Q8_0"]}]') == 1
    captured = capsys.readouterr()
    assert f"1 of 1 budgets missed: file_bytes of {FILE}" in captured.err
    assert captured.out.splitlines()[-1] == "[MISSED] tiny-model: 1 missed"
    figures = read_record(FigureSet, tmp_path / "out" / "figures.json").by_key("shipped")
    middle = figures[FigureKey("projected_tg", "Q8_0", "galaxy-s24-ultra")].value
    band = f'budgets=[{{metric="projected_tg", at_least={middle}, devices=["galaxy-s24-ultra"]}}]'
    assert copied("--set", band) == 3, "a budget that nobody knows to be met is not met"
    assert copied("--set", 'budgets=[{metric="tg64", at_least=1}]') == 2
    baseline = tmp_path / "baseline.json"
    shutil.copy(tmp_path / "out" / "figures.json", baseline)
    against = ("--set", f'baseline.file="{baseline}"', "--set",
               'budgets=[{metric="kl_mean", at_most=1.01, relative_to="baseline"}]')  # fmt: skip
    assert copied(*against) == 0
    stored = json.loads(baseline.read_text(encoding="utf-8"))
    baseline.write_text(json.dumps(stored | {"source_sha256": "0" * 64}), encoding="utf-8")
    capsys.readouterr()
    assert copied(*against) == 2
    captured = capsys.readouterr()
    assert "is of another model" in captured.err
    assert list(states(captured.err)) == ["dense"], "the model is known after the first stage"

    # A target that is gone is a failed run, and tried again.
    gone = "constrained:cores=4000"
    options = ("--set", f'bench.targets=["local", "{gone}"]', "--set",
               f'budgets=[{{metric="tg2", at_least=1, targets=["{gone}"]}}]')  # fmt: skip
    assert copied(*options) == 3
    verdicts = read_record(Verdicts, tmp_path / "out" / "verdicts.json").verdicts
    assert {v.outcome for v in verdicts} == {"inconclusive"}
    assert all("cores that this process may not use" in v.reason for v in verdicts)
    capsys.readouterr()
    assert copied("--explain", "--json", *options) == 0
    reasons = {name: why for name, why in json.loads(capsys.readouterr().out).items() if why}
    stages = (f"{kind}-constrained-cores-4000" for kind in ("bench", "decide"))
    assert reasons == dict.fromkeys(stages, "some of it failed or is not decided, and is tried again")


def test_its_commands_make_the_same_files(
    released: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = released[1]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    commands = [shlex.split(line)[1:] for line in manifest["commands"]]
    for command in commands:
        capsys.readouterr()
        status = main([*command, "--json"])
        # Training that gains nothing leaves what it began with, and says so by its status.
        assert status == 0 or (status == 1 and command[0] == "recover"), capsys.readouterr().err
        if command[0] == "eval":
            judged = json.loads(capsys.readouterr().out)
    evaluated = json.loads((folder / "stages/evaluate/evaluation.json").read_text(encoding="utf-8"))
    for figure in ("texts", "prompts", "answers", "against_answers", "seed"):
        assert judged[figure] == evaluated[figure]
    gguf, onnx_folder = (file["file"] for file in manifest["files"] if file["role"] == "shipped")
    (made,) = tmp_path.rglob(gguf)
    assert sha256_file(made) == sha256_file(folder / gguf)
    (variant,) = tmp_path.rglob("int8/onnx")
    graphs = sorted((folder / onnx_folder / "onnx").iterdir())
    assert len(graphs) >= 2
    assert [sha256_file(variant / graph.name) for graph in graphs] == [sha256_file(graph) for graph in graphs]


WHOLE = (
    ("prune_ratio = 0.25", "prune_ratio = 0.0"),
    ("max_windows = 2", 'max_windows = 6\ntasks = ["known.jsonl"]\nfiles = ["Q8_0"]'),
    '[[budgets]]\nmetric = "kl_mean"\nat_most = 5\n',
)
"""Changes of a small release: nothing is removed, and the file has a budget."""


def test_a_whole_model_ships_once_and_as_quantize_makes_it(
    tiny_folder: TinyPath,
    small_release: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    chat = {"messages": [{"role": r, "content": "fruits"} for r in ("user", "assistant")]}
    (tmp_path / "known.jsonl").write_text(json.dumps(chat) + "\n", encoding="utf-8")
    config, folder = small_release(tiny_folder(intermediate_size=256), *WHOLE), tmp_path / "out"
    assert main(["release", str(config), "-o", str(folder), "--threads", "1"]) == 0
    said = capsys.readouterr().out
    stages = {path.name for path in (folder / "stages").iterdir()}
    kinds = {"dense", "evaluate", "export", "answers", "side-by-side", "evaluate-files", "bench-local"}
    assert stages == kinds
    figures = read_record(FigureSet, folder / "figures.json")
    for role in ("shipped", "dense"):
        of_file = {key.metric for key in figures.by_key(role) if key.item == "Q8_0"}
        assert {"accuracy", "mean_accuracy", "bits_per_byte", "perplexity"} <= of_file, role
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (file,) = manifest["files"]
    assert (file["file"], file["role"]) == ("tiny-model-Q8_0.gguf", "shipped")
    assert [path.name for path in folder.glob("*.gguf")] == ["tiny-model-Q8_0.gguf"]
    made = (path for path in folder.glob("*.*") if path.suffix in (".md", ".json", ".jsonl", ".xml"))
    texts = [said, *(path.read_text("utf-8") for path in made)]
    texts += [(folder / "report.html").read_text("utf-8").partition("<script")[0]]
    assert not [text for text in texts if re.search(r"\bpruned\b", text, re.IGNORECASE)]
    for part in ("against the model in float32", "bits per byte, KL", "tg2", "List three fruits."):
        assert all(part in text for text in (texts[-1], (folder / "report.md").read_text("utf-8")))
    assert verify_release(folder)[1] == []
    commands = [shlex.split(line)[1:] for line in manifest["commands"]]
    assert [command[0] for command in commands] == ["eval", "quantize"]
    assert [main(command) for command in commands] == [0, 0]
    assert sha256_file(tmp_path / "exports" / file["file"]) == file["sha256"]

    def refused(metric: str) -> str:
        budget = f'budgets=[{{metric="{metric}", at_most=1, relative_to="dense"}}]'
        assert main(["release", str(config), "-o", str(folder), "--set", budget]) == 2
        return capsys.readouterr().err

    for metric in ("file_bytes", "load"):
        assert (
            "relative_to: nothing is removed or trained, so no dense model is beside what ships"
            in refused(metric)
        )


def test_defaults_fit_a_short_context_and_what_is_stated_has_to(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "release.toml"
    model = f'[model]\nreference = "{tiny_folder(max_position_embeddings=96)}"\n'
    small = (
        '[prune]\nprune_ratio = 0.0\nnsamples = 2\ncalibration = ["builtin:python-docs"]\n[quantize]\nto = ["Q8_0"]\n'
        '[evaluate]\nchats = []\nmax_windows = 2\nmax_new_tokens = 2\nprompts = ["List three fruits."]\n{0}'
        "[bench]\nrepetitions = 1\nn_threads = [1]\ncheck_text = false\n{1}"
    )
    config.write_text(model + small.format("", ""), encoding="utf-8")
    assert main(["release", str(config), "-o", str(tmp_path / "out"), "--threads", "1"]) == 0
    said = capsys.readouterr().err
    for place in ("prune.seqlen is 96", "evaluate.seqlen is 96", "bench.n_prompt is (96,)"):
        assert f"{place}, as the model's context is no longer" in said
    made = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert made["config"]["evaluate"]["seqlen"] == 96
    config.write_text(model + small.format("seqlen = 128\n", "n_gen = [97, 8]\n"), encoding="utf-8")
    for line in (
        ["release", str(config), "-o", str(tmp_path / "new")],
        ["release", str(config), "--explain"],
    ):
        assert main(line) == 2
        said = capsys.readouterr().err
        for problem in ("evaluate.seqlen: longer than the model's context (got 128)", "bench.n_gen: longer"):
            assert problem in said
    assert not (tmp_path / "new").exists()


def test_a_quantization_that_is_added_or_taken_out_leaves_the_others_alone(
    tiny_folder: TinyPath, small_release: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, folder = small_release(tiny_folder(intermediate_size=256), *WHOLE[:1]), tmp_path / "out"
    made: list[tuple[str, ...]] = []
    measured: list[str] = []
    export = FAMILIES["gguf"].export

    def counted(checkpoint: Path, output: Path, names: Sequence[str], settings: ExportOptions) -> Any:
        made.append(tuple(names))
        return export(checkpoint, output, names, settings)

    monkeypatch.setattr(steps, "FAMILIES", {**FAMILIES, "gguf": replace(FAMILIES["gguf"], export=counted)})
    measure = steps.measure_file

    def counted_losses(path: Path, *given: Any, **named: Any) -> Any:
        measured.append(path.stem)
        return measure(path, *given, **named)

    monkeypatch.setattr(steps, "measure_file", counted_losses)
    sessions: dict[str, set[str | None]] = {}
    for wanted, new in (
        ("Q8_0", ("Q8_0",)),
        ("f16,Q8_0", ("f16",)),
        ("f16", None),
        ("Q8_0,f16", ("Q8_0",)),
    ):
        made.clear()
        measured.clear()
        names = wanted.split(",")
        line = [
            "release",
            str(config),
            "-o",
            str(folder),
            "--threads",
            "1",
            "--set",
            f"quantize.to={json.dumps(names)}",
        ]
        assert main(line) == 0
        assert made == ([] if new is None else [new])
        assert measured == [f"tiny-model-{name}" for name in new or ()]
        assert {path.name for path in folder.glob("*.gguf")} == {f"tiny-model-{name}.gguf" for name in names}
        rows = read_jsonl(folder / "stages" / "bench-local" / "bench.jsonl")
        now = {
            one.model_filename: {row.session for row in rows if row.model_filename == one.model_filename}
            for one in rows
        }
        assert set(now) == {f"tiny-model-{name}.gguf" for name in names}
        assert all(now[file] == sessions[file] for file in now if file in sessions), "measured once"
        sessions = now
        assert verify_release(folder)[1] == []
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert [main(shlex.split(command)[1:]) for command in manifest["commands"]] == [0, 0]
    assert {file["file"]: file["sha256"] for file in manifest["files"]} == {
        path.name: sha256_file(path) for path in (tmp_path / "exports").glob("*.gguf")
    }


def test_a_release_is_logged_once_and_a_missing_server_loses_nothing(
    copied: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the track extra is not installed")
    folder, store = tmp_path / "out", tmp_path / "runs.db"

    def logged(uri: str, *options: str) -> int:
        return copied(
            "--label", "1.0", "--set", f'tracking={{mlflow="{uri}", experiment="phones"}}', *options
        )

    # A login in the URL is for the server only; nothing listens there.
    assert logged("http://me:p%40ss@127.0.0.1:9", "--debug", "--json") == 2
    said = capsys.readouterr()
    assert "is complete, but could not be logged in http://127.0.0.1:9" in said.err
    written = [
        file for file in folder.rglob("*") if file.suffix in (".json", ".jsonl", ".md", ".html", ".xml")
    ]
    texts = (said.out, said.err, *(file.read_text("utf-8") for file in written))
    assert not [text for text in texts if "p%40ss" in text]
    # A missed budget is what the exit status tells, not the tracker's absence.
    assert logged("http://127.0.0.1:9", "--set", 'budgets=[{metric="kl_mean", at_most=0.0}]') == 1
    monkeypatch.setattr(tracking, "LIVE_INTERVAL_S", 0.0)
    for _ in range(2):
        assert logged(f"sqlite:///{store}", "--set", "evaluate.max_windows=3") == 0
    assert "logged as run" in capsys.readouterr().err
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("phones")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("1.0", "FINISHED")
    assert run.data.params["prune.prune_ratio"] == "0.25"
    assert not [name for name in run.data.params if name.startswith("tracking")]
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))["figures"]
    live = {name: value for name, value in run.data.metrics.items() if name.startswith("live/")}
    assert live["live/measuring divergence/done"] == 1, "what was done again was followed in the same run"
    assert len(run.data.metrics) - len(live) == sum(figure["value"] is not None for figure in figures)
    assert run.data.metrics["file_bytes/Q8_0"] == (folder / FILE).stat().st_size
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"manifest.json", "figures.json", "report.md", "history.jsonl"} <= names
    assert not [name for name in names if name.endswith(".gguf")]
    assert (tmp_path / "runs-artifacts").is_dir()


def test_a_release_that_goes_on_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the track extra is not installed")
    monkeypatch.setattr(tracking, "LIVE_INTERVAL_S", 0.0)
    where, shown, said = TrackingConfig(mlflow=f"sqlite:///{tmp_path}/runs.db"), [], list[str]()
    client = mlflow.MlflowClient(tracking_uri=where.mlflow)

    def runs() -> list[Any]:
        experiment = client.get_experiment_by_name(where.experiment)
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def follow(place: TrackingConfig) -> Iterator[None]:
        with (
            tracking.LiveRun(place, "1.0", said.append) as live,
            live.progress(lambda: nullcontext(lambda *step: shown.append(step))) as progress,
        ):
            for done, loss in ((1, "3.5"), (2, "2.25")):
                progress(f"training: loss {loss}", done, 4)
                yield
            raise KeyError

    going = follow(where)
    next(going)
    next(going)
    (run,) = runs()
    assert (run.info.status, run.info.run_name) == ("RUNNING", "1.0")
    assert run.data.metrics.keys() == {f"live/training/{name}" for name in ("done", "loss", "minutes_left")}
    history = client.get_metric_history(run.info.run_id, "live/training/loss")
    assert [(one.step, one.value) for one in history] == [(1, 3.5), (2, 2.25)]
    with pytest.raises(KeyError):
        next(going)
    (run,) = runs()
    assert (run.info.status, len(shown), said) == ("FAILED", 2, [])
    with pytest.raises(KeyError):
        list(follow(TrackingConfig(mlflow="http://127.0.0.1:9")))
    assert (len(said), len(shown)) == (1, 4), "a tracker that is away is asked once, and training goes on"


UNUSABLE = {
    'model.reference="missing"': "missing",
    'prune.calibration=["missing.txt"]': "missing.txt",
    "prune.prune_ratio=2": "prune_ratio",
    "prune.seqlen=100000": "seqlen",
    'recover.data=["calls.jsonl"]': "calls.jsonl does not exist",
    'recover.validation=["calls.jsonl"]': "calls.jsonl does not exist",
    'recover.report_to=["abacus"]': "report_to",
    'evaluate.text=["book.txt"]': "book.txt does not exist",
}


def test_what_cannot_be_used_or_written_leaves_nothing_behind(
    tiny_folder: TinyPath, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, loop = tiny_folder(), tmp_path / "loop"
    config = write_config(tmp_path, model)
    loop.symlink_to(loop)
    for more in ((), ("--explain",)):
        assert "in the model's folder" in refused("release", config, "-o", model / "release", *more)
        assert str(loop) in refused("release", config, "-o", loop, *more)
    (tmp_path / "there").mkdir()
    before = sorted((*tmp_path.rglob("*"), *model.rglob("*")))
    for change, reason in UNUSABLE.items():
        for output in (tmp_path / "above" / "out", tmp_path / "there"):
            capsys.readouterr()
            assert main(["release", str(config), "-o", str(output), "--set", change]) == 2
            *_, said = capsys.readouterr().err.splitlines()  # the first stage may have begun
            assert "error: " in said
            assert reason in said
            assert sorted((*tmp_path.rglob("*"), *model.rglob("*"))) == before


@pytest.mark.everything
def test_a_full_disk_loses_nothing_and_a_later_run_goes_on(
    released: tuple[Path, Path],
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, whole = released
    disk = small_disk("2600k")
    line = ["release", str(config), "-o", str(disk / "out"), "--threads", "1"]
    assert main(line) == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("error: no space left to write "), shown
    done = {name for name, state in states(shown).items() if state == "finished"}
    assert "dense" in done
    assert not list(disk.rglob(".*.tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=64M", str(disk)], check=True)
    assert main(line) == 0
    now = states(capsys.readouterr().err)
    assert {name for name, state in now.items() if state == "done before"} == done
    for file in whole.glob("*.gguf"):
        assert sha256_file(disk / "out" / file.name) == sha256_file(file)


@pytest.mark.everything
def test_killed_again_and_again_it_ends_with_the_same_files(
    tiny_folder: TinyPath, tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    experiment = script("benchmarks/kill_release")
    config = tmp_path / "release.toml"
    model = tiny_folder(intermediate_size=256)
    config.write_text(experiment.CONFIG.replace("tiny-model", str(model)), encoding="utf-8")
    outcome = experiment.kill_and_restart(config, tmp_path, kills=2, threads=1)
    assert outcome.problems == []
    assert outcome.kills == 2
