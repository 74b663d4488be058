"""`phoneready shrink` on a tiny model: real pruning, real training, a real stop in the middle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="the recover extra is not installed")

from cfsp import load_model
from cfsp.errors import InputError
from cfsp.evaluation.task_results import TaskMetric, TaskResult
from cfsp.files import sha256_file
from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import read_checkpoint_info
from cfsp.progress import no_progress
from cfsp.records import read_record
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from phoneready.main import main
from phoneready.release.identities import identities, identity
from phoneready.release.stages import claim_folder, stage_folder
from phoneready.settings.schema import ModelConfig, RecoverConfig, ReleaseConfig
from phoneready.shrink.record import Shrunk, ShrunkStep
from phoneready.shrink.run import MODEL_FOLDER, RESULT_FILE, TABLE_FILE, for_task, shrink
from phoneready.shrink.settings import ShrinkSettings

TinyPath = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("--seqlen", "64", "--windows", "2", "--threads", "1", "--device", "cpu"),
    *("--nsamples", "4", "--calibration-seqlen", "64"),
    *("--training-seqlen", "64", "--batch-size", "2", "--validation-windows", "2", "--method", "full"),
)
TEXT = ("--calibration", "builtin:python-docs", "--data", "builtin:python-docs", "--max-tokens", "512")
STEPS = (*TEXT, "--step", "0.1", "--until", "0.3")
SHARES = (0.0, 0.1, 0.2, 0.3)


@pytest.fixture(scope="module")
def dense(tiny_folder: TinyPath) -> Path:
    return tiny_folder(intermediate_size=320)


@pytest.fixture(scope="module")
def shrunk(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shrink") / "out"
    assert main(command(dense, folder, *STEPS)) == 0
    return folder


def command(dense: Path, folder: Path, *more: str) -> list[str]:
    return ["shrink", str(dense), "-o", str(folder), *SMALL, *more]


def found_in(folder: Path) -> Shrunk:
    return read_record(Shrunk, folder / RESULT_FILE)


def weights(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_each_step_takes_its_share_of_the_dense_models_channels(dense: Path, shrunk: Path) -> None:
    found = found_in(shrunk)
    whole = sum(model_shape(load_model(dense).model).ffn_widths)
    assert [step.number for step in found.steps] == [0, 1, 2, 3]
    for step, share in zip(found.steps, SHARES, strict=True):
        model = load_model(shrunk / step.checkpoint).model
        assert step.removed == 1 - sum(model_shape(model).ffn_widths) / whole
        assert step.removed == pytest.approx(share, abs=32 / whole)
        assert step.parameters == sum(weight.numel() for weight in model.parameters())
    sizes = [step.file_bytes or 0 for step in found.steps]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 0
    start, *later = (step.texts[0] for step in found.steps)
    assert start.divergence is None
    assert all(text.divergence is not None and text.divergence.kl_mean > 0 for text in later)
    assert (found.kept, found.missed, found.tokens) == (3, None, 512)


def test_the_last_is_kept_and_learnt_from_the_dense_model(dense: Path, shrunk: Path) -> None:
    kept = shrunk / MODEL_FOLDER
    assert weights(kept) == weights(shrunk / found_in(shrunk).best.checkpoint)
    record = read_record(RecoveryRecord, kept / RECOVERY_FILE)
    assert record.tokens_seen == 512
    info = read_checkpoint_info(kept)
    assert info.source.sha256 == read_checkpoint_info(stage_folder(shrunk, "dense") / "model").source.sha256
    table = (shrunk / TABLE_FILE).read_text(encoding="utf-8")
    assert "| kept" in table
    assert "Stopped" not in table


def test_a_second_run_does_nothing(dense: Path, shrunk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in shrunk.rglob("*.safetensors")}
    capsys.readouterr()
    assert main(command(dense, shrunk, *STEPS, "--json")) == 0
    said = capsys.readouterr()
    assert "running" not in said.err
    assert json.loads(said.out)["kept"] == 3
    assert {path: path.stat().st_mtime_ns for path in shrunk.rglob("*.safetensors")} == before


def test_further_steps_go_on_from_those_that_are_there(
    dense: Path, shrunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A further aim leaves the last of the steps before as it is: 0.2 is not 0.1 and 0.1 again."""
    one = tmp_path / "one"
    assert main(command(dense, one, *TEXT, "--step", "0.1", "--until", "0.2")) == 0
    capsys.readouterr()
    assert main(command(dense, one, *STEPS)) == 0
    said = capsys.readouterr().err
    assert "recover-2      done before" in said
    assert "recover-3      running" in said
    assert weights(one / MODEL_FOLDER) == weights(shrunk / MODEL_FOLDER)


@pytest.mark.parametrize("stage", ["prune-1", "recover-2"])
def test_a_killed_run_goes_on_to_the_same_model(
    dense: Path, shrunk: Path, tmp_path: Path, stage: str
) -> None:
    folder = tmp_path / "out"
    line = [sys.executable, "-m", "phoneready", *command(dense, folder, *STEPS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        assert run.stderr is not None
        assert any(said.split()[:2] == [stage, "running"] for said in run.stderr)
        time.sleep(0.3)
        run.send_signal(signal.SIGKILL)
    assert not (folder / MODEL_FOLDER).exists()
    assert main(command(dense, folder, *STEPS)) == 0
    assert weights(folder / MODEL_FOLDER) == weights(shrunk / MODEL_FOLDER)
    assert not list((folder / "stages").glob("*.work"))


def test_a_step_that_is_too_bad_ends_it_and_the_one_before_is_kept(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(command(dense, folder, *STEPS, "--max-bits-ratio", "0.5")) == 0
    found = found_in(folder)
    assert [step.number for step in found.steps] == [0, 1]
    assert found.kept == 0
    assert "times the start's bits per byte" in (found.missed or "")
    assert "Stopped after step 1" in capsys.readouterr().out
    assert weights(folder / MODEL_FOLDER) == weights(stage_folder(folder, "dense") / "model")


def test_training_that_gained_nothing_is_told(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    few = ("--step", "0.1", "--until", "0.1", "--learning-rate", "100", "--loss", "next-token")
    capsys.readouterr()
    assert main(command(dense, folder, *TEXT, *few)) == 0
    said = capsys.readouterr()
    start, step = found_in(folder).steps
    assert start.shortcoming is None
    assert step.shortcoming is not None
    assert "the untrained weights, which are kept" in step.shortcoming
    assert step.shortcoming in said.err
    assert f"Step 1: {step.shortcoming}" in said.out


def chats(path: Path, first: int, count: int) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Call number {n}."},
                {"role": "assistant", "content": '{"call": "b"}'},
            ]
        }
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_task_is_learnt_first_and_its_accuracy_is_the_limit(dense: Path, tmp_path: Path) -> None:
    trained, held = chats(tmp_path / "calls.jsonl", 10, 60), chats(tmp_path / "held.jsonl", 80, 6)
    task = ("--task", str(trained), "--tasks", str(held), "--step", "0.2", "--until", "0.2")
    learning = ("--max-tokens", "6400", "--learning-rate", "2e-3", "--vocabulary", "300")
    folder = tmp_path / "out"
    assert main(command(dense, folder, *task, *learning)) == 0
    found = found_in(folder)
    start, step = found.steps
    assert start.checkpoint == "stages/learn/model"
    assert (start.accuracy, step.accuracy) == (1.0, 1.0)
    assert [one.tasks[0].n_items for one in found.steps] == [6, 6]
    assert (start.vocabulary > 300, step.vocabulary) == (True, 300)
    assert (found.kept, found.missed) == (1, None)
    assert [text.source for text in step.texts] == [str(held)]
    for stage in ("learn", "recover-1"):
        record = read_record(RecoveryRecord, stage_folder(folder, stage) / "model" / RECOVERY_FILE)
        assert [part.reference for part in record.training] == [str(trained)]
        assert record.settings.loss == "next-token"


@pytest.mark.parametrize(
    "named", [(), ("calibration",), ("data",), ("loss",), ("calibration", "data", "loss")]
)
def test_a_task_stands_in_for_what_is_not_named(named: tuple[str, ...]) -> None:
    config = ReleaseConfig(model=ModelConfig(reference="m"), recover=RecoverConfig())
    asked = for_task(config, ShrinkSettings(task="calls.jsonl", tasks=("held.jsonl",)), named)
    assert asked.recover is not None
    assert asked.prune.calibration == (("self",) if "calibration" in named else ("calls.jsonl",))
    assert asked.recover.data == (("self",) if "data" in named else ("calls.jsonl",))
    assert asked.recover.loss == ("distill" if "loss" in named else "next-token")
    assert asked.prune.vocabulary_text == ("calls.jsonl",)


def test_a_task_leaves_another_loss_as_it_is() -> None:
    config = ReleaseConfig(model=ModelConfig(reference="m"), recover=RecoverConfig(loss="both"))
    asked = for_task(config, ShrinkSettings(task="calls.jsonl", tasks=("held.jsonl",)), ())
    assert asked.recover is not None
    assert asked.recover.loss == "both"


def test_steps_are_not_trained_through_a_rounding(tmp_path: Path) -> None:
    asked = ReleaseConfig(model=ModelConfig(reference="m"), recover=RecoverConfig(for_quant="Q4_0"))
    with pytest.raises(InputError, match="for_quant: a step's file is not what the next step prunes"):
        shrink(asked, ShrinkSettings(), tmp_path / "out", show=lambda name, state: None, progress=no_progress)
    assert not list(tmp_path.iterdir())


def test_a_step_that_unlearns_the_task_is_not_kept(dense: Path, tmp_path: Path) -> None:
    trained, held = chats(tmp_path / "calls.jsonl", 10, 60), chats(tmp_path / "held.jsonl", 80, 6)
    # A step of other text, at a rate at which nothing else is left of the model.
    other = ("--data", "builtin:python-docs", "--max-tokens", "6400", "--learning-rate", "2e-3")
    folder = tmp_path / "out"
    task = ("--task", str(trained), "--tasks", str(held), "--step", "0.2", "--until", "0.4")
    assert main(command(dense, folder, *task, *other)) == 0
    found = found_in(folder)
    assert [step.accuracy for step in found.steps] == [1.0, 0.0]
    assert (found.kept, found.missed) == (0, "accuracy is 0.000, at the start 1.000")
    assert weights(folder / MODEL_FOLDER) == weights(stage_folder(folder, "learn") / "model")


@pytest.mark.parametrize(("lost", "missed"), [(0, False), (1, False), (2, False), (12, True)])
def test_a_step_is_worse_where_its_items_can_tell(lost: int, missed: bool) -> None:
    def step(right: str) -> ShrunkStep:
        metric = TaskMetric("acc", right.count("1") / len(right), 0.03, True, right)
        task = TaskResult("held", "1", "held.jsonl", "ab", len(right), None, 0, (metric,))
        return ShrunkStep(1, "model", 0.1, 300, 1000, None, (), (task,))

    start, later = step("1" * 95 + "0" * 5), step("0" * lost + "1" * (95 - lost) + "0" * 5)
    assert (later.worse_than(start, ShrinkSettings()) is not None) == missed


def test_shares_of_the_steps() -> None:
    assert ShrinkSettings(step=0.05, until=0.3).shares == pytest.approx((0.05, 0.1, 0.15, 0.2, 0.25, 0.3))
    assert ShrinkSettings(step=0.1, until=0.9).shares[2] == ShrinkSettings(step=0.1, until=0.3).shares[-1]
    assert ShrinkSettings(step=0.2, until=0.5).shares == pytest.approx((0.2, 0.4, 0.5))
    assert ShrinkSettings(step=0.05, until=0.0, vocabulary=300).shares == (0.0,)
    assert ShrinkSettings(step=0.05, until=0.0).shares == ()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--until", "0"), "nothing is to be removed"),
        (("--task", "CALLS"), "no held-out part"),
        (("--task", "CALLS", "--tasks", "CALLS"), "which is trained on"),
        (("--task", "notes.txt", "--tasks", "CALLS"), "not a file of chats"),
        (("--task", "none.jsonl", "--tasks", "CALLS"), "none.jsonl does not exist"),
        (("--for-quant", "Q4_0"), "No such option: --for-quant"),
        (("--method", "scales"), "allowed: auto, ig-lora, lora, full"),
        (("--step", "0"), "--step"),
        (("--step", "1e-9"), "--step: out of range"),  # 300 million stages
        (("--tasks", "none.jsonl"), "none.jsonl does not exist"),
        (("--max-tokens", "100", "--epochs", "1"), "max_tokens"),
        (("--data", "none.txt"), "none.txt does not exist"),
        (("--calibration", "none.txt"), "none.txt does not exist"),
        (("--loss", "next-token", "--data", "student"), "teaches it nothing"),
        (
            ("--task", "CALLS", "--tasks", "HELD", "--loss", "distill", "--validation", "student"),
            "teaches it nothing",
        ),
        (
            (
                "--task",
                "CALLS",
                "--tasks",
                "HELD",
                "--data",
                "self",
                "--self-tokens",
                "64",
                "--calibration",
                "no.txt",
            ),
            "no.txt does not exist",
        ),
        (("--max-accuracy-drop", "0.1"), "--max-accuracy-drop with --tasks"),
        (("--report-to", "nonsense"), "report_to"),
        (("--data", "CALLS", "--tasks", "CALLS"), "which is trained on"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    dense: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    reason: str,
) -> None:
    calls = str(chats(tmp_path / "calls.jsonl", 0, 4))
    capsys.readouterr()
    files = {"CALLS": calls, "HELD": str(chats(tmp_path / "held.jsonl", 4, 4))}
    given = [files.get(option, option) for option in options]
    assert main(command(dense, tmp_path / "out", *given)) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert len(said.strip().split("\n")) == 1
    assert not (tmp_path / "out").exists()


def test_what_has_no_effect_is_warned_of(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends with the task's accuracy at its start, which untrained is nothing."""
    files = [str(chats(tmp_path / name, first, 9)) for name, first in (("calls.jsonl", 0), ("held.jsonl", 9))]
    idle = ("--vocabulary-text", "none.txt", "--temperature", "2", "--self-tokens", "64")
    asked = ("--task", files[0], "--tasks", files[1], "--max-tokens", "128", *idle)
    capsys.readouterr()
    assert main(command(dense, tmp_path / "out", *asked)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in said] == ["--vocabulary-text", "--temperature", "--self-tokens"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--calibration", "CALLS"), "too few"),
        (("--chats", "CALLS", "--windows", "2"), "too few for window"),
        (("--text", "builtin:python-docs", "--training-seqlen", "4096"), "allowed: 2 to 512"),
        (("--text", "builtin:python-docs", "--tasks", "LONG"), "tokens"),
    ],
)
def test_what_the_model_cannot_be_asked_is_found_before_it_is_trained(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], reason: str
) -> None:
    calls = {"CALLS": str(chats(tmp_path / "calls.jsonl", 0, 1))}
    long = tmp_path / "long.jsonl"
    long.write_text(
        Path(calls["CALLS"]).read_text(encoding="utf-8").replace("Call", "Call " * 900), encoding="utf-8"
    )
    calls["LONG"] = str(long)
    given = [calls.get(option, option) for option in options]
    assert main(command(dense, tmp_path / "out", *TEXT[2:], *given)) == 2
    said = capsys.readouterr().err.strip().split("\n")
    assert reason in said[-1]
    assert [line for line in said if "running" in line] == ["dense          running"]


def test_a_start_that_cannot_do_the_tasks_ends_it(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = chats(tmp_path / "held.jsonl", 0, 6)
    assert main(command(dense, tmp_path / "out", *STEPS, "--tasks", str(held))) == 1
    assert "accuracy in the tasks is 0.000" in capsys.readouterr().err
    assert not (tmp_path / "out" / "stages" / "prune-1").exists()


def test_a_model_folder_named_as_text_that_a_model_writes_is_read(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense, "student")
    before = identity("student")
    (tmp_path / "student" / "notes.txt").write_text("other", encoding="utf-8")
    assert identity("student") != before != ""
    assert identities(["student"]) == [["student", ""]]


def test_the_folder_of_a_release_is_left_alone(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claim_folder(tmp_path / "out"):
        (stage_folder(tmp_path / "out", "prune")).mkdir(parents=True)
    assert main(command(dense, tmp_path / "out", *STEPS)) == 2
    assert "stages/prune" in capsys.readouterr().err
    assert main(command(dense, dense / "out", *STEPS)) == 2
    assert "in the model's folder" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(command(dense, tmp_path, *STEPS)) == 2
    assert "choose another one with -o" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
