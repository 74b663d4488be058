"""`phoneready recover`, end to end on tiny models: real Trainer, PEFT, accelerate and processes."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("peft", reason="the recover extra is not installed")
pytest.importorskip("accelerate", reason="the recover extra is not installed")

from cfsp import load_model
from cfsp.errors import InputError
from cfsp.models.architectures import model_shape
from cfsp.models.checkpoint import load_input_moments, read_checkpoint_info
from cfsp.models.gguf_file import read_gguf
from cfsp.records import read_record
from cfsp.recovery.recover import RecoveryJob, recover
from cfsp.recovery.recovery_record import RECOVERY_FILE, RecoveryRecord
from cfsp.recovery.settings import RecoverySettings
from cfsp.recovery.trainer import RunInputs, WorkFolder
from exporters.export_record import ExportManifest
from exporters.gguf.files import draft_gguf
from phoneready.main import main

TinyPath = Callable[..., Path]
SmallDisk = Callable[[str], Path]
InProcesses = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"List {i % 7} fruits."},
                {"role": "assistant", "content": "An apple, " * (i % 7) + "a pear."},
            ]
        }
        for i in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


SMALL = [
    "--set",
    "seqlen=64",
    "--set",
    "batch_size=2",
    "--set",
    "validation_windows=4",
    "--set",
    "dtype=float32",
]
PRUNED = [
    "--calibration",
    "builtin:python-docs",
    "--set",
    "nsamples=2",
    "--set",
    "seqlen=32",
    "--set",
    "align=8",
]


def command(checkpoint: Path | str, output: Path, data: Path, *options: str) -> list[str]:
    return ["recover", str(checkpoint), "-o", str(output), "--data", str(data), *SMALL, *options]


def record_of(folder: Path) -> RecoveryRecord:
    return read_record(RecoveryRecord, folder / RECOVERY_FILE)


def same_weights(first: Path, second: Path) -> None:
    one, other = (load_model(folder).model.state_dict() for folder in (first, second))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "loss"),
    [("ig-lora", "next-token"), ("lora", "distill"), ("full", "both")],
)
def test_a_few_steps_help_and_the_result_is_a_checkpoint(
    pruned: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, loss: str
) -> None:
    output = tmp_path / "out"
    capsys.readouterr()
    options = ["--max-tokens", "2560", "--learning-rate", "5e-3", "--method", method, "--loss", loss]
    options += ["--json", *([] if method == "full" else ["--set", "rank=4"])]
    assert main(command(pruned, output, chats, *options)) == 0
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    record = record_of(output)
    assert printed["tokens_seen"] == record.tokens_seen == 2560
    assert [point.step for point in record.losses] == list(range(1, 21))
    assert record.validations[0].step == 0
    assert record.validations[-1].loss < record.validations[0].loss
    assert record.kept_step > 0
    assert (record.teacher is None) == (loss == "next-token")
    if loss == "next-token":
        assert record.after.perplexity < record.before.perplexity
    if method == "full":
        assert record.ranks == ()
    else:
        assert sum(record.ranks) == 16
        assert (len(set(record.ranks)) > 1) == (method == "ig-lora")
    before, after = read_checkpoint_info(pruned), read_checkpoint_info(output)
    assert after.shape == before.shape == model_shape(load_model(output).model)
    assert after.source == before.source
    assert after.plan_sha256 == before.plan_sha256
    assert after.weights_sha256 != before.weights_sha256
    moments = load_input_moments(output)
    assert moments is not None
    assert moments.keys() == (load_input_moments(pruned) or {}).keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_without_data_the_teacher_writes_it_and_is_not_kept(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What learns only the next token has no use for its weights, which are as large as its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before, training = models_held(), []

    def progress(description: str, done: int, total: int) -> None:
        if description.startswith("training"):
            training.append(models_held() - before)

    settings = RecoverySettings(
        seqlen=32, batch_size=2, max_tokens=256, self_tokens=256, validation_windows=2, loss="next-token"
    )
    record, _ = recover(RecoveryJob(str(pruned), tmp_path / "out", settings, device="cpu"), progress=progress)
    assert record.teacher is not None
    assert [part.reference for part in record.training] == ["self"]
    assert set(training) == {1}


def test_training_is_followed_in_mlflow_while_it_goes_on(
    pruned: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the track extra is not installed")
    store = f"sqlite:///{tmp_path / 'runs.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.chdir(tmp_path)
    client, seen = mlflow.MlflowClient(tracking_uri=store), list[tuple[str, set[str], int]]()

    def progress(description: str, done: int, total: int) -> None:
        if description.startswith("training"):
            (run,) = client.search_runs([client.get_experiment_by_name("phoneready").experiment_id])
            losses = client.get_metric_history(run.info.run_id, "loss")
            seen.append((run.info.status, set(run.data.metrics), len(losses)))

    settings = RecoverySettings(
        seqlen=32, batch_size=2, max_tokens=192, validation_windows=2, loss="next-token", rank=4,
        report_to=("mlflow",),
    )  # fmt: skip
    job = RecoveryJob(str(pruned), tmp_path / "out", settings, (str(chats),), device="cpu")
    recover(job, progress=progress)
    assert [(status, count) for status, _, count in seen] == [("RUNNING", 1), ("RUNNING", 2), ("RUNNING", 3)]
    assert seen[-1][1] >= {"loss", "minutes_left", "eval_loss", "learning_rate"}


def models_held() -> int:
    gc.collect()
    return sum(type(one).__name__.endswith("LlamaForCausalLM") for one in gc.get_objects())


def test_what_can_be_known_at_once_is_said_before_a_model_is_read(
    pruned: Path, chats: Path, tmp_path: Path
) -> None:
    settings, asked = RecoverySettings(rank=4), list[str]()
    plain = json.loads(json.dumps(asdict(settings)))
    WorkFolder(tmp_path / "out.work").open(RunInputs(plain, {}, 1), force=False)
    for text, message in (
        (tmp_path / "none.jsonl", "none.jsonl does not exist"),
        (chats, r"other inputs \(different: .*rank"),
    ):
        job = RecoveryJob(
            str(pruned), tmp_path / "out", replace(settings, rank=8), ("self", str(text)), device="cpu"
        )
        with pytest.raises(InputError, match=message):
            recover(job, progress=lambda description, done, total: asked.append(description))
    assert not asked


def test_the_dense_model_teaches_one_that_lost_tokens(trimmed: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--method", "full", "--loss", "distill", "--learning-rate", "5e-3", "--max-tokens", "2560"]
    data = ["--data", "self", "--set", "self_tokens=1024", "--data", "builtin:python-docs"]
    assert main(command(trimmed, output, chats, *data, *options)) == 0
    record = record_of(output)
    assert record.validations[-1].loss < record.validations[0].loss
    assert len(record.training) == 3
    again, tokens = load_model(output), load_model(trimmed).tokenizer.get_vocab()
    assert again.tokenizer.get_vocab() == tokens
    assert again.model.get_output_embeddings().weight.shape[0] == 300


def test_training_that_diverges_keeps_the_best_and_says_so(
    pruned: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    options = ["--max-tokens", "5120", "--learning-rate", "3", "--method", "full", "--set", "eval_every=1"]
    options += ["--set", "warmup_ratio=0.9", "--set", "max_grad_norm=1e6", "--loss", "next-token"]
    assert main(command(pruned, tmp_path / "out", chats, *options)) == 1
    captured = capsys.readouterr()
    record = record_of(tmp_path / "out")
    assert record.stopped_by == "diverged"
    assert len(record.losses) < 40
    assert record.after.perplexity == min(point.perplexity for point in record.validations)
    error = captured.err.splitlines()[-1]
    assert error.startswith("error: training diverged after step ")
    assert f"are kept in {tmp_path / 'out'}" in error
    load_model(tmp_path / "out")
    assert not (tmp_path / "out.work").exists()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("how", ["ig-lora", pytest.param("full", marks=pytest.mark.everything)])
def test_a_killed_run_goes_on_to_the_same_result(
    pruned: Path, chats: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", how, "--max-tokens", "12800", "--set", "eval_every=5"]
    options += ["--set", "patience=0", "--threads", "1", "--device", "cpu"]
    whole = command(pruned, tmp_path / "whole", chats, *options)
    killed = command(pruned, tmp_path / "killed", chats, *options)
    process = subprocess.Popen(
        [sys.executable, "-m", "phoneready", *killed], env=environment(), stdout=subprocess.DEVNULL
    )
    work = tmp_path / "killed.work"
    while not list(work.glob("checkpoint-*/COMPLETE")):
        assert process.poll() is None, "ended before its first checkpoint"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed").exists()
    for name, content in (("optimizer.pt", pickle.dumps(Path())), ("recovery_state.json", b"[]")):
        hurt = Path(shutil.copytree(work, tmp_path / "hurt.work"))
        next(iter(hurt.glob(f"checkpoint-*/{name}"))).write_bytes(content)
        assert main(command(pruned, tmp_path / "hurt", chats, *options)) == 2
        assert "is damaged; remove the work folder" in capsys.readouterr().err
        shutil.rmtree(hurt)
    # What a kill in the middle of a later checkpoint leaves behind.
    (work / "checkpoint-99").mkdir()
    (work / "checkpoint-99" / "trainable.safetensors").write_bytes(b"half")
    assert main(killed) == main(whole) == 0
    first, second = record_of(tmp_path / "whole"), record_of(tmp_path / "killed")
    assert len(first.losses) == 100
    for a, b in zip(first.losses, second.losses, strict=True):
        assert (a.step, a.tokens) == (b.step, b.tokens)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert [p.step for p in first.validations] == [p.step for p in second.validations]
    assert first.kept_step == second.kept_step
    same_weights(tmp_path / "whole", tmp_path / "killed")
    assert not work.exists()


def same_training(first: Path, second: Path, within: float, rel: float = 1e-4) -> None:
    """The same start, the same curves to rounding, and weights that are no further from each other."""
    one, two = record_of(first), record_of(second)
    assert (one.tokens_seen, one.kept_step) == (two.tokens_seen, two.kept_step)
    for curve in ("losses", "validations"):
        for number, (a, b) in enumerate(zip(getattr(one, curve), getattr(two, curve), strict=True)):
            assert a.step == b.step
            assert a.loss == pytest.approx(b.loss, rel=rel if number else 1e-5)
    of_one, of_two = (load_model(folder).model.state_dict() for folder in (first, second))
    assert max(float((of_one[name] - of_two[name]).abs().max()) for name in of_one) < within


@pytest.mark.parametrize(
    "options", [("--method", "ig-lora", "--loss", "next-token"), ("--method", "full", "--loss", "both")]
)
def test_two_processes_are_one_with_twice_the_accumulation(
    pruned: Path, chats: Path, tmp_path: Path, in_processes: InProcesses, options: tuple[str, ...]
) -> None:
    how = ["--max-tokens", "2560", "--learning-rate", "3e-3", "--threads", "1", "--device", "cpu", *options]
    one = command(pruned, tmp_path / "one", chats, *how, "--set", "gradient_accumulation_steps=4")
    two = command(pruned, tmp_path / "two", chats, *how, "--set", "gradient_accumulation_steps=2")
    assert main(one) == 0
    result = in_processes(2, "-m", "phoneready", *two)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Validation loss") == result.stdout.count("; perplexity") == 1
    same_training(tmp_path / "one", tmp_path / "two", 1e-4, 1e-4)
    assert (record_of(tmp_path / "one").processes, record_of(tmp_path / "two").processes) == (1, 2)


REFUSED = """
--set rank=0 | rank: out of range
--method magic | allowed: auto, ig-lora, lora, full, scales
--method scales | allowed: ig-lora, lora, full; scales with for_quant
--for-quant Q4_0 --method lora | allowed: scales, if for_quant is set
--for-quant Q8_0 | loses nothing that training could win back
--for-quant int4-mixed | cannot be trained through
--loss mse | allowed: next-token, distill, both
--set seqlen=4096 | allowed: 2 to 512
--device tpu | allowed: auto, cpu
--device cuda:99 | is not there, or torch cannot use it
--data {empty} | no usable text
--data {question} | no chat in
--data missing.jsonl | does not exist
--validation {question} | no chat in
--loss distill --teacher {other} | another vocabulary
--set report_to=abacus | report_to
--set work={out} | may not hold each other
--set work={out}/work | may not hold each other
--set work={above} | may not hold each other
"""


def test_what_cannot_be_used_is_one_line_and_leaves_nothing(
    pruned: Path, chats: Path, tmp_path: Path, tiny_folder: TinyPath, refused: Callable[..., str]
) -> None:
    empty, question = tmp_path / "empty.jsonl", tmp_path / "question.jsonl"
    empty.write_text('{"text": " "}\n', encoding="utf-8")
    question.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}) + "\n", encoding="utf-8")
    out = tmp_path / "out"
    bad = {"empty": empty, "question": question, "other": tiny_folder("qwen2"), "out": out, "above": tmp_path}
    for row in REFUSED.strip().splitlines():
        options, _, message = row.partition(" | ")
        data = [] if "--data" in options else ["--data", chats]
        words = (word.format(**bad) for word in options.split())
        assert message in refused("recover", pruned, "-o", out, *data, *SMALL, *words), row
        assert not list(tmp_path.glob("out*"))


def test_the_teacher_is_found_from_another_folder_and_refused_once_it_has_changed(
    dense: str,
    chats: Path,
    tiny_folder: TinyPath,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home, moved = Path(shutil.copytree(dense, tmp_path / "home" / "dense")), Path("moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(home.parent)
    assert main(["prune", "dense", "-o", "checkpoint", *PRUNED]) == 0
    shutil.move("checkpoint", tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    few = ["--loss", "distill", "--max-tokens", "128"]
    assert main(command(moved, tmp_path / "one", chats, *few)) in (0, 1)
    assert read_checkpoint_info(tmp_path / "one").source == read_checkpoint_info(moved).source
    shutil.copy(tiny_folder(seed=1) / "model.safetensors", home)
    asked = command(moved, tmp_path / "two", chats, *few)
    capsys.readouterr()
    assert main(asked) == 2
    assert "no longer the model that the checkpoint was pruned from" in capsys.readouterr().err
    assert main([*asked, "--teacher", str(home)]) in (0, 1)


def test_a_model_is_not_taught_by_itself(
    dense: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--method", "lora", "--max-tokens", "640"]
    capsys.readouterr()
    assert main(command(dense, tmp_path / "out", chats)) == 2
    assert "pruning_plan.json" in capsys.readouterr().err, "ranks by importance need a plan"
    for teacher in ([], ["--teacher", str(dense)]):
        capsys.readouterr()
        assert main(command(dense, tmp_path / "out", chats, *few, *teacher)) == 2
        error = capsys.readouterr().err
        assert (
            "loss: a model learns nothing from its own distribution (got 'distill'); allowed: next" in error
        )
    assert not list(tmp_path.iterdir())
    trained = tmp_path / "trained"
    assert main(command(dense, trained, chats, *few, "--loss", "next-token")) == 0
    # Its teacher is the model that it was.
    assert main(command(trained, tmp_path / "back", chats, *few)) in (0, 1)
    assert record_of(tmp_path / "back").validations[0].loss > 0


def test_a_full_disk_leaves_the_last_complete_checkpoint(
    pruned: Path, chats: Path, tmp_path: Path, small_disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    # Room for one checkpoint of the tiny model and half of another.
    disk = small_disk("3200k")
    work = disk / "work"
    options = ["--method", "full", "--max-tokens", "2560", "--set", "eval_every=4"]
    line = command(pruned, tmp_path / "out", chats, *options, "--set", f"work={work}")
    capsys.readouterr()
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no space left to write ")
    assert "the last complete checkpoint is " in error
    assert error.count("\n") == 1
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (work / "checkpoint-4" / "COMPLETE").is_file()
    assert not (tmp_path / "out").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    assert main(line) == 0
    assert len(record_of(tmp_path / "out").losses) == 20


def test_a_file_holds_the_numbers_that_were_trained_through_its_rounding(
    dense: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, quant = tmp_path / "trained", "Q4_K_M"
    options = ("--for-quant", quant, "--max-tokens", "8192", "--learning-rate", "0.01")
    assert main(command(dense, trained, chats, *options)) == 0
    record = record_of(trained)
    assert (record.settings.method, record.settings.loss) == ("scales", "distill")
    assert record.kept_step > 0
    assert record.after != record.before
    for name in ("files", "again"):
        assert (
            main(
                [
                    "quantize",
                    str(trained),
                    "-o",
                    str(tmp_path / name),
                    "--to",
                    f"{quant},Q8_0",
                    "--text",
                    "none",
                ]
            )
            == 0
        )
    manifest = read_record(ExportManifest, tmp_path / "files" / "export.json")
    of_quant, of_eight_bits = manifest.exports
    assert of_quant.trained_tensors > 0
    assert of_eight_bits.trained_tensors == 0
    # Its weights are what the file's numbers stand for, so that only the runtime's arithmetic is between them.
    assert of_quant.parity.kl_mean < 1e-3
    assert (
        of_quant.sha256 == read_record(ExportManifest, tmp_path / "again" / "export.json").exports[0].sha256
    )
    drafted = draft_gguf(Path(dense), tmp_path, [quant])[quant]
    assert stored_types(tmp_path / "files" / of_quant.file) == stored_types(drafted)
    stored = load_file(trained / "rounded.safetensors")
    name = next(name for name in stored if "attn_q" in name)
    save_file(stored | {name: stored[name].flip(0).contiguous()}, trained / "rounded.safetensors")
    capsys.readouterr()
    assert (
        main(["quantize", str(trained), "-o", str(tmp_path / "damaged"), "--to", quant, "--text", "none"])
        == 2
    )
    assert f"not what its weights stand for: {name}" in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()


def test_a_4_bit_variant_holds_the_numbers_that_were_trained_through_its_rounding(
    dense: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, files = tmp_path / "trained", tmp_path / "files"
    options = ("--for-quant", "int4", "--max-tokens", "8192", "--learning-rate", "0.01")
    assert main(command(dense, trained, chats, *options)) == 0
    assert record_of(trained).kept_step > 0
    capsys.readouterr()
    assert main(["quantize", str(trained), "-o", str(files), "--to", "int4", "--text", "none"]) == 0
    assert "writing calibration text" not in capsys.readouterr().err
    (record,) = read_record(ExportManifest, files / "export.json").exports
    assert record.calibration_sha256 is None
    assert not any("without text" in warning for warning in record.warnings)
    # Its weights are what the file's numbers stand for, so that only the runtime's arithmetic is between them.
    assert record.parity.kl_mean < 1e-3
    stored = load_file(trained / "rounded.safetensors")
    name = next(name for name in stored if "q_proj.scales" in name)
    save_file(stored | {name: stored[name] * 2}, trained / "rounded.safetensors")
    assert (
        main(["quantize", str(trained), "-o", str(tmp_path / "damaged"), "--to", "int4", "--text", "none"])
        == 2
    )
    assert f"not what its weights stand for: {name.removesuffix('.scales')}" in capsys.readouterr().err
    assert not (tmp_path / "damaged").exists()


def stored_types(file: Path) -> dict[str, tuple[str, int]]:
    """Tensor -> its type, and how many bytes it takes."""
    return {tensor.name: (tensor.kind.name, tensor.data.nbytes) for tensor in read_gguf(file).tensors}
