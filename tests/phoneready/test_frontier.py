"""`phoneready frontier` on a tiny model: every point is a real file, judged in llama.cpp."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from phoneready.frontier.folder import PLOT_FILE, RESULT_FILE, STATE, STUDY_FILE, TABLE_FILE
from phoneready.frontier.plot import render_frontier
from phoneready.frontier.record import Frontier, FrontierPoint, Speed, choose_by_speed
from phoneready.frontier.run import WINDOWS_FILE
from phoneready.frontier.settings import parse_sizes
from phoneready.frontier.tables import format_frontier

from cfsp.errors import InputError
from cfsp.evaluation.task_results import TaskMetric, TaskResult
from cfsp.records import read_record, record_from_json, record_to_json
from phoneready.evaluation.dominance import (
    DOMINATED,
    FRONTIER,
    UNDECIDED,
    choose,
    excess,
    standing,
    telling_sizes,
)
from phoneready.evaluation.evaluation_record import Evaluation
from phoneready.evaluation.measured_file import MeasuredText
from phoneready.main import main

TinyPath = Callable[..., Path]
SMALL = (
    *("--text", "builtin:python-docs", "--seqlen", "64", "--windows", "4", "--threads", "1"),
    *("--calibration", "builtin:python-docs", "--nsamples", "4", "--calibration-seqlen", "64"),
)


@pytest.fixture(scope="module")
def model(tiny_folder: TinyPath) -> Path:
    return tiny_folder("llama")


def command(model: Path, folder: Path, *more: str) -> list[str]:
    return ["frontier", str(model), "-o", str(folder), *SMALL, *more]


def point_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / STATE).glob("*/points/*.json")}


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frontier") / "out"
    asked = ("--quants", "Q8_0,q4_0", "--prune-ratios", "0,0.25", "--vocabularies", "300,0", "--no-speed")
    assert main(command(model, folder, *asked, "--max-size", "1GB")) == 0
    return folder


def test_files_are_rounded_for_the_calibration_text_unless_that_is_turned_off(
    tiny_folder: TinyPath, tmp_path: Path
) -> None:
    dense = tiny_folder(intermediate_size=256)
    found = {}
    variants = {"text": (), "off": ("--no-gptq",), "less": ("--rounding-windows", "1")}
    for name, more in variants.items():
        assert main(command(dense, tmp_path / name, "--quants", "Q4_0", "--no-speed", *more)) == 0
        (found[name],) = read_record(Frontier, tmp_path / name / RESULT_FILE).points
    assert found["text"].file_bytes == found["off"].file_bytes
    for_text, off = found["text"].kl_mean, found["off"].kl_mean
    assert for_text is not None
    assert off is not None
    assert for_text < 0.9 * off
    assert found["less"].kl_mean not in (None, for_text, off)


def test_every_combination_is_measured_on_the_same_text(measured: Path) -> None:
    found = read_record(Frontier, measured / RESULT_FILE)
    combinations = {(p.vocabulary, p.prune_ratio, p.quant) for p in found.points}
    assert combinations == {(v, r, q) for v in (0, 300) for r in (0.0, 0.25) for q in ("Q8_0", "Q4_0")}
    assert [p.file_bytes for p in found.points] == sorted(p.file_bytes for p in found.points)
    first = found.points[0].texts[0]
    for point in found.points:
        (text,) = point.texts
        assert point.expected_bytes is not None
        assert abs(point.file_bytes - point.expected_bytes) <= 32
        assert (text.windows_sha256, text.n_bytes, text.seqlen) == (first.windows_sha256, first.n_bytes, 64)
        assert text.dense_nats == pytest.approx(first.dense_nats)
        assert point.kl_mean is not None
        assert point.kl_mean > 0
        assert point.same_top1 is not None
        assert point.removed == (0.25 if point.prune_ratio else 0)
        assert (text.n_tokens == 4 * 63) == (not point.vocabulary)
    assert not found.open
    assert not found.failed


def test_figures_are_those_of_eval(model: Path, measured: Path, tmp_path: Path) -> None:
    found = read_record(Frontier, measured / RESULT_FILE)
    for point in found.points:
        if point.quant != "Q4_0" or point.file not in found.kept:
            continue
        saved = tmp_path / f"{point.file}.json"
        judged = ("--text", "builtin:python-docs", "--seqlen", "64", "--windows", "4", "--no-prompts")
        file = str(measured / point.file)
        assert main(["eval", file, "--against", str(model), *judged, "--save", str(saved)]) == 0
        (text,) = read_record(Evaluation, saved).texts
        assert text.divergence is not None
        if not point.vocabulary:
            assert point.kl_mean == pytest.approx(text.divergence.kl_mean, abs=1e-5)
            assert point.same_top1 == pytest.approx(text.divergence.same_top1)
            assert point.bits_per_byte == pytest.approx(text.bits_per_byte, rel=1e-5)
        else:
            # eval shortens windows until both vocabularies have room; here all of the text is read.
            assert point.bits_per_byte == pytest.approx(text.bits_per_byte, rel=0.1)
            assert text.n_bytes is not None
            assert sum(point.texts[0].n_bytes) >= text.n_bytes


def test_blocks_attentions_and_groups_go_alone_and_together(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of rows of one block, which half of four heads of 16 are, llama.cpp's AMX kernels read beyond.
    model = tiny_folder("llama", head_dim=32)
    folder, saved = tmp_path / "out", tmp_path / "saved.json"
    asked = "--quants Q8_0 --blocks 0,1 --attentions 0,1 --kv-groups 0,0.5 --max-size 1GB --no-speed --keep"
    assert main(command(model, folder, *asked.split())) == 0
    found = read_record(Frontier, folder / RESULT_FILE)
    assert not found.failed
    by_structures = {(p.blocks, p.attentions, p.kv_groups): p for p in found.points}
    assert by_structures.keys() == set(itertools.product((0, 1), (0, 1), (0.0, 0.5)))
    assert [gone for gone, p in by_structures.items() if p.is_dense] == [(0, 0, 0.0)]
    for gone, point in by_structures.items():
        assert abs(point.file_bytes - (point.expected_bytes or 0)) <= 128, "files say their names"
        less = by_structures[0, *gone[1:]]
        assert point is less or point.file_bytes < less.file_bytes
    whole = by_structures[1, 1, 0.5]
    assert whole.label == "-1 blocks, -1 attentions, KV groups -50 % Q8_0"
    # As `prune` and `export` make it of the same text, but for the file's name.
    pruned = [
        "--blocks",
        "1",
        "--attentions",
        "1",
        "--kv-groups",
        "0.5",
        "--prune-ratio",
        "0",
        "--align",
        "1",
    ]
    text = ["--calibration", "builtin:python-docs", "--nsamples", "4", "--seqlen", "64", "--threads", "1"]
    checkpoint = str(tmp_path / "pruned")
    assert main(["prune", str(model), "-o", checkpoint, *pruned, *text]) == 0
    assert (
        main(["export", checkpoint, "-o", str(tmp_path / "files"), "--gguf", "Q8_0", "--threads", "1"]) == 0
    )
    (file,) = (tmp_path / "files").rglob("*.gguf")
    judged = ("--text", "builtin:python-docs", "--seqlen", "64", "--windows", "4", "--no-prompts")
    assert main(["eval", str(file), "--against", str(model), *judged, "--save", str(saved)]) == 0
    (text_result,) = read_record(Evaluation, saved).texts
    assert text_result.divergence is not None
    assert whole.kl_mean == pytest.approx(text_result.divergence.kl_mean, abs=1e-5)
    capsys.readouterr()


def test_pruned_models_are_measured_trained_too(model: Path, measured: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the recover extra is not installed")
    folder = tmp_path / "out"
    shutil.copytree(measured, folder)
    before = point_files(folder)
    asked = "--quants Q8_0 --prune-ratios 0,0.25 --vocabularies 0,300 --no-speed --max-size 1GB --recover"
    training = (
        "--data builtin:python-docs --method full --loss next-token --max-tokens 4096 --learning-rate 5e-3"
    )
    more = (*asked.split(), *training.split(), "--training-seqlen", "64")
    assert main(command(model, folder, *more)) == 0
    found = read_record(Frontier, folder / RESULT_FILE)
    trained = {(p.vocabulary, p.prune_ratio): p for p in found.points if p.recovered}
    untrained = {(p.vocabulary, p.prune_ratio): p for p in found.points if not p.recovered}
    assert trained.keys() == untrained.keys() - {(0, 0.0)}
    for key, point in trained.items():
        assert point.bits_per_byte < untrained[key].bits_per_byte
        assert point.file_bytes == pytest.approx(untrained[key].file_bytes, abs=64)
        assert point.label.endswith("recovered Q8_0")
    again = point_files(folder)
    assert {name: again[name] for name in before} == before
    assert "Recovered: full, next-token, 4096 tokens of builtin:python-docs." in format_frontier(found)


def test_tasks_are_added_to_what_is_known(model: Path, measured: Path, tmp_path: Path, task: Path) -> None:
    pytest.importorskip("lm_eval", reason="the eval extra is not installed")
    folder = tmp_path / "out"
    shutil.copytree(measured, folder)
    asked = (
        "--quants",
        "Q8_0",
        "--vocabularies",
        "0,300",
        "--no-speed",
        "--tasks",
        str(task),
        "--limit",
        "6",
    )
    assert main(command(model, folder, *asked)) == 0
    found = read_record(Frontier, folder / RESULT_FILE)
    assert len(found.points) == 2
    before = {point.file: point for point in read_record(Frontier, measured / RESULT_FILE).points}
    for point in found.points:
        (done,) = point.tasks
        assert (done.task, done.n_items, done.limit) == ("fruits", 6, 6)
        assert replace(point, tasks=(), seconds=0.0) == replace(before[point.file], seconds=0.0)
    table = format_frontier(found)
    assert " fruits acc |" in table
    assert "Tasks: 6 items of fruits" in table
    files = point_files(folder)
    assert main(command(model, folder, *asked)) == 0
    assert point_files(folder) == files


def test_files_that_others_dominate_are_deleted(measured: Path) -> None:
    found = read_record(Frontier, measured / RESULT_FILE)
    stays = {one.file for one in found.standings if one.verdict != DOMINATED}
    assert {path.name for path in measured.glob("*.gguf")} == stays == set(found.kept)
    assert (measured / PLOT_FILE).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "bits/byte" in (measured / TABLE_FILE).read_text(encoding="utf-8")
    assert not list((measured / STATE).glob("*/work-*"))


def test_nothing_is_measured_twice(model: Path, measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = point_files(measured)
    # Other sizes, fewer files: what is known serves.
    assert main(command(model, measured, "--quants", "Q8_0", "--no-speed", "--at", "1kB,1MB", "--json")) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert point_files(measured) == before
    assert "bits a byte" not in printed.err
    assert [choice["best"] is None for choice in result["choices"]] == [True, False]
    assert [point["quant"] for point in result["points"]] == ["Q8_0"]


def test_a_killed_run_goes_on(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    asked = command(model, folder, "--quants", "Q8_0,Q4_0,IQ4_NL", "--prune-ratios", "0,0.25", "--no-speed")
    with subprocess.Popen(
        [sys.executable, "-m", "phoneready", *asked],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    ) as run:  # fmt: skip
        deadline = time.monotonic() + 120
        while len(point_files(folder)) < 2 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGKILL)
    before = point_files(folder)
    assert 2 <= len(before) < 6
    read_record(Frontier, folder / RESULT_FILE)
    assert main(asked) == 0
    after = point_files(folder)
    assert {name: after[name] for name in before} == before
    found = read_record(Frontier, folder / RESULT_FILE)
    assert len(found.points) == len(after) == 6
    assert not list(folder.glob("**/.*.tmp-*"))


def together(*commands: list[str]) -> list[str]:
    """Run commands at the same time; what each told."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "phoneready", *asked],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for asked in commands
    ]
    told = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), told
    return told


def test_runs_share_a_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    asked = command(model, folder, "--quants", "Q8_0,Q4_0", "--prune-ratios", "0,0.25,0.5", "--no-speed")
    told = together(asked, asked)
    measured = [line for text in told for line in text.splitlines() if "bits a byte" in line]
    assert len(measured) == 6  # none twice
    assert main(asked) == 0
    found = read_record(Frontier, folder / RESULT_FILE)
    assert len(found.points) == 6
    assert not found.open
    assert not list((folder / STATE).glob("*/work-*"))


def test_runs_share_a_search(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the tune extra is not installed")
    folder = tmp_path / "out"
    space = ("--quants", "Q8_0,Q4_0", "--prune-ratios", "0.1,0.5", "--vocabularies", "0,300", "--no-speed")
    asked = command(model, folder, *space, "--trials", "4")
    told = together(asked, asked)
    measured = [line for text in told for line in text.splitlines() if "bits a byte" in line]
    assert len(measured) == 6  # two dense files and four that were proposed
    assert (folder / STUDY_FILE).stat().st_size
    before = point_files(folder)
    assert main(asked) == 0
    assert point_files(folder) == before
    found = read_record(Frontier, folder / RESULT_FILE)
    assert sum(point.is_dense for point in found.points) == 2
    assert len(found.points) == 6
    assert all(0.1 <= p.prune_ratio <= 0.5 for p in found.points if not p.is_dense)
    # Other lists are another search in the same folder; what they ask for is looked at, though a run has begun.
    assert main(command(model, folder, *space, "--trials", "1", "--blocks", "1,2", "--max-points", "2")) == 0
    assert main(command(model, folder, *space, "--trials", "1", "--blocks", "9")) == 2
    # A run that goes on has one more to propose.
    assert main(command(model, folder, *space, "--trials", "5")) == 0
    after = point_files(folder)
    assert len(after) == 7
    assert before.items() <= after.items()
    # Of several that it might propose it stops where there are as many files as there may be.
    assert main(command(model, folder, *space, "--trials", "9", "--max-points", "8")) == 0
    assert len(point_files(folder)) == 8


def test_a_killed_run_of_a_search_counts_for_nothing(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the tune extra is not installed")
    folder = tmp_path / "out"
    space = ("--quants", "Q4_0", "--prune-ratios", "0.1,0.5", "--no-speed")
    asked = command(model, folder, *space, "--trials", "3")
    with subprocess.Popen([sys.executable, "-m", "phoneready", *asked], start_new_session=True) as run:
        deadline = time.monotonic() + 120
        while len(point_files(folder)) < 2 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGKILL)
    assert main(asked) == 0
    found = read_record(Frontier, folder / RESULT_FILE)
    assert sum(not point.is_dense for point in found.points) == 3


def test_limits(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    asked = ("--quants", "Q8_0,Q4_0", "--prune-ratios", "0,0.25", "--no-speed")
    assert main(command(model, folder, *asked, "--max-size", "150kB", "--max-points", "1")) == 0
    first = read_record(Frontier, folder / RESULT_FILE)
    assert [p.label for p in first.points] == ["dense Q4_0"]
    assert first.open == ("FFN -25 % Q8_0", "FFN -25 % Q4_0")
    assert main(command(model, folder, *asked, "--max-size", "150kB")) == 0
    second = read_record(Frontier, folder / RESULT_FILE)
    assert {p.label for p in second.points} == {"dense Q4_0", "FFN -25 % Q4_0"}
    assert len(second.left_out) == 2
    assert not second.open
    assert second.find(first.points[0].file) == first.points[0]


def test_speed_is_added_to_what_is_known(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert main(command(model, folder, "--quants", "Q8_0", "--no-speed", "--keep")) == 0
    (plain,) = read_record(Frontier, folder / RESULT_FILE).points
    assert main(command(model, folder, "--quants", "Q8_0", "--keep")) == 0
    (point,) = read_record(Frontier, folder / RESULT_FILE).points
    assert plain.speed is None
    assert point.speed is not None
    assert (point.speed.test, point.speed.n_threads, point.speed.failure) == ("tg64", 1, None)
    assert point.speed.tokens_per_second
    assert point.speed.peak_rss_bytes
    assert point.speed.in_turns, "with the dense Q4_0 file, which was not asked for"
    (base,) = folder.rglob("dense-Q4_0.gguf")
    assert base.parent != folder
    assert point.texts == plain.texts
    assert "t/s" in (folder / TABLE_FILE).read_text(encoding="utf-8")
    assert main(command(model, folder, "--quants", "Q8_0,Q4_0", "--at-speed", "0.01", "--keep")) == 0
    found = read_record(Frontier, folder / RESULT_FILE)
    assert point in found.points, "what took turns is not measured again"
    (base_point,) = (one for one in found.points if one.quant == "Q4_0")
    assert base_point.times in (None, 1.0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--quants", "Q7_X"], "unknown quantization"),
        (["--at", "70 parsecs"], "--at: not understood"),
        (["--at", ","], "--at: empty"),
        (["--max-size", "big"], "--max-size: not understood"),
        (["--prune-ratios", "1"], "--prune-ratios: out of range"),
        (["--prune-ratios", "some"], "--prune-ratios: not understood"),
        (["--vocabularies", "3"], "vocabulary"),
        (["--vocabularies", "99999"], "vocabulary: out of range"),
        (["--blocks", "0,9"], "blocks: the first block stays (got 9)"),
        (["--attentions", "4"], "attentions: the first block's attention stays"),
        (["--kv-groups", "0.9"], "kv_groups: each of the 4 blocks that attend keeps one"),
        (["--text", "/nowhere.txt"], "does not exist"),
        (["--text", "builtin:python-docs"], "two texts have this name"),
        (["--seqlen", "100000"], "seqlen"),
        (["--calibration", "/nowhere.jsonl"], "does not exist"),
        (["--tasks", "missing.yaml"], "missing.yaml"),
        (
            ["--recover", "--prune-ratios", "0.1", "--max-tokens", "1000", "--epochs", "1"],
            "max_tokens: says how long, and so does epochs",
        ),
        (["--recover", "--method", "magic"], "--method"),
        (["--recover", "--prune-ratios", "0.1", "--data", "none.txt"], "none.txt does not exist"),
        (["--recover", "--prune-ratios", "0.1", "--training-seqlen", "4096"], "allowed: 2 to 512"),
        (
            ["--recover", "--prune-ratios", "0.1", "--loss", "next-token", "--data", "student"],
            "teaches it nothing",
        ),
        (
            ["--recover", "--prune-ratios", "0.1", "--for-quant", "Q8_0"],
            "nothing that training could win back",
        ),
    ],
)
def test_bad_input_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    folder = tmp_path / "out"
    assert main(command(model, folder, *more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not folder.exists()


def test_a_script_may_leave_the_vocabulary_whole(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = ["--vocabulary-text", "missing.txt", "--limit", "8", "--recover", "--training-seqlen", "64"]
    assert main(command(model, tmp_path / "out", "--quants", "Q8_0", "--vocabularies", "0", *idle)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split(" without ")[0] for line in said] == [
        f"warning: {name} has no effect"
        for name in ("--limit", "--recover", "--vocabulary-text", "--training-seqlen")
    ]


def test_text_without_words(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n", encoding="utf-8")
    assert main(["frontier", str(model), "-o", str(tmp_path / "out"), "--text", str(empty)]) == 2
    assert "has no usable text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["notes.txt", "tiny-dense-Q4_0.gguf", "manifest.json"])
def test_a_folder_of_others_is_left_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / ".phoneready.lock").touch()
    (tmp_path / name).write_text("mine", encoding="utf-8")
    assert main(command(model, tmp_path)) == 2
    assert name in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [".phoneready.lock", name]


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ({"ids": [[[999999] * 64]]}, "the model has no token 999999"),
        ({"ids": [[[-1] * 64]]}, "greater than or equal to 0"),
        ({"ids": [[[1] * 64, [1] * 3]]}, "ids: every text has windows, of one length"),
        ({"ids": [[]]}, "ids: every text has windows, of one length"),
        ({"kinds": []}, "ids: every text has windows, of one length"),
        ({"kinds": [], "sources": [], "ids": [], "sha256": []}, "ids: every text has windows, of one length"),
    ],
)
def test_windows_that_no_run_has_kept(
    model: Path,
    measured: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    windows: dict[str, object],
    said: str,
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(measured / STATE, folder / STATE)
    (file,) = folder.glob(f"{STATE}/*/{WINDOWS_FILE}")
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | windows), encoding="utf-8")
    before = point_files(folder)
    assert main(command(model, folder, "--quants", "f16", "--no-speed")) == 2
    error = capsys.readouterr().err
    assert f"{WINDOWS_FILE}: " in error
    assert said in error
    assert point_files(folder) == before


def test_a_point_that_was_measured_on_nothing_is_refused() -> None:
    payload = record_to_json(point("p", 10, [1.0, 1.1]))
    assert record_from_json(FrontierPoint, payload, where="point.json").texts[0].n_tokens
    payload["texts"][0]["n_tokens"] = 0
    with pytest.raises(InputError, match=r"point\.json: texts\[0\]\.n_tokens"):
        record_from_json(FrontierPoint, payload, where="point.json")


@pytest.mark.parametrize("name", ["../notes.gguf", "/etc/passwd", "notes.txt", ""])
def test_a_record_names_no_file_elsewhere(name: str) -> None:
    payload = record_to_json(point("p", 10, [1.0, 1.1])) | {"file": name}
    with pytest.raises(InputError, match="not the name of a GGUF file"):
        record_from_json(FrontierPoint, payload, where="point.json")


def test_sizes() -> None:
    assert parse_sizes("70MB, 1MiB,70MB", "--at") == (70_000_000, 2**20)
    with pytest.raises(InputError, match="--at"):
        parse_sizes("70MB,-1", "--at")


BYTES = (100, 110, 90, 120, 105)


def point(
    file: str, size: int, bits: list[float], *, source: str = "t.txt", ratio: float = 0.0
) -> FrontierPoint:
    """A file that loses so many bits a byte on each window."""
    nats = tuple(math.log(2) * each * n for each, n in zip(bits, BYTES, strict=False))
    sizes = BYTES[: len(bits)]
    text = MeasuredText("text", source, 64, "f" * 64, 63 * len(bits), sizes, nats, nats)
    return FrontierPoint(f"{file}.gguf", size, (text,), file, ratio, ratio, "cfsp", 32, None, None, 1.0)


def result(*points: FrontierPoint, at: int = 100) -> Frontier:
    ordered = tuple(sorted(points, key=lambda p: p.file_bytes))
    standings = tuple(standing(p, ordered) for p in ordered)
    files = tuple(p.file for p in ordered)
    return Frontier("m", None, 0, ("c",), (), ordered, standings, (choose(ordered, at),), (), (), (), files)


def test_intervals_are_paired_over_windows() -> None:
    even = replace(point("a", 1, [2.0] * 5).texts[0], n_bytes=(100,) * 5)
    a, b = [1.0, 2.0, 1.5, 3.0, 2.2], [1.1, 2.1, 1.65, 3.05, 2.35]
    one, other = (
        replace(point("p", 1, a), texts=(replace(even, nats=tuple(100 * math.log(2) * v for v in values)),))
        for values in (b, a)
    )
    found = excess(one, other)
    differences = [y - x for x, y in zip(a, b, strict=True)]
    half = 2.776 * statistics.stdev(differences) / math.sqrt(5)
    assert found.bits == pytest.approx(statistics.mean(differences))
    assert (found.low, found.high) == pytest.approx((found.bits - half, found.bits + half), rel=5e-3)
    back = excess(other, one)
    assert back.low is not None
    assert (back.bits, back.low) == pytest.approx((-found.bits, -(found.high or 0)))


def test_dominance_is_surely_no_larger_and_no_worse() -> None:
    good = point("good", 50, [1.0, 1.1, 0.9, 1.0, 1.05])
    worse = point("worse", 60, [1.2, 1.31, 1.1, 1.19, 1.26])
    noisy = point("noisy", 60, [1.4, 0.8, 1.2, 0.7, 1.0])
    small = point("small", 40, [1.2, 1.31, 1.1, 1.19, 1.26])
    together = [good, worse, noisy, small]
    assert standing(worse, together).verdict == DOMINATED
    assert standing(worse, together).by == "good.gguf"
    assert standing(noisy, together).verdict == UNDECIDED
    assert standing(good, together).verdict == FRONTIER
    assert standing(small, together).verdict == FRONTIER


def test_ties() -> None:
    bits = [1.0, 1.1, 0.9, 1.0, 1.05]
    same, larger = [point("a", 50, bits), point("b", 50, bits)], point("c", 51, bits)
    assert [standing(one, same).verdict for one in same] == [FRONTIER, FRONTIER]
    assert standing(larger, [*same, larger]).verdict == DOMINATED
    assert choose([larger, *reversed(same)], 60).best == "a.gguf"


def test_one_window_says_nothing_of_noise() -> None:
    good, worse = point("good", 50, [1.0]), point("worse", 60, [2.0])
    assert standing(worse, [good, worse]).verdict == UNDECIDED
    assert excess(worse, good).low is None


def test_a_dense_file_that_dominates_is_named_first() -> None:
    dense = point("dense", 50, [1.0, 1.1, 0.9, 1.0, 1.05])
    best = point("best", 55, [0.9, 1.0, 0.8, 0.9, 0.95], ratio=0.1)
    beaten = point("beaten", 60, [1.2, 1.31, 1.1, 1.19, 1.26], ratio=0.2)
    assert standing(beaten, [dense, best, beaten]).by == "dense.gguf"


def test_sizes_to_tell_of() -> None:
    files = [
        point("tiny", 50, [1.3, 1.4], ratio=0.2),
        point("worse", 60, [1.5, 1.6], ratio=0.1),
        point("small", 70, [1.2, 1.3]),
        point("pruned", 75, [1.1, 1.2], ratio=0.1),
        point("beaten", 80, [1.4, 1.5]),
        point("large", 90, [1.0, 1.1]),
    ]
    # Of pruned files between dense ones the next dense size tells.
    assert telling_sizes(files) == (50, 70, 80, 90)
    assert telling_sizes([]) == ()


def test_sentences() -> None:
    dense = point("d", 90, [1.0, 1.1, 0.9, 1.0, 1.05])
    lost = point("low", 70, [1.5, 1.6, 1.42, 1.5, 1.55])
    pruned = point("p", 69, [1.1, 1.2, 1.0, 1.11, 1.15], ratio=0.1)
    bad = point("bad", 95, [1.3, 1.4, 1.2, 1.31, 1.35], ratio=0.2)
    near = point("near", 69, [1.1, 0.9, 1.2, 0.8, 1.0], ratio=0.1)
    text = format_frontier(result(dense, lost, pruned, at=75))
    assert "the best file is FFN -10 % p" in text
    assert "Quantizing the dense model to that, dense low" in text
    assert "0 of 1 pruned files are dominated" in text
    assert "No quantization of the dense model gets there; its smallest file is dense low" in format_frontier(
        result(dense, lost, pruned, at=69)
    )
    assert "there is no file; the smallest is FFN -10 % p" in format_frontier(result(dense, pruned, at=1))
    assert "nothing pruned is better there" in format_frontier(result(dense, bad, at=95))
    assert "every pruned file is dominated by a dense quantization" in format_frontier(result(dense, bad))
    assert "is within the noise" in format_frontier(result(dense, near))
    assert "Pruning does not pay" not in format_frontier(result(dense))


def test_the_best_file_of_a_speed() -> None:
    def timed(file: FrontierPoint, times: float | None) -> FrontierPoint:
        speed = Speed("tg64", 1, 100.0, 90.0, 110.0, None, None, times, times, times, in_turns=True)
        return replace(file, speed=speed)

    base = timed(replace(point("d", 90, [1.0, 1.1, 0.9, 1.0, 1.05]), quant="Q4_0"), 1.0)
    quick = timed(point("low", 70, [1.5, 1.6, 1.42, 1.5, 1.55]), 1.3)
    pruned = timed(point("p", 69, [1.1, 1.2, 1.0, 1.11, 1.15], ratio=0.1), 1.2)
    noisy = timed(point("noisy", 60, [0.1, 0.1, 0.1, 0.1, 0.1]), None)
    points = (base, quick, pruned, noisy, point("untimed", 60, [0.1, 0.1, 0.1, 0.1, 0.1]))
    found = choose_by_speed(points, (1.0, 1.2, 1.25, 2.0))
    assert [(one.best, one.dense) for one in found] == [
        ("d.gguf", "d.gguf"),
        ("p.gguf", "low.gguf"),
        ("low.gguf", "low.gguf"),
        (None, None),
    ]
    text = format_frontier(replace(result(*points), speed_choices=found))
    assert "At 1.2 times the decode of dense Q4_0 the best file is FFN -10 % p" in text
    assert "At 2 times the decode of dense Q4_0 there is no file; the fastest is dense low" in text
    assert "1.20 (1.20 to 1.20)" in text
    assert "too noisy to tell" in text
    assert choose_by_speed((noisy, points[-1]), (1.2,)) == ()


def test_the_page_has_a_plot_of_everything_that_was_measured() -> None:
    pytest.importorskip("plotly", reason="the report extra is not installed")
    windows = [1.0, 1.1, 0.9, 1.0, 1.05]
    dense, beaten, fewer = (
        point("d", 70, windows),
        point("b", 90, [2 * x for x in windows]),
        point("f", 60, windows),
    )
    fewer = replace(fewer, vocabulary=300, prune_ratio=0.1)

    def with_figures(file: FrontierPoint, number: int) -> FrontierPoint:
        """KL of 0.1 and more, 1 MiB and more, an accuracy of 0.5 and more; nothing of the first can be told."""
        right = TaskMetric("acc", 0.5 + number / 10, 0.02 * number or None, higher_is_better=True)
        task = TaskResult("odd<task", "1", "lm_eval", None, 10, None, 0, (right,))
        speed = Speed(
            "tg64", 1, 100.0, 90.0, 110.0, number * 2**20 or None, None, 1.0, 0.9, 1.1, in_turns=True
        )
        texts = tuple(replace(text, kl_mean=0.1 * number) for text in file.texts)
        return replace(file, texts=texts, speed=speed, tasks=(task,))

    found = result(*(with_figures(file, number) for number, file in enumerate((dense, beaten, fewer))))
    page = render_frontier(found)
    plots = json.loads(page.split('id="specs">')[1].split("</script>")[0])["plots"]
    assert list(plots) == ["plot-size", "plot-speed", "plot-memory", "plot-kl", "plot-task-0"]

    def places(name: str) -> dict[str, tuple[float, float, str]]:
        """A file's (x, y, symbol)."""
        return {
            text: (x, y, symbol)
            for trace in plots[name]["data"]
            for text, x, y, symbol in zip(
                trace["text"], trace["x"], trace["y"], trace["marker"]["symbol"], strict=True
            )
        }

    assert places("plot-memory").keys() == {"b", "f"}
    assert places("plot-memory")["b"] == (1.0, beaten.bits_per_byte, "circle-open")
    assert places("plot-kl").keys() == {"d", "b"}, "the KL of fewer tokens is another one"
    assert places("plot-kl")["d"][1] == 0
    assert {name: place[1] for name, place in places("plot-task-0").items()} == {"d": 0.5, "b": 0.6, "f": 0.7}
    assert [trace["error_y"]["array"] for trace in plots["plot-task-0"]["data"]] == [[0, 0.02], [0.04]]
    assert plots["plot-task-0"]["layout"]["yaxis"]["title"]["text"] == "odd&lt;task acc"
    assert "odd<task" not in page
    assert "Higher is better" in page
    few = result(point("d", 70, windows))
    shown = json.loads(render_frontier(few).split('id="specs">')[1].split("</script>")[0])["plots"]
    assert list(shown) == ["plot-size"]


def test_names_of_others_are_no_markup() -> None:
    pytest.importorskip("plotly", reason="the report extra is not installed")
    evil = "a|b<script>alert(1)</script>.txt"
    found = result(*(point(f, s, [1.0, 1.1], source=evil) for f, s in (("d|x", 90), ("<b>e", 80))))
    both = tuple(replace(p, texts=(*p.texts, replace(p.texts[0], kind="chats"))) for p in found.points)
    found = replace(found, source="<img src=x>", points=both)
    rows = [line for line in format_frontier(found).splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    page = render_frontier(found)
    assert "<script>alert" not in page
    assert "<img src=x>" not in page
    assert "<b>e" not in page
