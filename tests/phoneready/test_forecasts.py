"""What stages will take grows with what is asked for, is said before a long one, and refused where it cannot fit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cfsp.errors import InputError
from cfsp.forecast import Extent, Work
from cfsp.precision import product_dtype
from cfsp.pruning.settings import PruneSettings
from cfsp.recovery.settings import RecoverySettings, Training
from exporters.families import FAMILIES, find_format
from phoneready.commands import recover
from phoneready.evaluation.settings import EvaluationSettings
from phoneready.forecasts import said
from phoneready.forecasts.said import Machine, foretell
from phoneready.forecasts.stages import (
    _FAMILIES,
    STAGES,
    Drawing,
    Exporting,
    Judging,
    Pruning,
    Recovering,
    Windows,
)
from phoneready.forecasts.texts import judged_windows
from phoneready.main import main
from phoneready.recipe import release_stages
from phoneready.release.foretold import _ROWS
from phoneready.settings.schema import ReleaseConfig

GGUF_NAMES = ("f32", "f16", "bf16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS")
TinyPath = Callable[..., Path]
SmallDisk = Callable[[str], Path]
BLOCK = ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))
SMALL = Extent((BLOCK,) * 4, 384, 64, tied=True)
LARGE = replace(SMALL, blocks=(BLOCK,) * 8)
TEXT = Windows(8, 64)
PRUNING, EXPORTING = Pruning(PruneSettings(), TEXT), Exporting(("Q4_0", "int4"), TEXT)
ASKED = {
    "draw": Drawing(TEXT, moments=True),
    "prune": PRUNING,
    "export": EXPORTING,
    "eval": Judging(TEXT, 4, 16, (False,)),
    "recover": Recovering(Training(max_tokens=4096, seqlen=64, loss="next-token")),
}


def operations(work: Work) -> float:
    return sum((*work.products.values(), *work.host_products.values()))


def elements(work: Work) -> float:
    return work.elements + work.host_elements


@pytest.mark.parametrize("stage", STAGES)
def test_a_larger_model_takes_more_of_everything(stage: str) -> None:
    small, large = (STAGES[stage].work([extent], ASKED[stage]) for extent in (SMALL, LARGE))
    assert operations(large) > operations(small)
    assert elements(large) > elements(small)
    assert large.memory > small.memory
    assert large.disk > small.disk or stage == "eval"


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("prune", replace(PRUNING, text=Windows(16, 64))),
        ("prune", Pruning(PruneSettings(blocks=1), TEXT)),
        ("export", replace(EXPORTING, names=("Q4_0", "Q8_0", "int4"))),
        ("export", replace(EXPORTING, text=Windows(16, 64))),
        ("export", replace(EXPORTING, tune_scales=True)),
        ("export", replace(EXPORTING, is_saved=True)),
        ("eval", Judging(TEXT, 4, 32, (False,))),
        ("recover", Recovering(Training(max_tokens=8192, seqlen=64, loss="next-token"))),
        ("recover", Recovering(Training(max_tokens=4096, seqlen=64, loss="distill"))),
        ("recover", Recovering(Training(max_tokens=4096, seqlen=64, loss="next-token", eval_every=1))),
        (
            "recover",
            Recovering(Training(max_tokens=4096, seqlen=64, loss="next-token", validation_windows=128)),
        ),
    ],
)
def test_what_is_asked_for_counts(stage: str, more: object) -> None:
    usual, work = (STAGES[stage].work([SMALL], asked) for asked in (ASKED[stage], more))
    assert operations(work) + elements(work) > operations(usual) + elements(usual)


def test_less_is_left_of_a_pruned_model_on_the_disk() -> None:
    light, heavy = (
        STAGES["prune"].work([SMALL], Pruning(PruneSettings(prune_ratio=ratio), TEXT)) for ratio in (0.2, 0.5)
    )
    assert heavy.disk < light.disk


@pytest.mark.parametrize("name", [name for family in FAMILIES.values() for name in family.formats])
def test_every_format_has_a_size_no_larger_than_floats(name: str) -> None:
    plain = Exporting((name,), is_proven=False)
    work = STAGES["export"].work([SMALL], plain)
    assert work.least_disk <= work.disk <= 8.1 * SMALL.n_weights
    assert work.least_disk or not find_format(name).is_sized
    assert operations(STAGES["export"].work([SMALL], replace(plain, is_proven=True))) > operations(work)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("recover", Recovering(Training(max_tokens=2**40, seqlen=64))),
        ("eval", Judging(Windows(2**20, 64), 4, 16, (False,))),
        ("eval", Judging(Windows(2**20, 64), 4, 16, (True,))),
    ],
)
def test_text_that_is_never_in_memory_at_once_is_not_asked_for(stage: str, more: object) -> None:
    usual, work = (STAGES[stage].work([SMALL], asked) for asked in (ASKED[stage], more))
    assert work.least_memory <= usual.least_memory


def test_a_file_in_its_own_runtime_need_not_fit_as_floats_and_is_run_on_the_cpu() -> None:
    whole, file = (STAGES["eval"].work([SMALL], Judging(TEXT, 4, 16, (few,))) for few in (False, True))
    assert whole.least_memory > 4 * SMALL.least_weights
    assert not file.least_memory
    assert whole.products
    assert file.host_products
    assert not file.products


def test_training_of_all_weights_asks_for_what_that_adds() -> None:
    adapter, full = (
        STAGES["recover"].work([SMALL], Recovering(Training(method=method, max_tokens=4096, seqlen=64)))
        for method in ("lora", "full")
    )
    assert not adapter.least_memory
    assert full.least_memory == 12 * SMALL.least_weights < full.memory


@pytest.mark.parametrize("stage", sorted(set(STAGES) - {"draw"}))
def test_options_that_would_take_less_memory_are_the_commands(
    stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([stage, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in re.findall(r"--[\w-]+", STAGES[stage].less))


@pytest.mark.parametrize(("suffix", "count"), [(".txt", 4), (".jsonl", 1024)])
def test_a_text_has_no_more_windows_than_its_bytes_make(suffix: str, count: int, tmp_path: Path) -> None:
    (tmp_path / f"text{suffix}").write_text("a" * 300, encoding="utf-8")
    asked = EvaluationSettings(text=(str(tmp_path / f"text{suffix}"),), seqlen=64, max_windows=1024)
    assert judged_windows(asked) == Windows(count, 64)
    assert judged_windows(replace(asked, max_windows=3)) == Windows(3, 64)


def test_every_family_has_a_row() -> None:
    assert set(_FAMILIES) == set(FAMILIES)


def test_a_disk_need_not_hold_what_is_not_there_at_once() -> None:
    """Floats that ONNX variants are proven by go before these are written; those of GGUF files stay."""
    floats = 4 * SMALL.least_weights
    gguf, onnx, both = (
        STAGES["export"].work([SMALL], Exporting(names, TEXT)).least_disk
        for names in (("Q4_0",), ("int4",), ("Q4_0", "int4"))
    )
    assert onnx == floats < gguf
    assert floats < both < 2 * floats


def test_stages_of_a_release_are_those_that_there_are() -> None:
    config = ReleaseConfig.model_validate(
        {"model": {"reference": "smollm2-135m"}, "recover": {}, "evaluate": {"files": ["Q4_0"]}}
    )
    there = {stage.name for stage in release_stages(config, Path("nowhere"))}
    assert set(_ROWS) <= there
    assert {row.work for row in _ROWS.values()} <= set(STAGES)
    for row in _ROWS.values():
        extents = [SMALL] * max(1, len(row.models))
        assert operations(STAGES[row.work].work(extents, row.asked(config))) > 0


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "-o", "OUT", "--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"],
        ["export", "-o", "OUT", "--gguf", "Q8_0", "--threads", "1"],
        ["eval", "--windows", "1", "--seqlen", "32", "--no-prompts"],
    ],
)
def test_a_long_stage_is_announced_in_a_line_and_a_short_one_is_not(
    command: list[str],
    tiny_folder: TinyPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = str(tiny_folder())
    for number, long in enumerate((float("inf"), 0.0)):
        monkeypatch.setattr(said, "LONG_S", long)
        line = [word if word != "OUT" else str(tmp_path / str(number)) for word in command]
        capsys.readouterr()
        assert main([line[0], model, *line[1:]]) == 0
        told = [line for line in capsys.readouterr().err.splitlines() if " of memory" in line]
        assert len(told) == number
        assert all(line.startswith("up to " if command[0] == "eval" else "about ") for line in told)


@pytest.mark.parametrize("command", [["prune"], ["export", "--gguf", "Q4_0"]])
def test_a_disk_that_cannot_hold_the_output_is_refused_before_the_model_is_read(
    command: list[str],
    small_disk: SmallDisk,
    tiny_folder: TinyPath,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk, model = small_disk("200k"), str(tiny_folder())
    for place in ("phoneready.exporting", "cfsp.models.reference"):
        monkeypatch.setattr(f"{place}.load_model", None)
    capsys.readouterr()
    assert main([command[0], model, "-o", str(disk / "out"), *command[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no space left to write {disk / 'out'}: {command[0]} takes ")
    assert error.endswith("are free; allowed: another place (-o)\n")
    assert error.count("\n") == 1
    assert not list(disk.iterdir())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """Work that commands ask room for, which is asked for all the same."""
    seen: list[Work] = []
    require_room = said.require_room

    def watched(work: Work, *others: Any) -> None:
        seen.append(work)
        require_room(work, *others)

    monkeypatch.setattr(said, "require_room", watched)
    return seen


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--prune-ratio 0.6",
        "--prune-ratio 0",
        "--uniform --prune-ratio 0.4",
        "--align 8 --prune-ratio 0.35",
        "--for-quant Q4_K_M --prune-ratio 0.4",
        "--blocks 2",
        "--blocks 0.5 --prune-ratio 0",
        "--attentions 2",
        "--kv-groups 0.5",
        "--vocabulary 300",
    ],
)
def test_a_pruned_checkpoint_takes_no_less_than_what_is_asked_for(
    options: str, asked_for: list[Work], tiny_folder: TinyPath, tmp_path: Path
) -> None:
    text = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"]
    model = str(tiny_folder(intermediate_size=512))
    assert main(["prune", model, "-o", str(tmp_path / "out"), *text, *options.split()]) == 0
    (work,) = asked_for
    written = folder_bytes(tmp_path / "out")
    assert work.least_disk <= written
    others = "--blocks", "--attentions", "--kv-groups", "--vocabulary"
    assert bool(work.least_disk) != options.startswith(others)


@pytest.mark.parametrize("other", [{"on_cpu": False}, {"is_alone": False}])
def test_what_dense_blocks_give_is_computed_again_where_it_is_not_kept(other: dict[str, bool]) -> None:
    kept, again = (STAGES["prune"].work([extent], PRUNING) for extent in (SMALL, replace(SMALL, **other)))
    assert kept.scratch == len(SMALL.blocks) * SMALL.states_bytes(PRUNING.text.tokens)
    assert again.scratch == 0
    assert operations(again) - operations(kept) == SMALL.pass_operations(TEXT.tokens, TEXT.seqlen)


def test_a_plan_that_is_given_takes_no_search_for_what_goes() -> None:
    settings = PruneSettings(blocks=1)
    made, given = (
        STAGES["prune"].work([SMALL], Pruning(settings, TEXT, has_plan=has)) for has in (False, True)
    )
    assert operations(given) < operations(made)


def test_rows_that_learn_to_spell_are_counted() -> None:
    """More of them is read for more tokens that go, and nothing where rows stay as they are."""
    plain, few, more, never = (
        operations(STAGES["prune"].work([SMALL], Pruning(replace(PruneSettings(), **asked), TEXT)))
        for asked in (
            {},
            {"vocabulary": 256},
            {"vocabulary": 128},
            {"vocabulary": 128, "reconstruct": "none"},
        )
    )
    unsolved = operations(STAGES["prune"].work([SMALL], Pruning(PruneSettings(reconstruct="none"), TEXT)))
    assert plain < few < more
    assert never == unsolved


_WATCHED: list[Callable[[], None]] = []
"""Called before anything is deleted or renamed; hooks of the interpreter stay, so there is one for all tests."""
_DELETES = ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


def _before_deletion(event: str, _: object) -> None:
    if event in _DELETES:
        for watch in tuple(_WATCHED):
            watch()


@contextmanager
def most_bytes(folder: Path) -> Iterator[list[int]]:
    """Sizes of a folder whenever something is about to go, the largest of which is the most that was there."""
    sizes: list[int] = []
    if not getattr(most_bytes, "hooked", False):
        sys.addaudithook(_before_deletion)
        most_bytes.hooked = True  # type: ignore[attr-defined]

    def watch() -> None:
        sizes.append(folder_bytes(folder))

    _WATCHED.append(watch)
    try:
        yield sizes
    finally:
        _WATCHED.remove(watch)
        watch()


@pytest.mark.parametrize(
    ("family", "names"),
    [
        *(("gguf", (name,)) for name in GGUF_NAMES),
        *(("onnx", (name,)) for name in ("fp32", "fp16", "int8", "int4", "int4-b128", "int8-dynamic")),
        ("gguf", GGUF_NAMES),
        ("onnx", ("fp16", "int4")),
    ],
)
def test_exports_take_no_less_than_what_is_asked_for(
    family: str, names: tuple[str, ...], asked_for: list[Work], sure_folder: TinyPath, tmp_path: Path
) -> None:
    """Of what is there at once: floats that files are made of, and files."""
    model = sure_folder(hidden_size=128, intermediate_size=256)
    command = ["export", str(model), "-o", str(tmp_path / "out"), f"--{family}", ",".join(names)]
    if any("calibration" in find_format(name).reads for name in names):
        command += ["--calibration", "none"]
    with most_bytes(tmp_path) as sizes:
        assert main([*command, "--threads", "1"]) == 0
    (work,) = asked_for
    assert 0 < work.least_disk <= max(sizes)


def test_what_cannot_be_timed_ends_nothing(
    tiny_folder: TinyPath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(said, "LONG_S", 0.0)
    monkeypatch.setattr(said, "foresee", full)
    assert main(["eval", str(tiny_folder()), "--windows", "1", "--seqlen", "32", "--no-prompts"]) == 0
    assert " of memory" not in capsys.readouterr().err


class Multiplied(TorchDispatchMode):
    """What dtypes matrix products are of."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.matmul.default:  # whole, as nothing has a gradient
            self.dtypes.add(result.dtype)
        return result


@pytest.mark.parametrize(
    ("stage", "dtype", "timed"),
    [
        ("recover", "bfloat16", torch.bfloat16),
        ("recover", "auto", product_dtype("auto")),
        ("recover", "float32", torch.float32),
        ("prune", "bfloat16", torch.float32),
    ],
)
def test_products_are_timed_in_what_a_stage_multiplies(
    stage: str, dtype: str, timed: torch.dtype, tiny_folder: TinyPath
) -> None:
    """Training casts tensors; elsewhere they are float32, rounded by torch where it does that by itself."""
    asked = {
        "recover": Recovering(Training(max_tokens=2**24, seqlen=64)),
        "prune": replace(PRUNING, text=Windows(2**16, 64)),
    }
    lines: list[str] = []
    with Multiplied() as multiplied:
        foretell(stage, [str(tiny_folder())], asked[stage], machine=Machine(dtype), tell=lines.append)
    assert multiplied.dtypes == {timed}
    assert lines


def test_training_on_a_gpu_asks_for_no_memory_of_the_host(
    tiny_folder: TinyPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = RecoverySettings(method="full", max_tokens=2**40), str(tiny_folder())
    monkeypatch.setattr("cfsp.memory.free_memory", lambda: 0)
    with pytest.raises(InputError, match="--method lora"):
        recover._foretell(asked[1], tmp_path / "out", asked[0], "cpu")
    monkeypatch.setattr("cfsp.devices.find_device", lambda name: torch.device("meta"))
    recover._foretell(asked[1], tmp_path / "out", asked[0], "auto")
