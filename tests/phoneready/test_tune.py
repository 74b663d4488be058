"""`phoneready tune` on a tiny model: every trial is a real file, judged in llama.cpp."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
pytest.importorskip("optuna", reason="the tune extra is not installed")

from cfsp.errors import InputError, LimitError
from cfsp.records import read_record, write_record
from phoneready.figures.figure_set import PRUNED, Figure, FigureSet
from phoneready.figures.metrics import FigureKey
from phoneready.figures.verdict import PASS, BudgetVerdict
from phoneready.main import main
from phoneready.settings.release import load_config
from phoneready.tune.forecast import Forecast, MeasuredPoint
from phoneready.tune.limits import BudgetCheck, Judged, Limits
from phoneready.tune.result import TrialRow, TuneResult, format_result, release_toml
from phoneready.tune.run import RELEASE_FILE, RESULT_FILE, STUDY_FILE, TABLE_FILE, study_key, tune
from phoneready.tune.search import Searcher
from phoneready.tune.space import Point, Recipe, config_of, recipes_of
from phoneready.tune.trial import Bench
from phoneready.tune.trial_runner import TrialRunner

TinyPath = Callable[..., Path]
CONFIG = """
[model]
reference = "{model}"
[prune]
calibration = ["builtin:python-docs"]
nsamples = 4
seqlen = 64
[evaluate]
text = ["builtin:python-docs"]
chats = []
seqlen = 64
max_windows = 2
prompts = ["List three fruits."]
max_new_tokens = 2
[export]
quants = ["Q8_0"]
[bench]
n_prompt = [8]
n_gen = [2]
ttft = [4]
n_threads = [1]
repetitions = 1
check_text = false
"""


@pytest.fixture(scope="module")
def model(tiny_folder: TinyPath) -> Path:
    return tiny_folder("llama")


@pytest.fixture(scope="module")
def wide_model(tiny_folder: TinyPath) -> Path:
    """Sixteen units of 32 channels, too; no ratio leaves a row so short that llama.cpp's kernels read beyond it."""
    return tiny_folder("llama", intermediate_size=256, num_hidden_layers=2)


def write(folder: Path, model: Path, more: str) -> Path:
    path = folder / "release.toml"
    path.write_text(CONFIG.format(model=model) + more, encoding="utf-8")
    return path


def search(path: Path, output: Path) -> TuneResult:
    return tune(load_config(path), output, show=lambda line: None, threads=1)


SIZE_BUDGET = """
[[budgets]]
metric = "file_bytes"
at_most = {limit}
"""


def sizes(path: Path, folder: Path, model: Path) -> dict[float, int]:
    """Size of the file at every ratio that widths in multiples of 32 can have."""
    config = load_config(path)
    shop = TrialRunner(config, folder, threads=1)
    recipe = Recipe("Q8_0", "cfsp", 32, False)
    return {
        units / 16: shop.sizes().file_bytes("Q8_0", shop.plan(Point(recipe, units / 16)).shape)
        for units in range(9)
    }


def test_best_quality_within_a_size(
    wide_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write(tmp_path, wide_model, "")
    known = sizes(plain, tmp_path / "sizes", wide_model)
    limit = known[5 / 16]
    path = write(tmp_path, wide_model, "[tune]\ntrials = 5\n" + SIZE_BUDGET.format(limit=limit))
    output = tmp_path / "tuned"
    assert main(["tune", str(path), "-o", str(output), "--threads", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == 0
    result = read_record(TuneResult, output / RESULT_FILE)
    assert result.calibrations == 1
    best = result.best
    assert best is not None
    assert best.prune_ratio == 5 / 16
    assert len(result.trials) == 4
    for row in result.trials:
        assert abs(row.file_bytes - known[row.prune_ratio]) <= 32
        assert row.meets == (row.file_bytes <= limit)
    assert result.pareto[-1] == min(result.trials, key=lambda row: row.divergence).number
    assert "chosen" in (output / TABLE_FILE).read_text(encoding="utf-8")
    assert not [p for p in (output / "state").rglob("*") if p.is_file() and p.suffix != ".json"]

    # The chosen configuration is a release, and its file has exactly the bytes that the trial had.
    chosen = load_config(output / RELEASE_FILE)
    assert (chosen.prune.prune_ratio, chosen.prune.align, chosen.tune) == (5 / 16, 32, None)
    assert (
        main(["release", str(output / RELEASE_FILE), "-o", str(tmp_path / "release"), "--threads", "1"]) == 0
    )
    released = next((tmp_path / "release").glob("*pruned31_25-Q8_0.gguf"))
    assert released.stat().st_size == best.file_bytes <= limit

    # Once more: everything is known already, even for another budget.
    again = search(path, output)
    assert (again.calibrations, again.trials, again.chosen) == (0, result.trials, 0)
    wider = write(
        tmp_path, wide_model, "[tune]\ntrials = 5\n" + SIZE_BUDGET.format(limit=best.file_bytes + 64)
    )
    assert search(wider, output).trials[:4] == result.trials

    # A budget that wants what the trials do not know: they are made anew.
    relative = '[[budgets]]\nmetric = "file_bytes"\nat_most = 0.95\nrelative_to = "dense"\n'
    held = search(write(tmp_path, wide_model, "[tune]\ntrials = 5\n" + relative), output)
    assert held.trials
    assert not any(row.is_open for row in held.trials)

    with pytest.raises(LimitError):
        search(write(tmp_path, wide_model, SIZE_BUDGET.format(limit='"1 kB"')), output)
    assert not (output / RELEASE_FILE).exists()


@pytest.mark.parametrize(
    ("section", "setting"),
    [("bench", 'devices = ["pixel-8a"]\nn_ctx = {}'), ("export", "rounding_windows = {}")],
)
def test_what_figures_of_trials_depend_on_begins_a_new_study(
    section: str, setting: str, model: Path, tmp_path: Path
) -> None:
    text = CONFIG.format(model=model)
    keys = []
    for value in (2048, 8192):
        path = tmp_path / "release.toml"
        changed = f"[{section}]\n{setting.format(value)}\n"
        path.write_text(text.replace(f"[{section}]\n", changed), encoding="utf-8")
        keys.append(study_key(load_config(path), tmp_path / "tuned"))
    assert keys[0] != keys[1]


def test_a_point_that_failed_does_not_keep_others_from_being_tried(model: Path, tmp_path: Path) -> None:
    path = write(tmp_path, model, '[tune]\nallocations = ["cfsp", "uniform"]\n')
    config = load_config(path)
    bench = Bench(TrialRunner(config, tmp_path / "shop", threads=1), Limits(config))
    searcher = Searcher(bench, recipes_of(config))
    first = searcher.next([])
    assert first is not None
    second = searcher.next([], {first.point})
    assert second is not None
    assert second.point.recipe != first.point.recipe
    assert searcher.next([], {first.point, second.point}) is None


def test_the_release_of_an_onnx_point_is_held_to_that_files_budgets(model: Path, tmp_path: Path) -> None:
    more = SIZE_BUDGET.format(limit='"70 MB"') + '[[budgets]]\nmetric = "kl_mean"\nat_most = 1.0\n'
    config = load_config(write(tmp_path, model, more + '[tune]\nfiles = ["int8", "Q8_0"]\n'))
    onnx = config_of(config, Point(Recipe("int8", "cfsp", 32, False), 0.25))
    assert [budget.files for budget in onnx.budgets] == [("int8",), ("checkpoint",)]
    gguf = config_of(config, Point(Recipe("Q8_0", "cfsp", 32, False), 0.25))
    assert [budget.files for budget in gguf.budgets] == [(), ()]


def test_a_search_does_not_overwrite_its_configuration(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, "")
    before = path.read_text(encoding="utf-8")
    assert main(["tune", str(path), "-o", str(tmp_path)]) == 2
    assert "would overwrite its configuration" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == before


def test_the_chosen_configuration_works_from_anywhere(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, model, "").write_text(
        CONFIG.format(model=model).replace('["builtin:python-docs"]\nnsamples', '["text.txt"]\nnsamples'),
        encoding="utf-8",
    )
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("release.toml"))
    written = tomllib.loads(release_toml(config, Point(Recipe("Q8_0", "cfsp", 32, False), 0.25)))
    assert written["prune"]["calibration"] == [str(tmp_path / "text.txt")]


def test_smallest_file_within_a_divergence(model: Path, tmp_path: Path) -> None:
    tuning = '[tune]\ngoal = "size"\njudge = "checkpoint"\ntrials = 8\ntolerance = 0.0\n'
    budget = '[[budgets]]\nmetric = "kl_mean"\nat_most = {limit}\n'
    path = write(tmp_path, model, tuning + budget.format(limit=1.0))
    config = load_config(path)
    recipe = Recipe("Q8_0", "cfsp", 32, False)
    bench = Bench(TrialRunner(config, tmp_path / "shop", threads=1), Limits(config))
    curve = {}
    for units in range(9):
        figures = bench.measure(Point(recipe, units / 16)).figures.figures
        curve[units / 16] = next(f.value for f in figures if f.key.metric == "kl_mean") or 0.0
    limit = (curve[3 / 16] + curve[4 / 16]) / 2
    path = write(tmp_path, model, tuning + budget.format(limit=limit))
    result = search(path, tmp_path / "tuned")
    best = result.best
    assert best is not None
    assert best.divergence == curve[best.prune_ratio] <= limit
    # The search takes the curve to rise; it ends where the next ratio is beyond the limit.
    assert curve[best.prune_ratio + 1 / 16] > limit
    tried = {row.prune_ratio for row in result.trials}
    assert best.prune_ratio + 1 / 16 in tried
    assert len(tried) == len(result.trials)


def test_an_anchor_takes_turns_with_what_is_tried(model: Path, tmp_path: Path) -> None:
    assert main(["export", str(model), "-o", str(tmp_path / "files"), "--gguf", "Q8_0"]) == 0
    (anchor,) = (tmp_path / "files").glob("*.gguf")
    path = write(tmp_path, model, '[[budgets]]\nmetric = "tg2"\nat_least = 1.0\n')
    config = load_config(path, [f'bench.anchor="{anchor}"'])
    bench = Bench(TrialRunner(config, tmp_path / "shop", threads=1), Limits(config))
    figures = bench.measure(Point(Recipe("Q8_0", "cfsp", 32, False), 0.25)).figures.figures
    (speed,) = (figure for figure in figures if figure.key.metric == "tg2")
    assert len(speed.anchor_samples) == len(speed.samples) == 1
    assert "anchor" in speed.conditions


def test_vocabularies_are_searched_beside_ratios(wide_model: Path, tmp_path: Path) -> None:
    known = sizes(write(tmp_path, wide_model, ""), tmp_path / "sizes", wide_model)
    more = "[tune]\nvocabularies = [0, 300]\ntrials = 6\n" + SIZE_BUDGET.format(limit=known[5 / 16])
    output = tmp_path / "tuned"
    result = search(write(tmp_path, wide_model, more), output)
    assert not result.failed
    assert result.calibrations == 2
    by_tokens = {size: [row for row in result.trials if row.vocabulary == size] for size in (0, 300)}
    assert min(row.prune_ratio for row in by_tokens[0] if row.meets) == 5 / 16
    # 84 tokens of 64 numbers, their texts and merges take as much as a unit of channels.
    assert 0 < min(row.prune_ratio for row in by_tokens[300] if row.meets) < 5 / 16
    assert result.best is not None
    assert result.best.divergence == min(row.divergence for row in result.trials if row.meets)
    table = (output / TABLE_FILE).read_text(encoding="utf-8")
    assert re.search(r"\| +300 tokens \|", table)
    assert "bits/byte, x dense" in table
    assert f"bits per byte {result.best.bits_ratio:.4f} x dense" in table
    assert all(row.bits_ratio is not None and 0.5 < row.bits_ratio < 2 for row in result.trials)
    for one in result.outlook:
        assert one.bits_ratio is not None
        assert one.bits_ratio[1] <= one.bits_ratio[0] <= one.bits_ratio[2]
    chosen = load_config(output / RELEASE_FILE)
    assert chosen.prune.vocabulary == result.best.vocabulary
    assert main(["release", str(output / RELEASE_FILE), "-o", str(tmp_path / "out"), "--threads", "1"]) == 0
    (file,) = (path for path in (tmp_path / "out").glob("*.gguf") if "dense" not in path.name)
    assert file.stat().st_size == result.best.file_bytes


def test_blocks_and_groups_are_searched_beside_ratios(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_folder("llama", intermediate_size=512, num_hidden_layers=3, head_dim=32)
    config = write(tmp_path, model, "")
    config.write_text(
        config.read_text().replace("seqlen = 64\n[eval", "seqlen = 64\nkv_groups = 0.34\n[eval")
    )
    limit = sizes(config, tmp_path / "sizes", model)[5 / 16]
    config.write_text(config.read_text() + "[tune]\nblocks = [1, 0]\n" + SIZE_BUDGET.format(limit=limit))
    output = tmp_path / "tuned"
    result = search(config, output)
    assert not result.failed
    assert {(row.blocks, row.kv_groups) for row in result.trials} == {(0, 0.34), (1, 0.34)}
    assert result.calibrations == 1
    # A block takes more than the budget, so that no channel of the others has to go.
    assert min(row.prune_ratio for row in result.trials if row.blocks and row.meets) == 0
    assert min(row.prune_ratio for row in result.trials if not row.blocks and row.meets) < 5 / 16
    assert re.search(r"\| +-1 blocks, KV groups -34 % \|", (output / TABLE_FILE).read_text(encoding="utf-8"))
    best = result.best
    assert best is not None
    chosen = load_config(output / RELEASE_FILE)
    assert (chosen.prune.blocks, chosen.prune.kv_groups) == (best.blocks, best.kv_groups)
    assert main(["release", str(output / RELEASE_FILE), "-o", str(tmp_path / "out"), "--threads", "1"]) == 0
    (file,) = (path for path in (tmp_path / "out").glob("*.gguf") if "dense" not in path.name)
    assert file.stat().st_size == best.file_bytes


def test_what_llama_cpp_cannot_hold_is_left_out(
    tiny_folder: TinyPath, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no architecture for a qwen3 model of which some blocks do not attend."""
    config = write(tmp_path, tiny_folder("qwen3", intermediate_size=256), "")
    text = config.read_text(encoding="utf-8") + SIZE_BUDGET.format(limit=10**8)
    config.write_text(text + "[tune]\ntrials = 2\nattentions = [0, 1]\n", encoding="utf-8")
    result = search(config, tmp_path / "tuned")
    assert {row.attentions for row in result.trials} == {0}
    (why,) = result.failed
    assert "1 attentions" in why
    assert "llama.cpp" in why
    config.write_text(text + "[tune]\nattentions = [1]\n", encoding="utf-8")
    assert main(["tune", str(config), "-o", str(tmp_path / "none")]) == 2
    assert "llama.cpp" in capsys.readouterr().err.splitlines()[-1]


def test_a_search_that_stopped_goes_on_as_if_it_had_not(tiny_folder: TinyPath, tmp_path: Path) -> None:
    # Of rows of one block, which half of 64 channels are, llama.cpp's AMX kernels compute something else every time.
    model = tiny_folder(intermediate_size=512, num_hidden_layers=2)
    budget = '[[budgets]]\nmetric = "projected_memory_bytes"\ndevices = ["pixel-8a"]\nat_most = "4 GiB"\n'
    text = CONFIG.replace("[bench]", '[bench]\ndevices = ["pixel-8a"]') + "[tune]\ntrials = {trials}\n"
    text += 'allocations = ["cfsp", "uniform"]\n' + budget

    def run(trials: int, output: str) -> TuneResult:
        path = tmp_path / "release.toml"
        path.write_text(text.format(model=model, trials=trials), encoding="utf-8")
        return search(path, tmp_path / output)

    run(2, "stopped")
    journal = (tmp_path / "stopped" / STUDY_FILE).read_bytes()
    # As a kill in the middle of a write leaves it.
    (tmp_path / "stopped" / STUDY_FILE).write_bytes(journal + b'{"op_code": 4, "wor')
    stopped, whole = run(4, "stopped"), run(4, "whole")

    def timeless(result: TuneResult) -> list[tuple[object, ...]]:
        return [(r.prune_ratio, r.allocation, r.file_bytes) for r in result.trials]

    assert timeless(stopped) == timeless(whole)
    # llama.cpp need not round alike twice.
    divergences = [[row.divergence for row in result.trials] for result in (stopped, whole)]
    assert divergences[0] == pytest.approx(divergences[1], rel=0.05, abs=1e-3)
    assert {row.allocation for row in whole.trials} == {"cfsp", "uniform"}
    assert whole.trials[0].prune_ratio == 0
    assert any("projected" in name for name in whole.trials[0].others)
    assert "pixel-8a" in format_result(whole)


def test_a_budget_that_no_point_can_meet(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, model, SIZE_BUDGET.format(limit='"10 kB"'))
    with pytest.raises(LimitError, match=r"closest is prune_ratio 0\.5, Q8_0.*at most 10 kB"):
        search(path, tmp_path / "tuned")
    more = '[tune]\ntrials = 1\n[[budgets]]\nmetric = "same_top1"\nat_least = 1.0\n'
    path = write(tmp_path, model, more + SIZE_BUDGET.format(limit=170_000))
    assert main(["tune", str(path), "-o", str(tmp_path / "other"), "--threads", "1"]) == 1
    assert "none of 1 points meets the budgets; closest is prune_ratio" in capsys.readouterr().err
    assert not (tmp_path / "other" / RELEASE_FILE).exists()
    assert read_record(TuneResult, tmp_path / "other" / RESULT_FILE).chosen is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('[tune]\ngoal = "size"\n', "without a budget for the quality of Q8_0"),
        ("[tune]\nrecover = [true]\n", "no .recover. that says how"),
        ("[tune]\naligns = [100]\nmax_prune_ratio = 0.1\n", "reach no prune ratio"),
        (
            'targets = ["native"]\n[tune]\nfiles = ["Q8_0", "int8"]\n',
            "int8, cfsp.*native runs GGUF files only",
        ),
        ("[tune]\nmin_prune_ratio = 0.6\n", "min_prune_ratio is not below max_prune_ratio"),
        ("[tune]\nvocabularies = [0, 20]\n", "vocabulary: smaller than what has to stay"),
        ("[tune]\nvocabularies = [0, 900]\n", "vocabulary: out of range"),
        ("[tune]\nblocks = [0, 4]\n", "blocks: the first block stays"),
        ('[tune]\nfiles = ["Q9"]\nallocations = ["best"]\n', "unknown.*Q9.*unknown.*best"),
    ],
)
def test_what_cannot_be_searched(model: Path, tmp_path: Path, more: str, message: str) -> None:
    path = write(tmp_path, model, more)
    with pytest.raises(InputError, match=message):
        search(path, tmp_path / "tuned")


def test_everything_that_may_vary_is_combined(model: Path, tmp_path: Path) -> None:
    more = '[recover]\nmax_tokens = 64\n[tune]\nfiles = ["Q4_K_M", "int8"]\naligns = [0, 64]\nrecover = [true, false]\n'
    found = recipes_of(load_config(write(tmp_path, model, more)))
    assert {(r.item, r.align) for r in found} == {("Q4_K_M", 256), ("Q4_K_M", 64), ("int8", 32), ("int8", 64)}
    assert len(found) == 8


@pytest.mark.parametrize(
    ("loss", "ratio", "trains"), [("distill", 0.0, 0), ("distill", 0.1, 1), ("both", 0.0, 1)]
)
def test_nothing_is_trained_that_learns_nothing(
    model: Path, tmp_path: Path, loss: str, ratio: float, trains: int
) -> None:
    config = load_config(write(tmp_path, model, f'[recover]\nmax_tokens = 64\nloss = "{loss}"\n[tune]\n'))
    (recipe,) = recipes_of(config)
    assert (config_of(config, Point(recipe, ratio)).recover is not None) == bool(trains)


@pytest.mark.parametrize("order", [("int8", "Q8_0"), ("Q8_0", "int8")])
def test_figures_of_every_format_are_foretold_whichever_was_tried_first(
    model: Path, tmp_path: Path, order: tuple[str, ...]
) -> None:
    more = '[tune]\nfiles = ["int8", "Q8_0"]\n[[budgets]]\nmetric = "tg2"\nat_least = 0.1\n'
    path = write(tmp_path, model, more)
    text = path.read_text(encoding="utf-8").replace('quants = ["Q8_0"]', 'quants = ["Q8_0"]\nonnx = ["int8"]')
    path.write_text(text, encoding="utf-8")
    config, tried = load_config(path), []
    for number, item in enumerate(order):
        point = Point(Recipe(item, "cfsp", 32, False), 0.2)
        (budget,) = config_of(config, point).budgets
        verdict = BudgetVerdict("tg2", "file", "local", "", 5.0, None, None, PASS, "", "t/s")
        row = TrialRow(number, 0.2, 0.2, item, "cfsp", 32, False, 1000, 0.1, None, {}, True, False, "", 1.0)
        tried.append(MeasuredPoint(row, Judged((BudgetCheck(budget, verdict),))))
    forecast = Forecast(tried)
    for one in tried:
        assert list(forecast.figures(one.point)) == ["tg2 on local"]


def test_formats_and_recovery_are_tried_for_real(tiny_folder: TinyPath, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    pytest.importorskip("peft", reason="the recover extra is not installed")
    more = '[recover]\ndata = ["builtin:python-docs"]\nmax_tokens = 512\nseqlen = 64\nbatch_size = 2\n'
    more += '[tune]\nfiles = ["int8", "Q8_0"]\nrecover = [true, false]\ntrials = 4\nmin_prune_ratio = 0.2\n'
    more += '[[budgets]]\nmetric = "tg2"\nat_least = 0.1\n'
    path = write(tmp_path, tiny_folder(intermediate_size=256), more)
    text = path.read_text(encoding="utf-8").replace('quants = ["Q8_0"]', 'quants = ["Q8_0"]\nonnx = ["int8"]')
    path.write_text(text, encoding="utf-8")
    result = search(path, tmp_path / "tuned")
    assert not result.failed
    assert {row.file for row in result.trials} == {"int8", "Q8_0"}
    assert {row.recover for row in result.trials} == {True, False}
    assert result.calibrations == 1
    for row in result.trials:
        assert row.file_bytes > 0
        assert row.divergence > 0
        assert any(name.startswith("tg2") for name in row.others)
    best = result.best
    assert best is not None
    for outlook in result.outlook:
        (speed,) = outlook.others.values()
        assert speed[1] < speed[0] < speed[2]
    chosen = load_config(tmp_path / "tuned" / RELEASE_FILE)
    assert (chosen.recover is not None) == best.recover
    assert best.file in chosen.export.names


def test_a_killed_training_goes_on_where_it_was(tiny_folder: TinyPath, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the recover extra is not installed")
    more = '[recover]\ndata = ["builtin:python-docs"]\nmax_tokens = 1024\nseqlen = 64\nbatch_size = 2\n'
    path = write(tmp_path, tiny_folder(intermediate_size=256), f"{more}save_every = 2\n[tune]\n")
    point, steps = Point(Recipe("Q8_0", "cfsp", 32, True), 0.25), list[int]()

    def progress(description: str, done: int, total: int) -> None:
        if description.startswith("training"):
            steps.append(done)
            if steps == [1, 2, 3, 4, 5]:
                raise KeyboardInterrupt

    def make() -> Path:
        return TrialRunner(load_config(path), tmp_path / "state", threads=1, progress=progress).make(point)

    with pytest.raises(KeyboardInterrupt):
        make()
    checkpoint = make()
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert not checkpoint.with_name(f"{checkpoint.name}.work").exists()


def test_a_baseline_of_another_model_is_refused_before_any_trial(model: Path, tmp_path: Path) -> None:
    key = FigureKey("file_bytes", "Q8_0")
    figure = Figure(key, PRUNED, "other.gguf", "bytes", 100_000)
    write_record(tmp_path / "figures.json", FigureSet("another model", "f" * 64, 0, (figure,)))
    more = '[baseline]\nfile = "figures.json"\n[[budgets]]\nmetric = "file_bytes"\nat_most = 1.0\n'
    path = write(tmp_path, model, more + 'relative_to = "baseline"\n')
    with pytest.raises(InputError, match="of another model: another model"):
        search(path, tmp_path / "tuned")
    assert not (tmp_path / "tuned" / STUDY_FILE).exists()


def test_a_vocabulary_that_needs_too_many_tokens_is_given_up(wide_model: Path, tmp_path: Path) -> None:
    """No ratio changes how many tokens a text takes, so one trial settles it."""
    more = """
[tune]
goal = "size"
vocabularies = [0, 300]
min_prune_ratio = 0.25
[[budgets]]
metric = "kl_mean"
at_most = 100
[[budgets]]
metric = "tokens_per_byte"
files = ["checkpoint"]
relative_to = "dense"
at_most = 1.0
"""
    result = search(write(tmp_path, wide_model, more), tmp_path / "tuned")
    assert [row.meets for row in result.trials if row.vocabulary == 300] == [False]
    assert result.best is not None
    assert result.best.prune_ratio == 0.5
    assert result.best.others["tokens_per_byte, text builtin:python-docs"] == 1.0
