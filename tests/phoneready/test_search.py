"""`phoneready search` on a tiny model: every point is a real file, proven and judged in llama.cpp; and what follows."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InconclusiveError, InputError, LimitError
from cfsp.evaluation.loss import Distance
from cfsp.files import sha256_file
from cfsp.models.gguf_file import read_gguf
from cfsp.records import read_record, record_from_json, record_to_json
from exporters.export_record import ExportManifest
from exporters.quantize.mixture import Option
from exporters.recipe import read_recipe
from phoneready.evaluation.evaluation_record import TextLoss
from phoneready.evaluation.measured_file import (
    DOMINATED,
    FRONTIER,
    UNDECIDED,
    choose,
    standing,
    telling_sizes,
)
from phoneready.figures.figures import INCONCLUSIVE, MISSED, PASS
from phoneready.main import main
from phoneready.publish.manifest import ReleaseManifest
from phoneready.search.evaluate import Evaluator
from phoneready.search.point import Point, SearchSettings
from phoneready.search.predict import Losses, Predictor
from phoneready.search.record import EvaluatedPoint, SearchRecord, format_search, outcome_of, render_search
from phoneready.search.run import PLOT_FILE, RESULT_FILE, TABLE_FILE, check_search

TinyPath = Callable[..., Path]
SMALL = (
    *("--text", "builtin:python-docs", "--chats", "builtin:python-docs", "--set", "eval_seqlen=64"),
    *("--set", "max_windows=4", "--threads", "1"),
    *("--calibration", "builtin:python-docs", "--set", "nsamples=4", "--set", "seqlen=64"),
)
GRID = ("--quants", "Q8_0,q4_0", "--vocabularies", "0,300", "--ratios", "0,0.25")


@pytest.fixture(scope="module")
def model(sure_folder: TinyPath) -> Path:
    return sure_folder("llama")


def command(model: Path, folder: Path, *more: str) -> list[str]:
    return ["search", str(model), "-o", str(folder), *SMALL, *more]


def records(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("stages/point-*/point.json")}


def found_in(folder: Path) -> SearchRecord:
    return read_record(SearchRecord, folder / RESULT_FILE)


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that was killed once and went on."""
    folder = tmp_path_factory.mktemp("search") / "out"
    asked = command(model, folder, *GRID, "--max-size", "1GB")
    with subprocess.Popen(
        [sys.executable, "-m", "phoneready", *asked],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
    ) as run:  # fmt: skip
        deadline = time.monotonic() + 300
        while len(records(folder)) < 2 and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.killpg(run.pid, signal.SIGKILL)
    before = records(folder)
    assert 2 <= len(before) < 8
    assert main(asked) == 0
    after = records(folder)
    assert {name: after[name] for name in before} == before
    return folder


def test_every_combination_is_proven_and_measured_on_the_same_text(measured: Path) -> None:
    found = found_in(measured)
    combinations = {(one.point.vocabulary, one.point.ratio, one.point.quant) for one in found.points}
    assert combinations == {(v, r, q) for v in (0, 300) for r in (0.0, 0.25) for q in ("Q8_0", "Q4_0")}
    for one in found.points:
        assert [text.windows_sha256 for text in one.texts] == [
            t.windows_sha256 for t in found.points[0].texts
        ]
        assert one.removed == (0.25 if one.point.ratio else 0)
        assert one.export.sha256 == one.sha256
        assert one.export.parity.limits, "proven against its checkpoint"
        assert one.export.tokenizer_strings > 0
        assert one.export.recipe.format == one.point.quant
        assert bool(one.export.recipe.pruning) == (not one.is_dense)
    assert (found.failed, found.left_out) == ((), ())


def test_the_best_file_is_left_with_what_made_it(measured: Path) -> None:
    found = found_in(measured)
    best = found.find(found.best)
    assert best is not None
    assert best == min(found.points, key=lambda one: one.bits_per_byte)
    assert [path.name for path in measured.glob("*.gguf")] == [best.file] == list(found.kept)
    assert sha256_file(measured / best.file) == best.sha256
    (export,) = read_record(ExportManifest, measured / "export.json").exports
    assert export == replace(best.export, file=best.file)
    assert read_recipe(read_gguf(measured / best.file).metadata, "it") == export.recipe
    assert "The best file within file_bytes at most" in (measured / TABLE_FILE).read_text(encoding="utf-8")
    assert (measured / PLOT_FILE).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(measured.glob("stages/export-*"))
    assert not list(measured.glob("stages/dense"))


def test_other_limits_make_the_same_file_again(
    model: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(measured, folder)
    before, known = records(folder), found_in(folder)
    sizes = sorted(one.file_bytes for one in known.points)
    capsys.readouterr()
    assert main(command(model, folder, *GRID, "--max-size", f"{sizes[3]}B", "--json")) == 0
    printed = capsys.readouterr()
    result = found_in(folder)
    best = result.find(result.best)
    assert best is not None
    assert "made again" in printed.err
    assert records(folder) == before
    assert (
        best.file
        == min(
            (one for one in known.points if one.file_bytes <= sizes[3]), key=lambda one: one.bits_per_byte
        ).file
    )
    assert sha256_file(folder / best.file) == best.sha256
    # A file that was changed is not the one that was measured: it is made again, too.
    with (folder / best.file).open("r+b") as stream:
        stream.write(b"????")
    assert main(command(model, folder, *GRID, "--max-size", f"{sizes[3]}B")) == 0
    assert sha256_file(folder / best.file) == best.sha256
    # Without limits, whatever was asked before, the files that no other dominates are there.
    assert main(command(model, folder, *GRID)) == 0
    assert {path.name for path in folder.glob("*.gguf")} == set(found_in(folder).kept) > {best.file}
    # Nothing is within: the gate's status says so.
    assert main(command(model, folder, *GRID, "--max-kl", "1e-9", "--set", "max_bits=1e-9")) == 1
    assert "no file is within kl_mean at most" in capsys.readouterr().err


def test_what_cannot_fit_is_not_made(
    model: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    asked = ("--vocabularies", "0,300", "--quants", "Q8_0")
    capsys.readouterr()
    assert main(command(model, folder, *asked, "--max-size", "1kB")) == 2
    error = capsys.readouterr().err
    found = re.search(r"no candidate fits.*allowed: more than (\d+) bytes", error)
    assert found, error
    assert not list(folder.glob("*.gguf"))
    sizes = {one.point: one.file_bytes for one in found_in(measured).points}
    least = sizes[Point("Q8_0", 300)]
    assert 0.9 * least < int(found[1]) <= least
    assert main(command(model, folder, *asked, "--max-size", f"{least}B")) == 0
    result = found_in(folder)
    assert [one.point for one in result.points] == [Point("Q8_0", 300)]
    assert any("dense Q8_0: " in line and "over the limit" in line for line in result.left_out)


@pytest.mark.parametrize("pruned", [False, True])
def test_what_search_finds_is_what_release_ships(
    model: Path,
    measured: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pruned: bool,
) -> None:
    """Tokens and types are chosen for a size; the same bytes pass the release's own proofs and gate."""
    monkeypatch.setattr("phoneready.search.evaluate.LEAST_TOKENS", 272)
    monkeypatch.setattr("phoneready.search.run.STEP", 16)
    folder, limit, more = tmp_path / "found", 150_000, ()
    if pruned:
        limit = next(one.file_bytes for one in found_in(measured).points if one.point == Point("Q8_0", 300))
        more = ("--quants", "Q8_0", "--vocabularies", "0,300")
    assert main(command(model, folder, "--max-size", f"{limit}B", *more)) == 0, capsys.readouterr().err
    found = found_in(folder)
    best = found.find(found.best)
    assert best is not None
    assert best.file_bytes <= limit
    assert (best.point.vocabulary, best.point.quant) == ((300, "Q8_0") if pruned else (0, "mixed-150kB"))
    config = tmp_path / "release.toml"
    assert main(["init", "--from", str(folder / RESULT_FILE), "-o", str(config)]) == 0
    small = ["n_gen=[4]", "n_prompt=[]", "ttft=[]", "repetitions=5"]
    asked = ["release", str(config), "--threads", "1", *(f"--set=bench.{one}" for one in small)]
    out = tmp_path / "out"
    assert main([*asked, "-o", str(out), "--set=evaluate.max_new_tokens=4"]) == 0, capsys.readouterr().err
    manifest = read_record(ReleaseManifest, out / "manifest.json")
    (shipped,) = (one for one in manifest.files if one.role == "shipped")
    assert shipped.sha256 == best.sha256 == sha256_file(out / shipped.file)
    assert json.loads((out / "verdicts.json").read_text(encoding="utf-8"))["outcome"] == PASS
    # What was changed, or moved away, is refused before any work.
    capsys.readouterr()
    with (folder / best.file).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"?")
    for asked in (
        ["release", str(config), "-o", str(tmp_path / "other")],
        ["init", "--from", str(folder / RESULT_FILE), "-o", str(tmp_path / "other.toml")],
    ):
        assert main(asked) == 2
        assert "was changed" in capsys.readouterr().err
    (folder / best.file).unlink()
    assert main(["init", "--from", str(folder / RESULT_FILE), "-o", str(tmp_path / "other.toml")]) == 2
    assert "is not there any more" in capsys.readouterr().err
    assert not list(tmp_path.glob("other*"))


def test_speed_is_measured_once_and_a_device_is_projected_to(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, asked = tmp_path / "out", ("--quants", "Q8_0")
    assert main(command(model, folder, *asked, "--min-speed", "0.1")) in (0, 3), capsys.readouterr().err
    (one,) = found_in(folder).points
    assert one.bench is not None
    assert one.memory_bytes is not None
    assert main(command(model, folder, *asked, "--min-speed", "0.2")) in (0, 3)
    assert found_in(folder).points[0].bench == one.bench
    assert main(command(model, folder, *asked, "--on", "pixel-8a")) == 0
    (there,) = found_in(folder).points
    assert there.bench is None
    assert {figure.key.metric for figure in there.projected} == {"projected_memory_bytes", "projected_tg"}


def test_refusals(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    for options, wrong in (
        ("--quants Q9", "quant: unknown quantization"),
        ("--quants int4", "search makes GGUF files"),
        ("--ratios 1", "--ratios: out of range"),
        ("--vocabularies 3", "vocabulary"),
        ("--on nokia", "or a device profile: "),
        ("--max-size apples", "--max-size: not understood"),
        ("--max-size 75", "75MB"),
        ("--text missing.txt", "missing.txt"),
        ("--set eval_seqlen=100000", "longer than the model's context"),
    ):
        assert main(command(model, folder, *options.split())) in (1, 2)
        error = capsys.readouterr().err
        assert wrong in error
        assert error.count("error:") == 1
        assert not list(folder.glob("*.gguf"))
    for options, wrong in (
        (["--from", str(tmp_path / "none.json")], "does not exist"),
        (["--from", "search.json", "--max-size", "1GB"], "leave out the others"),
    ):
        assert main(["init", "-o", str(tmp_path / "r.toml"), *options]) == 2
        assert wrong in capsys.readouterr().err


def test_folders_and_records_of_others_are_refused(
    model: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frontier.json").write_text("{}")
    assert main(command(model, tmp_path)) == 2
    assert "is not a search folder" in capsys.readouterr().err
    one = found_in(measured).points[0]
    for name in ("../notes.gguf", "/etc/passwd", "notes.txt", ""):
        with pytest.raises(InputError, match="not the name of a GGUF file"):
            record_from_json(EvaluatedPoint, record_to_json(one) | {"file": name}, where="point.json")


def test_a_prediction_learns_from_what_was_made() -> None:
    options = {
        "token_embd.weight": [Option("Q4_0", 400, 0.02), Option("Q8_0", 800, 0.0)],
        "blk.0.ffn_down.weight": [Option("Q4_0", 100, 0.1), Option("Q8_0", 200, 0.0)],
    }
    predictor = Predictor(options, 1000, lambda tokens: tokens // 100)
    assert predictor.predict(1000, 505) is None, "too small for any types"
    assert predictor.predict(1000, 510) == Losses(pytest.approx(0.12), pytest.approx(0.12))
    # Half of the tokens leave room for the other matrix, and cost what they cost in float32.
    predictor.trimmed[500] = Losses(0.01, 0.03)
    assert predictor.predict(500, 510) == Losses(pytest.approx(0.03), pytest.approx(0.05))
    predictor.trimmed[250] = Losses(0.04, 0.12)
    assert predictor.trim(354) == Losses(pytest.approx(0.02, rel=0.01), pytest.approx(0.06, rel=0.01))
    predictor.learn(1000, 510, 0.06)
    assert predictor.predict(1000, 510) == Losses(pytest.approx(0.06), pytest.approx(0.06))


@pytest.mark.parametrize(
    ("limits", "outcome"),
    [
        ({"max_size": 10**9}, PASS),
        ({"max_size": 100}, MISSED),
        ({"max_kl": 1e-9}, MISSED),
        ({"max_bits": 2.0}, PASS),
        ({"max_size": 10**9, "max_kl": 1e-9}, MISSED),
        ({"on": "pixel-8a"}, PASS),
    ],
)
def test_limits_are_budgets(measured: Path, limits: dict[str, float], outcome: str) -> None:
    found = found_in(measured)
    best = found.find(found.best)
    assert best is not None
    settings = SearchSettings(**limits)  # type: ignore[arg-type]
    asked = Evaluator(found.base, settings, measured)
    if settings.device:
        best = replace(best, projected=asked._projected(measured / best.file, best))
    assert outcome_of(asked.verdicts(best)) == outcome
    assert len(settings.budgets) == len(limits)


def test_what_writes_no_text_wins_nothing(measured: Path) -> None:
    found = found_in(measured)
    text = format_search(replace(found, points=tuple(replace(one, broken="loops") for one in found.points)))
    assert "What it writes is no text (loops)" in text


def test_the_gates_statuses(measured: Path) -> None:
    found = found_in(measured)
    held = tuple(tuple(replace(one, outcome=MISSED) for one in rows) for rows in found.held)
    check_search(found)
    with pytest.raises(LimitError):
        check_search(replace(found, held=held))
    with pytest.raises(InconclusiveError):
        check_search(replace(found, held=(*held[1:], (replace(found.held[0][0], outcome=INCONCLUSIVE),))))


BYTES = (100, 110, 90, 120, 105)
GOOD, WORSE = [1.0, 1.1, 0.9, 1.0, 1.05], [1.2, 1.31, 1.1, 1.19, 1.26]
MakePoint = Callable[..., EvaluatedPoint]


@pytest.fixture
def point(measured: Path) -> MakePoint:
    """Factory of files that lose so many bits per byte on each window; their exports are a real one's."""
    real = found_in(measured).points[0]

    def make(quant: str, size: int, bits: list[float], *, ratio: float = 0.0, **more: Any) -> EvaluatedPoint:
        nats = tuple(math.log(2) * each * n for each, n in zip(bits, BYTES, strict=False))
        sizes, n, count = BYTES[: len(bits)], (63,) * len(bits), len(bits)
        distance = Distance((6.3,) * count, n, (57,) * count, 0.1, 0.2, 0.3)
        text = TextLoss("text", "t.txt", 64, "f" * 64, sizes, n, nats, n, nats, distance)
        named = {"file": f"{quant}.gguf", "file_bytes": size, "texts": (text,), "removed": ratio}
        return replace(real, **{**named, "point": Point(quant, ratio=ratio), **more})

    return make


def result(found: SearchRecord, *points: EvaluatedPoint, **more: Any) -> SearchRecord:
    ordered = tuple(sorted(points, key=lambda p: p.file_bytes))
    standings = tuple(standing(p, ordered) for p in ordered)
    plain = {"points": ordered, "held": ((),) * len(ordered), "standings": standings, "limits": ()}
    return replace(found, **{**plain, "best": None, "best_dense": None, "kept": (), **more})


def test_sentences_and_the_page(measured: Path, point: MakePoint) -> None:
    known = found_in(measured)
    dense, pruned = point("Q4_0", 100, GOOD), point("Q8_0<b>", 120, WORSE, ratio=0.25)
    found = result(known, dense, pruned)
    text = format_search(found)
    assert "the best file is dense Q4_0" in text
    assert "Pruning does not pay here" in text
    page = render_search(found)
    assert 'id="plot-size"' in page
    assert "Q8_0<b>" not in page
    smaller = point("Q4_0", 50, WORSE, ratio=0.25)
    limited = result(known, dense, smaller, limits=known.limits, best=smaller.file)
    assert "Pruning paid: no quantization of the dense model is within the limits." in format_search(limited)


def test_a_search_over_ratios_shows_what_each_cut_costs_and_brings(measured: Path, point: MakePoint) -> None:
    ratios = (0.0, 0.1, 0.3)
    files = [
        point(quant, size - int(50 * r), [1.0 + r] * 2, ratio=r, file=f"{quant}{i}.gguf")
        for quant, size in (("Q8_0<b>", 140), ("Q4_0", 90))
        for i, r in enumerate(ratios)
    ]
    page = render_search(result(found_in(measured), *files))
    plots = json.loads(re.findall(r'id="specs">(.*?)</script>', page)[0])["plots"]
    for name, heights in (("loss", [1.0, 1.1, 1.3]), ("size", [9e-5, 8.5e-5, 7.5e-5])):
        traces = {trace["name"]: trace for trace in plots[f"plot-cut-{name}"]["data"]}
        assert list(traces) == ["Q4_0", "Q8_0&lt;b&gt;"], "a line for each quantization"
        assert traces["Q4_0"]["x"] == pytest.approx([100 * r for r in ratios])
        assert traces["Q4_0"]["y"] == pytest.approx(heights)
        assert traces["Q4_0"]["mode"] == "lines+markers"
    two = render_search(result(found_in(measured), *files[:2]))
    assert "plot-cut" not in two, "two ratios are no curve"


def test_dominance_is_surely_no_larger_and_no_worse(point: MakePoint) -> None:
    good, worse, small = point("good", 50, GOOD), point("worse", 60, WORSE), point("small", 40, WORSE)
    noisy, same = point("noisy", 60, [1.4, 0.8, 1.2, 0.7, 1.0]), point("same", 50, GOOD)
    files = [good, worse, noisy, small]
    found = {one.file: standing(one, files) for one in files}
    verdicts = {name.removesuffix(".gguf"): one.verdict for name, one in found.items()}
    assert verdicts == {"good": FRONTIER, "worse": DOMINATED, "noisy": UNDECIDED, "small": FRONTIER}
    assert found["worse.gguf"].by == "good.gguf"
    # Ties, one window, and a dense file that dominates, which is named first.
    assert [standing(one, [good, same]).verdict for one in (good, same)] == [FRONTIER, FRONTIER]
    larger = point("larger", 51, GOOD)
    assert standing(larger, [good, same, larger]).verdict == DOMINATED
    assert choose([larger, same, good], 60).best == "good.gguf"
    once = point("a", 50, [1.0]), point("b", 60, [2.0])
    assert standing(once[1], once).verdict == UNDECIDED
    best = point("best", 55, [0.9, 1.0, 0.8, 0.9, 0.95], ratio=0.1)
    assert standing(worse, [good, best, worse]).by == "good.gguf"


def test_sizes_to_tell_of(point: MakePoint) -> None:
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
