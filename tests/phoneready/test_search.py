"""`phoneready search` on a tiny model: every point is a real file, judged in llama.cpp."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")

from cfsp.errors import InconclusiveError, InputError, LimitError
from cfsp.evaluation.loss import Distance
from cfsp.records import read_record, record_from_json, record_to_json
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
from phoneready.search import run as search_run
from phoneready.search.evaluate import Evaluator, Subject
from phoneready.search.point import Point, SearchSettings
from phoneready.search.record import (
    EvaluatedPoint,
    SearchRecord,
    Speed,
    format_search,
    outcome_of,
    render_search,
)
from phoneready.search.run import PLOT_FILE, RESULT_FILE, TABLE_FILE, check_search
from phoneready.settings.schema import ModelConfig, PruneConfig

TinyPath = Callable[..., Path]
SMALL = (
    *("--text", "builtin:python-docs", "--set", "seqlen=64", "--set", "max_windows=4", "--threads", "1"),
    *("--calibration", "builtin:python-docs", "--set", "nsamples=4"),
)


@pytest.fixture(scope="module")
def model(tiny_folder: TinyPath) -> Path:
    return tiny_folder("llama")


def command(model: Path, folder: Path, *more: str) -> list[str]:
    return ["search", str(model), "-o", str(folder), *SMALL, *more]


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("measured/*/points/*.json")}


def found_in(folder: Path) -> SearchRecord:
    return read_record(SearchRecord, folder / RESULT_FILE)


GRID = ("--quants", "Q8_0,q4_0", "--vocabularies", "0,300", "--ratios", "0,0.25")


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


def test_every_combination_is_measured_on_the_same_text(measured: Path) -> None:
    found = found_in(measured)
    combinations = {(one.point.vocabulary, one.point.ratio, one.point.quant) for one in found.points}
    assert combinations == {(v, r, q) for v in (0, 300) for r in (0.0, 0.25) for q in ("Q8_0", "Q4_0")}
    first = found.points[0].texts[0]
    for one in found.points:
        (text,) = one.texts
        assert one.expected_bytes is not None
        assert abs(one.file_bytes - one.expected_bytes) <= 128, "files say their names"
        assert (text.windows_sha256, text.n_bytes, text.seqlen) == (first.windows_sha256, first.n_bytes, 64)
        assert text.against_nats == pytest.approx(first.against_nats)
        assert one.removed == (0.25 if one.point.ratio else 0)
        assert (text.n_tokens == (63,) * 4) == (not one.point.vocabulary)
    assert (found.failed, found.left_out) == ((), ())


def test_the_best_file_within_the_limits_is_left_with_its_record(measured: Path) -> None:
    found = found_in(measured)
    best = min(found.points, key=lambda one: one.bits_per_byte)
    assert found.best == best.file
    assert found.kept == (best.file,)
    assert [path.name for path in measured.glob("*.gguf")] == [best.file]
    table = (measured / TABLE_FILE).read_text(encoding="utf-8")
    assert f"The best file within size up to 1.00 GB is {best.label}" in table.replace("1000.0 MB", "1.00 GB")
    assert (measured / PLOT_FILE).read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not list(measured.glob("measured/*/work"))


def test_other_limits_take_what_is_known(
    model: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, known = records(measured), found_in(measured)
    sizes = sorted(one.file_bytes for one in known.points)
    capsys.readouterr()
    assert main(command(model, measured, *GRID, "--max-size", str(sizes[3]), "--json")) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert records(measured) == before
    assert "bits a byte" not in printed.err
    within = [one for one in known.points if one.file_bytes <= sizes[3]]
    assert result["best"] == min(within, key=lambda one: one.bits_per_byte).file
    assert (measured / result["best"]).is_file(), "made again"
    # Nothing fits: what is known before it is made tells, and the gate's status says so.
    assert main(command(model, measured, *GRID, "--max-kl", "1e-9", "--set", "max_bits=1e-9")) == 1
    assert "no file is within KL up to" in capsys.readouterr().err


def test_what_cannot_fit_is_not_made(
    model: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No text is read for the least size; what is too large is not made."""
    folder = tmp_path / "out"
    asked = ("--vocabularies", "0,300", "--quants")
    capsys.readouterr()
    assert main(command(model, folder, *asked, "Q8_0", "--max-size", "1kB")) == 2
    error = capsys.readouterr().err
    found = re.search(r"no file is so small .*allowed: more than (\d+) bytes", error)
    assert found, error
    assert not folder.exists()
    sizes = {one.point: one.file_bytes for one in found_in(measured).points}
    least = sizes[Point("Q8_0", 300)]
    assert 0.95 * least < int(found[1]) <= least
    assert main(command(model, folder, *asked, "Q8_0", "--max-size", f"{least}B")) == 0
    result = found_in(folder)
    assert [one.point for one in result.points] == [Point("Q8_0", 300)]
    assert any("dense Q8_0: size up to" in line for line in result.left_out)


def test_a_bisection_finds_the_least_ratio_that_fits(model: Path, measured: Path, tmp_path: Path) -> None:
    dense = next(
        one for one in found_in(measured).points if one.is_dense and one.point.quant == "Q8_0"
    ).file_bytes
    asked = ("--quants", "Q8_0", "--set", "strategy=bisect", "--ratios", "0,0.5")
    folder = tmp_path / "out"
    assert main(command(model, folder, *asked, "--max-size", str(dense - 20_000))) == 0
    found = found_in(folder)
    (one,) = found.points
    assert 0 < one.point.ratio < 0.5
    assert dense - 40_000 < one.file_bytes <= dense - 20_000
    assert len(found.left_out) == 1, "the dense file"


def test_bisections_of_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest ratio within a limit on quality; few points are looked at."""
    looked: list[float] = []

    class Known:
        settings = SearchSettings(max_kl=0.13)
        evaluator: Known

        def evaluate(self, one: Point) -> EvaluatedPoint:
            looked.append(one.ratio)
            made = point(f"{one.ratio}", 10, [1.0] * 5)
            text = made.texts[0]
            assert text.distance is not None
            far = replace(text.distance, kl=(63 * one.ratio,) * 5)
            return replace(made, point=one, texts=(replace(text, distance=far),))

        def held(self, one: EvaluatedPoint) -> Sequence[object]:
            return tuple(self.settings.held(kl=one.kl_mean))

    run = Known()
    run.evaluator = run
    line = [Point("Q8_0", ratio=step / 100) for step in range(51)]
    search_run._bisect(run, line)  # type: ignore[arg-type]
    assert looked[-1] == 0.13
    assert len(looked) <= 8


def test_steps_prune_and_train(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("accelerate", reason="the recover extra is not installed")
    training = tmp_path / "recover.toml"
    training.write_text(
        'method = "full"\nloss = "next-token"\ndata = ["builtin:python-docs"]\nmax_tokens = 2048\nseqlen = 64\n'
        "learning_rate = 5e-3\n"
    )
    folder = tmp_path / "out"
    asked = (
        "--quants",
        "Q8_0",
        "--set",
        "strategy=steps",
        "--ratios",
        "0.2,0.4",
        "--set",
        f"recover={training}",
    )
    assert main(command(model, folder, *asked, "--max-kl", "100")) == 0, capsys.readouterr().err
    found = found_in(folder)
    assert not found.failed
    made = {one.point.ratio: one for one in found.points}
    assert made.keys() == {0.0, 0.2, 0.4}
    assert made[0.4].point.steps == (0.2,)
    assert made[0.4].point.model == "FFN -40 %, recovered in 2 steps"
    assert made[0.4].file_bytes < made[0.2].file_bytes < made[0.0].file_bytes
    assert made[0.4].removed == pytest.approx(0.4, abs=0.13)
    assert found.best == made[0.4].file, "the smallest within a limit on quality"


def test_processes_share_a_search(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the search extra is not installed")
    shared = ("--quants", "Q8_0,Q4_0", "--ratios", "0,0.25", "--set", f"storage={tmp_path / 'study.jsonl'}")
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "phoneready", *command(model, tmp_path / name, *shared)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    told = [run.communicate(timeout=600)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    measured = sum("bits a byte" in line for text in told for line in text.splitlines())
    assert measured <= 5, "the last points may be made twice"
    for name in ("one", "two"):
        points = {(one.point.ratio, one.point.quant) for one in found_in(tmp_path / name).points}
        assert points == {(ratio, quant) for ratio in (0.0, 0.25) for quant in ("Q8_0", "Q4_0")}


def test_a_sampler_proposes_if_there_are_more_points_than_may_be_made(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="the search extra is not installed")
    folder = tmp_path / "out"
    asked = command(model, folder, "--quants", "Q8_0", "--ratios", "0.1,0.2,0.3,0.4", "--set", "max_points=2")
    assert main(asked) == 0
    found = found_in(folder)
    assert found.strategy == "optuna"
    assert "2 files at most" in capsys.readouterr().err
    assert len(found.points) == 2
    before = records(folder)
    assert main(asked) == 0
    assert records(folder) == before


def test_refusals(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna", reason="the search extra is not installed")
    folder = tmp_path / "out"
    for options, wrong in (
        ("--quants Q9", "quant: unknown quantization"),
        ("--ratios 1", "--ratios: out of range"),
        ("--vocabularies 3", "vocabulary"),
        ("--on nokia", "or a device profile: "),
        ("--set strategy=bisect", "--set strategy=bisect looks for a limit"),
        ("--set strategy=steps", "give --set recover=FILE and --ratios"),
        ("--set strategy=optuna", "give --set max_points"),
        ("--set storage=x.jsonl --set strategy=bisect --max-kl 1", "leave out --set strategy=bisect"),
        ("--set storage=sqlite:////missing/folder/x.db", "--set storage: cannot be opened"),
        ("--set recover=missing.toml", "missing.toml"),
        ("--max-size apples", "--max-size: not understood"),
        ("--text missing.txt", "missing.txt"),
        ("--set seqlen=100000", "longer than the model's context"),
    ):
        assert main(command(model, folder, *options.split())) == 2
        error = capsys.readouterr().err
        assert wrong in error
        assert error.count("error:") == 1
        assert not list(folder.glob("*.gguf"))


def test_folders_and_records_of_others_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frontier.json").write_text("{}")
    assert main(command(model, tmp_path)) == 2
    assert "is not a search folder" in capsys.readouterr().err
    for name in ("../notes.gguf", "/etc/passwd", "notes.txt", ""):
        payload = record_to_json(point("p", 10, [1.0, 1.1])) | {"file": name}
        with pytest.raises(InputError, match="not the name of a GGUF file"):
            record_from_json(EvaluatedPoint, payload, where="point.json")


BYTES = (100, 110, 90, 120, 105)


def point(
    file: str, size: int, bits: list[float], *, source: str = "t.txt", ratio: float = 0.0
) -> EvaluatedPoint:
    """A file that loses so many bits a byte on each window."""
    nats = tuple(math.log(2) * each * n for each, n in zip(bits, BYTES, strict=False))
    sizes = BYTES[: len(bits)]
    n, count = (63,) * len(bits), len(bits)
    distance = Distance((6.3,) * count, n, (57,) * count, 0.1, 0.2, 0.3)
    text = TextLoss("text", source, 64, "f" * 64, sizes, n, nats, n, nats, distance)
    return EvaluatedPoint(
        f"{file}.gguf", size, (text,), Point(file, ratio=ratio), "0" * 64, ratio, None, None, 1.0
    )


def result(*points: EvaluatedPoint, **more: object) -> SearchRecord:
    ordered = tuple(sorted(points, key=lambda p: p.file_bytes))
    standings = tuple(standing(p, ordered) for p in ordered)
    plain: dict[str, object] = {
        "source": "m", "source_sha256": None, "seed": 0, "calibration": ("c",), "strategy": "grid", "limits": (),
        "points": ordered, "held": ((),) * len(ordered), "standings": standings,
        "best": None, "best_dense": None, "left_out": (), "failed": (), "kept": (),
    }  # fmt: skip
    return SearchRecord(**{**plain, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "known", "outcome"),
    [
        ({"max_size": 100}, {"size": 100}, PASS),
        ({"max_size": 100}, {"size": 101}, MISSED),
        ({"max_kl": 0.1}, {"kl": 0.2}, MISSED),
        ({"max_bits": 1.05}, {"bits": 1.04}, PASS),
        ({"min_speed": 10.0}, {"speed": (11.0, 12.0)}, PASS),
        ({"min_speed": 10.0}, {"speed": (8.0, 9.0)}, MISSED),
        ({"min_speed": 10.0}, {"speed": (9.0, 12.0)}, INCONCLUSIVE),
        ({"on": "pixel-8a"}, {"fits": False}, MISSED),
        ({"max_size": 100, "max_kl": 0.1}, {"size": 90, "kl": 0.2}, MISSED),
    ],
)
def test_limits(limits: dict[str, float], known: dict[str, object], outcome: str) -> None:
    settings = SearchSettings(**limits)  # type: ignore[arg-type]
    assert outcome_of(tuple(settings.held(**known))) == outcome  # type: ignore[arg-type]
    assert len(settings.limits) == len(limits)


def test_the_gates_statuses() -> None:
    files = point("a", 10, [1.0] * 5), point("b", 20, [1.0] * 5, ratio=0.1)
    missed, open_ = (
        tuple(SearchSettings(min_speed=10.0).held(speed=span)) for span in ((1.0, 2.0), (9.0, 12.0))
    )
    check_search(result(*files))
    with pytest.raises(InconclusiveError):
        check_search(result(*files, held=(missed, open_), limits=("decode",)))
    with pytest.raises(LimitError):
        check_search(result(*files, held=(missed, missed), limits=("decode",)))


@pytest.mark.parametrize(
    ("speed", "outcome"),
    [
        (None, INCONCLUSIVE),
        (Speed("local", None, None, None, failure="the device went away"), INCONCLUSIVE),
        (Speed("constrained:1M", None, None, None, failure="does not fit: killed"), MISSED),
        (Speed("local", 9.0, 11.0, 2e8, n_threads=1), PASS),
    ],
)
def test_a_limit_without_a_figure_is_not_met(
    model: Path, tmp_path: Path, speed: Speed | None, outcome: str
) -> None:
    prune = PruneConfig(calibration=("builtin:python-docs",))
    subject = Subject(ModelConfig(reference=str(model)), 0, prune, None)
    asked = Evaluator(subject, SearchSettings(min_speed=5.0, max_memory=10**9), tmp_path)
    one = replace(point("Q4_0", 10, [1.0, 1.1]), speed=speed)
    assert outcome_of(asked.held(one)) == outcome
    asked.keep(one)
    elsewhere = Evaluator(subject, SearchSettings(min_speed=5.0, on="pixel-8a"), tmp_path)
    assert elsewhere.find(one.point) is None
    assert (asked.find(one.point) is not None) == (outcome == PASS)


def test_sentences_and_the_page() -> None:
    speed = Speed("local", 9.0, 11.0, 2e8, n_threads=1)
    dense = replace(point("Q4_0", 100, [1.0, 1.1, 0.9, 1.0, 1.05]), speed=speed)
    pruned = point("Q8_0<b>", 120, [1.2, 1.31, 1.1, 1.19, 1.26], ratio=0.25)
    found = result(dense, pruned)
    text = format_search(found)
    assert "the best file is dense Q4_0" in text
    assert "Pruning does not pay here" in text
    assert "measured at local" in text
    page = render_search(found)
    for plot in ("plot-size", "plot-speed", "plot-memory"):
        assert f'id="{plot}"' in page
    assert "Q8_0<b>" not in page
    smaller = point("Q4_0", 50, [1.2, 1.31, 1.1, 1.19, 1.26], ratio=0.25)
    limited = result(dense, smaller, limits=("size up to 60",), best=smaller.file, best_dense=None)
    assert "Pruning paid: no quantization of the dense model is within the limits." in format_search(limited)


def test_a_search_over_ratios_shows_what_each_cut_costs_and_brings() -> None:
    speed = Speed("local", 9.0, 11.0, 2e8, n_threads=1)
    ratios = (0.0, 0.1, 0.3)
    files = [
        replace(point(quant, size - int(50 * r), [1.0 + r] * 2, ratio=r), file=f"{quant}{i}.gguf", speed=speed)
        for quant, size in (("Q8_0<b>", 140), ("Q4_0", 90))
        for i, r in enumerate(ratios)
    ]  # fmt: skip
    page = render_search(result(*files))
    plots = json.loads(re.findall(r'id="specs">(.*?)</script>', page)[0])["plots"]
    for name, heights in (("loss", [1.0, 1.1, 1.3]), ("size", [9e-5, 8.5e-5, 7.5e-5]), ("speed", [9.0] * 3)):
        traces = {trace["name"]: trace for trace in plots[f"plot-cut-{name}"]["data"]}
        assert list(traces) == ["Q4_0", "Q8_0&lt;b&gt;"], "a line for each quantization"
        assert traces["Q4_0"]["x"] == pytest.approx([100 * r for r in ratios])
        assert traces["Q4_0"]["y"] == pytest.approx(heights)
        assert traces["Q4_0"]["mode"] == "lines+markers"
    assert "plot-cut" not in render_search(result(*files[:2])), "two ratios are no curve"


GOOD, WORSE = [1.0, 1.1, 0.9, 1.0, 1.05], [1.2, 1.31, 1.1, 1.19, 1.26]


def test_dominance_is_surely_no_larger_and_no_worse() -> None:
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
