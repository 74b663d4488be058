"""The commands on a tiny model, in this process, with the real libraries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from phoneready.main import main

TinyPath = Callable[..., Path]
SMALL = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32", "--align", "1"]


@pytest.fixture(scope="module")
def model(tiny_folder: TinyPath) -> str:
    return str(tiny_folder())


@pytest.fixture(scope="module")
def checkpoint(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "checkpoint"
    assert main(["prune", model, "-o", str(output), "--prune-ratio", "0.25", *SMALL]) == 0
    return output


def test_prune_says_what_it_removed(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prune", model, "-o", str(tmp_path / "out"), "--prune-ratio", "0.25", *SMALL]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert plan["keep_ratio"] == pytest.approx(0.75)
    assert plan["settings"]["align"] == 1
    assert (tmp_path / "out" / "pruning_plan.json").is_file()
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert "25.00% of the FFN channels" in capsys.readouterr().out


def test_a_plan_is_made_once_and_applied_at_another_ratio(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    assert main(["prune", model, "--plan-only", str(plan), "--prune-ratio", "0.25", *SMALL]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    capsys.readouterr()
    again = ["prune", model, "-o", str(tmp_path / "out"), "--plan", str(plan), "--prune-ratio", "0.5"]
    assert main([*again, "--nsamples", "2", "--seqlen", "32", "--json"]) == 0
    applied = json.loads(capsys.readouterr().out)
    assert applied["keep_ratio"] == pytest.approx(0.5)
    assert applied["calibration"] == ["builtin:python-docs"]


def test_all_axes_go_together(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each export is proven against the checkpoint before it appears."""
    for name, ratio in (("plain", "0"), ("narrow", "0.25")):
        folder = tmp_path / name
        options = ["--prune-ratio", ratio, "--vocabulary", "300", "--blocks", "1"]
        options += ["--attentions", "1", "--kv-groups", "0.25"] if name == "narrow" else []
        assert main(["prune", model, "-o", str(folder), *options, *SMALL]) == 0
        said = capsys.readouterr().out
        assert "3 blocks of" in said
        assert "Blocks removed: " in said
        assert ("Attentions, with these blocks gone, removed: " in said) == (name == "narrow")
        assert ("KV groups kept: " in said) == (name == "narrow")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert (config["num_hidden_layers"], config["vocab_size"]) == (3, 300)
        assert ("auto_map" in config) == (name == "narrow")
        files = ["--gguf", "f32", "--onnx", "fp32", "--threads", "1"]
        assert main(["export", str(folder), "-o", str(tmp_path / f"{name}-files"), *files]) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "-o DIR"),
        (["-o", "x", "--plan-only", "y"], "-o DIR"),
        (
            ["-o", "x", "--prune-ratio", "1"],
            "--prune-ratio: out of range (got 1.0); allowed: 0 or more and below 1",
        ),
        (["-o", "x", "--score", "best"], "score"),
        (["-o", "x", "--for-quant", "Q9"], "Q9"),
        (["-o", "x", "--calibration", "missing.txt", "--seqlen", "32"], "missing.txt"),
        (["-o", "x", "--plan", "missing.json"], "missing.json"),
        (
            ["-o", "x", "--plan", "y", "--score", "cfsp"],
            "--score: decided by the plan; allowed: without --plan",
        ),
        (["-o", "x", "--plan", "y", "--vocabulary", "9"], "--vocabulary: decided by the plan"),
        (["-o", "x", "--blocks", "4", *SMALL], "at most 3"),
        (["-o", "x", "--blocks", "1", "--attentions", "3", *SMALL], "at most 2"),
        (
            ["-o", "x", "--kv-groups", "1"],
            "--kv-groups: out of range (got 1.0); allowed: 0 or more and below 1",
        ),
        (["-o", "x", "--kv-groups", "0.9", *SMALL], "kv_groups: each of the 4 blocks that attend keeps one"),
    ],
)
def test_prune_refuses_what_it_cannot_do(
    arguments: list[str],
    reason: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prune", model, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def warned(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a command has warned of, in order."""
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


def test_prune_goes_on_without_what_nothing_reads(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = ["--uniform", "--coarse-strength", "2", "--vocabulary-text", "missing.txt"]
    asked = ["prune", model, "--prune-ratio", "0.25", "--uniform", *SMALL]
    assert main([*asked, "-o", str(tmp_path / "plain")]) == 0
    assert not warned(capsys)
    assert main([*asked, "-o", str(tmp_path / "out"), *idle]) == 0
    said = warned(capsys)
    assert said == [
        "--vocabulary-text has no effect without a number of tokens to keep",
        "--coarse-strength has no effect without the allocation cfsp, and widths of their own",
    ]
    plans = [
        json.loads((tmp_path / name / "pruning_plan.json").read_text("utf-8")) for name in ("plain", "out")
    ]
    assert plans[1].pop("warnings") == said
    assert plans[0] == plans[1]


def test_eval_goes_on_without_what_nothing_reads(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.json"
    asked = ["eval", model, "--seqlen", "32", "--windows", "1", "--no-prompts", "--save", str(saved)]
    idle = ["--limit", "8", "--temperature", "0.5"]
    assert main([*asked, *idle, "--retries", "3"]) == 0
    said = warned(capsys)
    assert said == [
        "--limit has no effect without tasks",
        "--temperature has no effect without sampled answers",
        "--retries has no effect without --on ssh:HOST, --on adb:SERIAL",
    ]
    assert json.loads(saved.read_text("utf-8"))["warnings"] == said


def test_eval_against_the_dense_model(
    checkpoint: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--seqlen", "32", "--windows", "2", "--max-new-tokens", "2"]
    assert main(["eval", str(checkpoint), "--against", model, *sizes, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (text,) = result["texts"]
    assert text["n_tokens"] == 2 * 31
    assert text["divergence"]["kl_mean"] > 0
    assert len(result["answers"]) == len(result["against_answers"]) == len(result["prompts"]) > 0
    assert main(["eval", model, "--against", model, *sizes, "--no-prompts"]) == 0
    output = capsys.readouterr().out
    assert "100.00%" in output
    assert "62" in output


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("checkpoint", "would replace"),
        (".", "would replace"),
        ("empty", "as a whole"),
        ("file/x", "directory"),
    ],
)
def test_no_output_replaces_its_input_or_the_working_folder(
    output: str,
    reason: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if output == "empty" else tmp_path)
    asked = "." if output == "empty" else output
    commands = (
        ["export", str(tmp_path / "checkpoint"), "-o", asked, "--gguf", "Q4_0", "--force"],
        ["prune", str(tmp_path / "checkpoint"), "-o", asked, "--force"],
        ["recover", str(tmp_path / "checkpoint"), "-o", asked, "--force"],
    )
    before = sorted(tmp_path.rglob("*"))
    for command in commands:
        capsys.readouterr()
        assert main(command) == 2
        assert reason in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_eval_alone_gives_the_same_perplexity(
    checkpoint: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--seqlen", "32", "--windows", "2", "--no-prompts", "--json"]
    figures = []
    for extra in ([], ["--against", model]):
        assert main(["eval", str(checkpoint), *extra, *sizes]) == 0
        figures.append(json.loads(capsys.readouterr().out)["texts"][0])
    assert figures[0]["divergence"] is None
    assert figures[0]["perplexity"] == pytest.approx(figures[1]["perplexity"], rel=1e-5)
    assert figures[0]["windows_sha256"] == figures[1]["windows_sha256"]


def test_export_and_bench(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    output, records = tmp_path / "gguf", tmp_path / "records.jsonl"
    assert (
        main(["export", str(checkpoint), "-o", str(output), "--gguf", "f32", "--threads", "1", "--json"]) == 0
    )
    (export,) = json.loads(capsys.readouterr().out)["exports"]
    assert export["parity"]["max_logit_diff"] < 1e-3
    file = output / export["file"]
    assert file.stat().st_size == export["file_bytes"]
    assert main(["export", str(checkpoint), "-o", str(output), "--gguf", "f32"]) == 2
    assert "--force" in capsys.readouterr().err

    sizes = ["-p", "8", "-n", "0", "--ttft", "0", "-r", "2", "-t", "1", "--record", str(records)]
    assert main(["bench", str(file), *sizes, "--output", "jsonl"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["test"] for row in rows} == {"load", "pp8"}
    idle = ["--clean", "--retries", "3", "--unplugged", "--nominal-c", "30", "--idle", "9"]
    assert main(["bench", str(file), *sizes[:-2], *idle]) == 0
    assert warned(capsys) == [
        "--unplugged has no effect without a time for --wait-nominal",
        "--nominal-c has no effect without a time for --wait-nominal",
        "--idle has no effect without --energy",
        "--retries has no effect without --on ssh:HOST, --on adb:SERIAL",
        "--clean has no effect without --on and another machine",
    ]
    assert records.read_text(encoding="utf-8").count("\n") == len(rows)

    # What would be lost, or destroyed, after all is measured is refused before.
    size, onnx = file.stat().st_size, tmp_path / "model.onnx"
    onnx.write_bytes(b"graph")
    refused = {
        "no file of records": [str(file), *sizes[:-1], str(file)],
        "is a directory": [str(file), *sizes[:-1], str(tmp_path)],
        "given twice": [str(file), str(file), *sizes],
        "native runs GGUF files alone": [str(file), str(onnx), *sizes, "--on", "local", "--on", "native"],
    }
    for reason, arguments in refused.items():
        assert main(["bench", *arguments]) == 2
        captured = capsys.readouterr()
        assert reason in captured.err
        assert captured.out == ""
    assert file.stat().st_size == size
    assert records.read_text(encoding="utf-8").count("\n") == len(rows)


def test_both_kinds_of_export_share_a_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    output = tmp_path / "out"
    kinds = ["--gguf", "f32", "--onnx", "fp32,int8", "--threads", "1"]
    assert main(["export", str(checkpoint), "-o", str(output), *kinds, "--json"]) == 0
    exports = json.loads(capsys.readouterr().out)["exports"]
    assert [export["quant"] for export in exports] == ["f32", "fp32", "int8"]
    assert all((output / export["file"]).is_file() for export in exports)
    assert {path.name for path in output.iterdir()} == {"gguf", "onnx"}

    folders = [str(output / "onnx" / name) for name in ("fp32", "int8")]
    sizes = ["-p", "8", "-n", "4", "--ttft", "4", "-r", "1", "-t", "1", "--output", "jsonl"]
    for engine in ("onnxruntime", "onnxruntime-genai"):
        assert main(["bench", *folders, *sizes, "--engine", engine]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert {row["engine"] for row in rows} == {engine}
        assert [row["test"] for row in rows[::2]] == ["load", "pp8", "tg4", "ttft4"]
        files = [Path(row["model_filename"]) for row in rows]
        assert {file.name for file in files} == {"model_last.onnx", "model_quantized_last.onnx"}
        # The weights beside a graph belong to its size.
        assert all(
            row["file_size_bytes"] > 2 * file.stat().st_size for row, file in zip(rows, files, strict=True)
        )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--onnx", "int3"], "int4-b128"),
        (["--onnx", "int4", "--calibration", "missing.txt"], "missing.txt"),
        (["--onnx", "int4", "--calibration", "none", "--calibration", "self"], "stands alone"),
        (["--gguf", "Q4_0", "--onnx", "int2"], "int2"),
        (["--onnx", "int4-mixed", "--calibration", "none"], "wants text"),
        (["--onnx", "int4-mixed", "--mixed-size", "large"], "--mixed-size"),
        (["--gguf", "Q4_0", "--tune-scales", "--calibration", "none"], "scales are trained on text"),
    ],
)
def test_export_refuses_what_it_cannot_do(
    arguments: list[str], reason: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "out"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert reason in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_export_goes_on_without_what_nothing_reads(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    idle = ["--calibration", "missing.txt", "--opset", "18", "--mixed-size", "80M", "--tune-scales"]
    asked = ["export", str(checkpoint), "--gguf", "Q8_0", "--threads", "1", "--name", "m"]
    assert main([*asked, "-o", str(tmp_path / "plain")]) == 0
    assert not warned(capsys)
    assert main([*asked, "-o", str(tmp_path / "out"), *idle, "--nsamples", "8"]) == 0
    said = warned(capsys)
    assert said == [
        "--calibration has no effect without files of few bits",
        "--opset has no effect without --onnx VARIANT,...",
        "--tune-scales has no effect without GGUF files of up to 6 bits",
        "--mixed-size has no effect without the ONNX variant int4-mixed",
        "--nsamples has no effect without --calibration REF, or what needs text",
    ]
    assert json.loads((tmp_path / "out" / "export.json").read_text("utf-8"))["warnings"] == said
    assert (tmp_path / "out" / "m-Q8_0.gguf").read_bytes() == (
        tmp_path / "plain" / "m-Q8_0.gguf"
    ).read_bytes()


def test_export_wants_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "missing"), "-o", str(tmp_path / "out")]) == 2
    assert "no such model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_export_refuses_text_of_another_vocabulary(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    small, file = str(tmp_path / "small"), str(tmp_path / "file")
    sizes = ["--calibration", "builtin:python-docs", "--nsamples", "2", "--seqlen", "32"]
    assert main(["prune", model, "-o", small, "--prune-ratio", "0", "--vocabulary", "320", *sizes]) == 0
    assert main(["export", small, "-o", file, "--gguf", "f32", "--name", "m"]) == 0
    capsys.readouterr()
    command = [
        "export",
        f"{file}/m-f32.gguf",
        "-o",
        str(tmp_path / "out"),
        "--gguf",
        "Q4_0",
        "--dense",
        model,
    ]
    assert main([*command, *sizes]) == 2
    assert "another vocabulary" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"small", "file"}


def test_export_takes_a_model_that_is_no_folder_and_rounds_it_for_a_text(
    sure_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llama_cpp", reason="the gguf extra is not installed")
    dense = str(sure_folder(intermediate_size=256))
    assert main(["export", dense, "-o", str(tmp_path / "out"), "--gguf", "f32", "--name", "m"]) == 0
    source = tmp_path / "out" / "m-f32.gguf"
    capsys.readouterr()
    command = ["export", str(source), "--gguf", "Q4_0", "--json"]
    sized = ["--calibration", "builtin:python-docs", "--nsamples", "16", "--seqlen", "64"]
    records = {}
    ways = {"text": sized, "off": [*sized, "--no-gptq"], "tuned": [*sized, "--tune-scales"], "none": []}
    for name, more in ways.items():
        assert main([*command, "-o", str(tmp_path / name), *more]) == 0
        (records[name],) = json.loads(capsys.readouterr().out)["exports"]
        assert [file.name for file in (tmp_path / name).iterdir() if file.suffix == ".gguf"] == [
            records[name]["file"]
        ]
    assert records["text"]["gptq_tensors"] > 0
    assert records["text"]["calibration_tokens"] == 16 * 64
    assert records["off"]["gptq_tensors"] == records["none"]["gptq_tensors"] == 0
    # A model that nothing was measured of has the importance matrix of the text.
    assert records["text"]["imatrix_tensors"] == records["off"]["imatrix_tensors"] > 0
    assert records["off"]["calibration_tokens"] == 16 * 64
    assert (records["none"]["imatrix_tensors"], records["none"]["calibration_tokens"]) == (0, 0)
    assert [name for name, record in records.items() if record["tuned_tensors"]] == ["tuned"]
    assert len({record["sha256"] for record in records.values()}) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out", *records}
